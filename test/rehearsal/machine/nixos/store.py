"""Paths in /nix/store, below the root of the system that is being made."""

import hashlib
import os
from pathlib import Path

from layers import find_program

STORE = Path("/nix/store")


def store_path(name: str, content: str) -> Path:
    """A path as Nix has them: the same name and content give the same one."""
    digest = hashlib.sha256(f"{name}\n{content}".encode()).hexdigest()[:32]
    return STORE / f"{digest}-stand-in-{name}"


def below(root: Path, path: Path | str) -> Path:
    """Where an absolute path of the system lies while the system is at `root`."""
    return root / str(path).lstrip("/")


def link(target: Path | str, path: Path) -> None:
    """Makes or replaces a symbolic link, so that the path always leads somewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.new"
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, path)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.new"
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    beside.chmod(mode)
    os.replace(beside, path)


def link_packages(root: Path, packages: dict[str, dict]) -> list[Path]:
    """Makes the packages' folders in the store: bin/ with links into the layers.

    A program that no layer has is left out, as on a machine without the Kubernetes programs.
    Returns the paths that were not there before.
    """
    made = []
    for path, package in packages.items():
        folder = below(root, path) / "bin"
        if not folder.exists():
            made.append(Path(path))
        folder.mkdir(parents=True, exist_ok=True)
        for name in package["bin"]:
            program = find_program(name, package["package"])
            if program:
                link(program, folder / name)
    return made
