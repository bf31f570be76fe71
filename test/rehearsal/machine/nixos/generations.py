"""The profile /nix/var/nix/profiles/system: a link to the newest or chosen generation, each of
which is a link system-N-link to a system in the store."""

import os
import re
from pathlib import Path

from layers import Failure
from store import below, link

PROFILES = Path("/nix/var/nix/profiles")


def generations(root: Path = Path("/")) -> dict[int, Path]:
    """Number to system, oldest first."""
    found = {}
    for path in below(root, PROFILES).glob("system-*-link"):
        number = re.fullmatch(r"system-(\d+)-link", path.name)
        if number:
            found[int(number[1])] = Path(os.readlink(path))
    return dict(sorted(found.items()))


def current(root: Path = Path("/")) -> int | None:
    """The number that the profile stands at."""
    profile = below(root, PROFILES) / "system"
    return int(os.readlink(profile).split("-")[1]) if profile.is_symlink() else None


def add(system: Path, root: Path = Path("/")) -> int:
    """Makes the system the profile's newest generation, unless it is the one that it stands at."""
    now = current(root)
    known = generations(root)
    if now is not None and known.get(now) == system:
        return now
    number = max(known, default=0) + 1
    link(system, below(root, PROFILES) / f"system-{number}-link")
    choose(number, root)
    return number


def choose(number: int, root: Path = Path("/")) -> None:
    link(f"system-{number}-link", below(root, PROFILES) / "system")


def roll_back(root: Path = Path("/")) -> Path:
    """Sets the profile to the generation before the one that it stands at. Returns its system."""
    now = current(root)
    earlier = [number for number in generations(root) if now is not None and number < now]
    if not earlier:
        raise Failure(f"error: no generation older than the current ({now}) exists")
    print(f"switching profile from version {now} to {earlier[-1]}")
    choose(earlier[-1], root)
    return generations(root)[earlier[-1]]
