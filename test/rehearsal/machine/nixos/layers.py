"""Where the stand-in keeps what stands for Nix' store, and how a package's program is found there."""

import os
from pathlib import Path

# Tests have a folder of their own, and the host's evaluator.
IN_TEST = "STAND_IN_LAYERS" in os.environ
LAYERS = Path(os.environ.get("STAND_IN_LAYERS", "/nix/.layers"))
OWN = Path(__file__).resolve().parent.parent
EVALUATOR = OWN / "evaluator/system.nix"
NIX_INSTANTIATE = "nix-instantiate" if IN_TEST else str(LAYERS / "debian/usr/bin/nix-instantiate")

# Where Debian keeps a package's programs when it is not with all the others.
OF_THEIR_OWN = {"cni-plugins": ["usr/lib/cni"]}


class Failure(Exception):
    """Something that NixOS would refuse as well: told without a trace, status 1."""


def find_program(name: str, package: str = "") -> Path | None:
    """The program's path in a layer. Other layers go before Debian's: they hold what is newer."""
    others = sorted(layer for layer in LAYERS.glob("*") if layer.name not in ("debian", "stand-in"))
    folders = [layer / "bin" for layer in others]
    debian = OF_THEIR_OWN.get(package, ["usr/bin", "usr/sbin"])
    for folder in folders + [LAYERS / "debian" / where for where in debian]:
        if os.path.lexists(folder / name):
            return folder / name
    return None


def read_list(path: Path) -> list[str]:
    """Words of a file with comments."""
    lines = (line.split("#")[0] for line in path.read_text().splitlines())
    return [word for line in lines for word in line.split()]
