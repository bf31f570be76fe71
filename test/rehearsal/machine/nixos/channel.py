"""nix-channel: which release of NixOS a machine builds. The list of channels says where it is to come
from, a profile what has come from there."""

import re
from pathlib import Path

from generations import PROFILES, add, roll_back
from layers import OWN, Failure, read_list
from store import below, store_path, write

CHANNELS = PROFILES / "per-user/root/channels"
LIST = Path("/root/.nix-channels")
ADDRESS = "https://channels.nixos.org/nixos-"


def nix_channel(words: list[str], root: Path = Path("/")) -> None:
    """Raises Failure for a channel that is not there."""
    listed = read_channels(root)
    action, *rest = words or [""]
    if action == "--list" and not rest:
        for name, url in listed.items():
            print(f"{name} {url}")
    elif action == "--add" and len(rest) == 2:
        url, name = rest
        if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]*", name):
            raise Failure(f"error: invalid channel identifier '{name}'")
        write_channels(root, {**listed, name: url})
    elif action == "--update" and set(rest) <= {"nixos"}:
        if "nixos" in listed:
            print("unpacking 1 channels...")
            fetch(release_at(listed["nixos"]), root)
    elif action == "--rollback" and len(rest) <= 1:
        roll_back(root, CHANNELS, int(rest[0]) if rest else None)
    else:
        raise Failure(f"error: the stand-in has no nix-channel {' '.join(words)}")


def release_at(url: str) -> str:
    """The release that a channel has, of those that the stand-in can be."""
    release = url.removeprefix(ADDRESS)
    if release == url or release not in read_list(OWN / "releases"):
        raise Failure(f"error: unable to download '{url}/nixexprs.tar.xz': HTTP error 404")
    return release


def fetch(release: str, root: Path = Path("/")) -> None:
    """Makes a release what the machine builds from now on."""
    channel = store_path("nixos-channel", release)
    write(below(root, channel) / "nixos/.version", f"{release}\n")
    add(channel, root, CHANNELS)


def release_of(root: Path = Path("/")) -> str:
    """The release that the machine builds. Raises Failure when there is none, as Nix does."""
    path = below(root, CHANNELS)
    if not path.is_symlink():
        raise Failure("error: file 'nixpkgs/nixos' was not found in the Nix search path")
    # Two links, the second of which begins at the machine's own root.
    channel = (path.parent / path.readlink()).readlink()
    return (below(root, channel) / "nixos/.version").read_text().strip()


def read_channels(root: Path) -> dict[str, str]:
    """Name to address."""
    path = below(root, LIST)
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: url for url, name in (line.split() for line in lines)}


def write_channels(root: Path, channels: dict[str, str]) -> None:
    write(below(root, LIST), "".join(f"{url} {name}\n" for name, url in channels.items()))
