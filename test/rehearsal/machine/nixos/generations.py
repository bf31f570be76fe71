"""Profiles: a link to the newest or chosen generation, each of which is a link NAME-N-link to something
in the store."""

import os
import re
from pathlib import Path

from layers import Failure
from store import below, link

PROFILES = Path("/nix/var/nix/profiles")
SYSTEM = PROFILES / "system"


def generations(root: Path = Path("/"), profile: Path = SYSTEM) -> dict[int, Path]:
    """Number to path in the store, oldest first."""
    found = {}
    for path in below(root, profile.parent).glob(f"{profile.name}-*-link"):
        number = re.fullmatch(rf"{profile.name}-(\d+)-link", path.name)
        if number:
            found[int(number[1])] = Path(os.readlink(path))
    return dict(sorted(found.items()))


def current(root: Path = Path("/"), profile: Path = SYSTEM) -> int | None:
    """The number that the profile stands at."""
    path = below(root, profile)
    return int(os.readlink(path).split("-")[1]) if path.is_symlink() else None


def add(target: Path, root: Path = Path("/"), profile: Path = SYSTEM) -> int:
    """Makes something in the store the profile's newest generation, unless it is the one that it
    stands at."""
    now = current(root, profile)
    known = generations(root, profile)
    if now is not None and known.get(now) == target:
        return now
    number = max(known, default=0) + 1
    link(target, below(root, profile.parent) / f"{profile.name}-{number}-link")
    choose(number, root, profile)
    return number


def choose(number: int, root: Path = Path("/"), profile: Path = SYSTEM) -> None:
    link(f"{profile.name}-{number}-link", below(root, profile))


def roll_back(root: Path = Path("/"), profile: Path = SYSTEM, to: int | None = None) -> Path:
    """Sets the profile to a generation, or to the one before that which it stands at. Returns what
    that is."""
    now = current(root, profile)
    known = generations(root, profile)
    earlier = [number for number in known if now is not None and number < now]
    if to is not None and to not in known:
        raise Failure(f"error: profile version {to} does not exist")
    if to is None and not earlier:
        raise Failure(f"error: no generation older than the current ({now}) exists")
    number = to if to is not None else earlier[-1]
    print(f"switching profile from version {now} to {number}")
    choose(number, root, profile)
    return known[number]
