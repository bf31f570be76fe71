"""nixos-rebuild: evaluates /etc/nixos/configuration.nix, builds a generation and switches to it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from channel import release_of
from evaluation import evaluate
from generations import add, current, generations, roll_back
from layers import Failure
from store import below, link, store_path
from system import build

ACTIONS = ("switch", "boot", "test", "build", "dry-build", "dry-activate", "list-generations")


def nixos_rebuild(words: list[str]) -> None:
    action, rollback = parse(words)
    if action == "list-generations":
        for number, system in generations().items():
            print(f"{number}{' True' if number == current() else ''} {system}")
        return
    if rollback:
        system = roll_back()
    else:
        searched("nixpkgs")
        system = build_from(searched("nixos-config"), action)
        if action in ("switch", "boot"):
            add(system)
    if action in ("build", "dry-build"):
        if action == "build":
            link(system, Path.cwd() / "result")
        print(system)
        return
    done = subprocess.run([str(system / "bin/switch-to-configuration"), action])
    if done.returncode != 0:
        print("warning: error(s) occurred while switching to the new configuration", file=sys.stderr)
        sys.exit(done.returncode)


def searched(name: str) -> Path:
    """What Nix finds for <name>. It has no default for these two: only a login has NIX_PATH."""
    for entry in os.environ.get("NIX_PATH", "").split(":"):
        prefix, _, path = entry.rpartition("=")
        found = Path(path) if prefix == name else Path(path, name)
        if path and prefix in ("", name) and found.exists():
            return found
    raise Failure(f"error: file '{name}' was not found in the Nix search path (add it using $NIX_PATH or -I)")


def parse(words: list[str]) -> tuple[str, bool]:
    rollback = False
    actions = []
    for word in words:
        if word == "--rollback":
            rollback = True
        elif word in ACTIONS:
            actions.append(word)
        elif word not in ("--show-trace", "--fast", "--no-reexec", "--no-build-nix", "-v"):
            raise Failure(f"nixos-rebuild: unknown option `{word}'")
    if len(actions) != 1:
        raise Failure(f"nixos-rebuild: give one action of {', '.join(ACTIONS)}")
    if rollback and actions[0] not in ("switch", "boot", "test", "dry-activate"):
        raise Failure(f"nixos-rebuild: --rollback does not go with {actions[0]}")
    return actions[0], rollback


def build_from(configuration: Path, action: str) -> Path:
    # The real one reads NixOS itself from the channel.
    release = release_of()
    print("building the system configuration...", file=sys.stderr, flush=True)
    spec = evaluate(configuration)
    kernel, ramdisk = boot_files(release, Path("/run/current-system"))
    progress = (lambda text: print(text, file=sys.stderr, flush=True)) if action != "dry-build" else lambda _: None
    return build(spec, Path("/"), release, kernel, ramdisk, progress)


def boot_files(release: str, running: Path, root: Path = Path("/")) -> tuple[Path, Path]:
    """Kernel and ramdisk of a release, as paths in the store. Each release has a kernel path of its
    own, so that a machine has to start anew for it; what is in the file is the same."""
    systems = [running, *(below(root, path) for path in reversed(generations(root).values()))]
    for system in systems:
        if (system / "nixos-version").read_text() == f"{release}.stand-in":
            return Path(os.readlink(system / "kernel")), Path(os.readlink(system / "initrd"))
    kernel, ramdisk = (Path(os.readlink(running / name)) for name in ("kernel", "initrd"))
    other = store_path(f"linux-{release}", release) / kernel.name
    below(root, other.parent).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(below(root, kernel), below(root, other))
    return other, ramdisk
