"""nixos-rebuild: evaluates /etc/nixos/configuration.nix, builds a generation and switches to it."""

import os
import subprocess
import sys
from pathlib import Path

from evaluation import evaluate
from generations import PROFILES, add, current, generations, roll_back
from layers import Failure
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
        system = build_from(Path("/etc/nixos/configuration.nix"), action)
        if action in ("switch", "boot"):
            add(system)
    if action in ("build", "dry-build"):
        print(system)
        return
    done = subprocess.run([str(system / "bin/switch-to-configuration"), action])
    if done.returncode != 0:
        print("warning: error(s) occurred while switching to the new configuration", file=sys.stderr)
        sys.exit(done.returncode)


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
    # The real one reads NixOS itself from the channel, which nixos-install has copied.
    if not (PROFILES / "per-user/root/channels/nixos").exists():
        raise Failure("error: file 'nixpkgs/nixos' was not found in the Nix search path")
    print("building the system configuration...", file=sys.stderr, flush=True)
    spec = evaluate(configuration)
    running = Path("/run/current-system")
    kernel, ramdisk = (Path(os.readlink(running / name)) for name in ("kernel", "initrd"))
    progress = (lambda text: print(text, file=sys.stderr, flush=True)) if action != "dry-build" else lambda _: None
    return build(spec, Path("/"), kernel, ramdisk, progress)
