"""systemd-boot on the ESP, with an entry for each generation, laid out as NixOS does it."""

import json
import os
import platform
import shutil
from datetime import datetime, timezone
from pathlib import Path

from generations import current, generations
from layers import LAYERS, Failure
from store import below, write

ARCH = {"x86_64": "x64", "aarch64": "aa64"}[platform.machine()]
# boot.loader.systemd-boot.configurationLimit is not among what the evaluator tells.
KEPT_GENERATIONS = 5


def install_boot_loader(root: Path, say=print) -> None:
    """Puts systemd-boot, kernels, ramdisks and entries on the ESP at /boot.

    Raises Failure when /boot is no ESP, as bootctl does.
    """
    if Path("/run/host/container-manager").exists():
        return
    boot = below(root, "/boot")
    check_esp(boot)
    loader = LAYERS / f"debian/usr/lib/systemd/boot/efi/systemd-boot{ARCH}.efi"
    for target in (f"EFI/systemd/systemd-boot{ARCH}.efi", f"EFI/BOOT/BOOT{ARCH.upper()}.EFI"):
        copy(loader, boot / target)
        say(f'Copied "{loader}" to "{boot / target}".')

    kept = dict(list(generations(root).items())[-KEPT_GENERATIONS:])
    needed = set()
    entries = {}
    for number, system in kept.items():
        folder = below(root, system)
        spec = json.loads((folder / "spec.json").read_text())
        files = {}
        for kind in ("kernel", "initrd"):
            source = Path(os.readlink(folder / kind))
            name = f"{source.parent.name}-{source.name}.efi"
            needed.add(name)
            files[kind] = f"/EFI/nixos/{name}"
            if not (boot / "EFI/nixos" / name).exists():
                copy(below(root, source), boot / "EFI/nixos" / name)
        entries[f"nixos-generation-{number}.conf"] = entry(number, system, spec, files, folder)
    for name, text in entries.items():
        write(boot / "loader/entries" / name, text)
    default = f"nixos-generation-{current(root)}.conf"
    write(boot / "loader/loader.conf", f"timeout 1\ndefault {default}\nconsole-mode keep\n")

    for path in (boot / "loader/entries").glob("nixos-generation-*.conf"):
        if path.name not in entries:
            path.unlink()
    for path in (boot / "EFI/nixos").iterdir():
        if path.name not in needed:
            path.unlink()
    os.sync()


def entry(number: int, system: Path, spec: dict, files: dict, folder: Path) -> str:
    """A boot loader specification entry. What NixOS' ramdisk knows from the configuration (the
    root file system, the drivers that it may load) stands on the kernel's command line here."""
    release = (folder / "nixos-version").read_text()
    root_fs = spec["fileSystems"]["/"]
    options = [
        f"init={system}/init",
        f"root={root_fs['device']}",
        f"rootfstype={root_fs['fsType']}",
        f"stage1.modules={','.join(spec['initrdModules'])}",
        # Costs a virtual machine without KVM a quarter of its speed, and protects nobody there.
        "mitigations=off",
        # The check fails where the host is too busy to emulate a timer on time, and then panics.
        "no_timer_check",
        "panic=5",
        *spec["kernelParams"],
    ]
    built = datetime.fromtimestamp(folder.stat().st_mtime, timezone.utc).date()
    return (
        "title NixOS\nsort-key nixos\n"
        f"version Generation {number} NixOS {release}, built on {built}\n"
        f"linux {files['kernel']}\ninitrd {files['initrd']}\noptions {' '.join(options)}\n"
    )


def check_esp(boot: Path) -> None:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    types = [fields[2] for fields in mounts if fields[1] == str(boot)]
    if not types:
        raise Failure(f'Couldn\'t find EFI system partition: "{boot}" is not a mount point.')
    if types[-1] != "vfat":
        raise Failure(f'File system "{boot}" is not a FAT EFI System Partition (ESP) file system.')


def copy(source: Path, target: Path) -> None:
    """A whole file or none: the ESP is what a machine starts from."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, beside)
    os.replace(beside, target)
