"""What makes a system in the store the one that a root file system has: at installation, at each
boot, and at each switch."""

import json
import os
import secrets
import shutil
from pathlib import Path

from accounts import write_accounts
from layers import find_program
from store import below, link, write

WRAPPERS = ["mount", "umount", "ping", "su", "sudo"]


def activate(system: Path, root: Path = Path("/"), say=print) -> None:
    """Users and groups, /etc, wrappers and /run/current-system."""
    spec = json.loads((below(root, system) / "spec.json").read_text())
    say("setting up users and groups...")
    write_accounts(spec, root)
    say("setting up /etc...")
    setup_etc(system, root)
    machine_id = below(root, "/etc/machine-id")
    if not machine_id.exists():
        write(machine_id, f"{secrets.token_hex(16)}\n", 0o444)
    for folder, mode in (("/var/empty", 0o555), ("/root", 0o700), ("/home", 0o755), ("/tmp", 0o1777)):
        below(root, folder).mkdir(parents=True, exist_ok=True)
        below(root, folder).chmod(mode)
    if root != Path("/"):
        return
    for name in WRAPPERS:
        program = find_program(name)
        if program:
            link(program, Path("/run/wrappers/bin") / name)
    link(system, Path("/run/current-system"))


def setup_etc(system: Path, root: Path) -> None:
    """Links each file of the system's /etc through /etc/static, and takes away the links of former
    systems. What is no such link belongs to the machine: nothing is done to it but where the
    configuration has a file of that name."""
    static = below(root, "/etc/static")
    tree = below(root, os.readlink(below(root, system) / "etc"))
    link(os.readlink(below(root, system) / "etc"), static)

    copied_before = read_clean_list(root)
    copied = set()
    wanted = set()
    for source in walk(tree):
        name = source.relative_to(tree)
        wanted.add(str(name))
        target = below(root, "/etc") / name
        make_folders(target.parent)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        # What not everybody may read is no link, as the store is everybody's.
        if not source.is_symlink() and source.is_file() and not source.stat().st_mode & 0o004:
            write(target, source.read_text(), source.stat().st_mode & 0o7777)
            copied.add(str(name))
        else:
            link(f"/etc/static/{name}", target)

    for path in list(below(root, "/etc").rglob("*")):
        if path.is_symlink() and os.readlink(path).startswith("/etc/static/"):
            if str(path.relative_to(below(root, "/etc"))) not in wanted:
                path.unlink()
    for name in copied_before - copied - wanted:
        (below(root, "/etc") / name).unlink(missing_ok=True)
    write(below(root, "/etc/.clean"), "".join(f"{name}\n" for name in sorted(copied)))


def walk(tree: Path):
    """The files and links of a tree; units are one link, so that no former unit stays."""
    for path in sorted(tree.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.parts[-2:] != ("systemd", "system"):
            yield from walk(path)
        else:
            yield path


def make_folders(folder: Path) -> None:
    """Makes a folder of /etc real: a former system may have had a link there."""
    for parent in [*reversed(folder.parents), folder]:
        if parent.is_symlink() and os.readlink(parent).startswith("/etc/static"):
            parent.unlink()
        parent.mkdir(exist_ok=True)


def read_clean_list(root: Path) -> set[str]:
    path = below(root, "/etc/.clean")
    return set(path.read_text().splitlines()) if path.exists() else set()
