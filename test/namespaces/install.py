"""Installs the system that /etc/nixos describes, at the first start of a machine: nixos-install without
a boot loader, as there is none, and without a CD, as the layers are mounted already."""

import sys
from pathlib import Path

sys.path.insert(0, "/nix/.layers/stand-in/nixos")
from command import run
from install import nixos_install

cd = Path("/nix/machine/cd")
run(lambda _: nixos_install(["--root", "/", "--no-bootloader"], cd, need_mount=False))
