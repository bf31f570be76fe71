"""nixos-install: puts the system that /mnt/etc/nixos/configuration.nix describes on /mnt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from activation import activate
from bootloader import install_boot_loader
from channel import ADDRESS, fetch, write_channels
from evaluation import evaluate
from generations import add
from layers import IN_TEST, LAYERS, OWN, Failure, find_program
from store import STORE, below, write
from system import build

CD = Path("/iso")


class Options:
    """The command line, with the options of the real one that make sense here."""

    def __init__(self, words: list[str]):
        self.root = Path("/mnt")
        self.channel = self.boot_loader = True
        words = list(words)
        while words:
            word = words.pop(0)
            if word == "--root" and words:
                self.root = Path(words.pop(0))
            elif word == "--no-channel-copy":
                self.channel = False
            elif word == "--no-bootloader":
                self.boot_loader = False
            elif word not in ("--no-root-passwd", "--no-root-password", "--show-trace", "-v"):
                raise Failure(f"nixos-install: unknown option `{word}'")


def nixos_install(words: list[str], cd: Path = CD, need_mount: bool = True) -> None:
    """Raises Failure before it has written anything when the configuration or /mnt is not right,
    and when the boot loader cannot be installed."""
    options = Options(words)
    root = options.root
    if not root.is_dir():
        raise Failure(f"mount point {root} doesn't exist")
    if need_mount and not os.path.ismount(root):
        raise Failure(f"error: {root} is not a mount point; the machine's memory has no room for a system")
    check_permissions(root)

    configuration = root / "etc/nixos/configuration.nix"
    say(f"building the configuration in {configuration}...")
    spec = evaluate(configuration)
    ask_binary_cache()
    kernel, ramdisk = copy_boot_files(cd, root)
    copy_layers(cd, root)
    if "/etc/systemd/system/containerd.service" in spec["files"]:
        copy_images(root)
    release = (OWN / "release").read_text().strip()
    system = build(spec, root, release, kernel, ramdisk, say)
    if options.channel:
        say("copying channel...")
        fetch(release, root)
    add(system, root)
    write(root / "etc/NIXOS", "")

    if options.boot_loader:
        say("installing the boot loader...")
    activate(system, root, say)
    write_channels(root, {"nixos": f"{ADDRESS}{release}"})
    if options.boot_loader:
        install_boot_loader(root, say)
    say("installation finished!")


def check_permissions(root: Path) -> None:
    """The real one builds as another user, who has to get to the mount point."""
    for path in [root, *root.parents]:
        mode = path.stat().st_mode & 0o777
        if mode & 0o005 != 0o005:
            raise Failure(f"path {path} should have permissions 755, but had permissions {mode:o}. Consider running 'chmod o+rx {path}'.")


def ask_binary_cache() -> None:
    """The real one has to reach the cache. This one needs nothing of it, and asks behind a proxy
    only, as elsewhere there may be no internet."""
    if IN_TEST or not os.environ.get("https_proxy"):
        return
    url = "https://cache.nixos.org/nix-cache-info"
    trust = os.environ.get("NIX_SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    curl = [str(find_program("curl")), "--fail", "--silent", "--show-error", "--max-time", "120"]
    answer = subprocess.run([*curl, "--cacert", trust, url], capture_output=True, text=True)
    if answer.returncode != 0:
        raise Failure(f"error: unable to download '{url}': {answer.stderr.strip()}")


def copy_boot_files(cd: Path, root: Path) -> tuple[Path, Path]:
    """Kernel and ramdisk of the CD, to the same store paths on the disk."""
    found = []
    for name in ("bzImage", "initrd"):
        source = next((cd / "boot/nix/store").glob(f"*/{name}"))
        path = STORE / source.parent.name / name
        say(f"copying path '{path.parent}' from 'file://{cd}'...")
        below(root, path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, below(root, path))
        found.append(path)
    return found[0], found[1]


def copy_layers(cd: Path, root: Path) -> None:
    """All but the images of containers, which no machine needs as a layer."""
    folder = root / "nix/.images"
    folder.mkdir(parents=True, exist_ok=True)
    for layer in sorted((cd / "layers").glob("*.squashfs")):
        if layer.stem == "images":
            continue
        say(f"copying path '/nix/.images/{layer.name}' from 'file://{cd}'...")
        partial = folder / f".{layer.name}.partial"
        shutil.copyfile(layer, partial)
        partial.rename(folder / layer.name)


def copy_images(root: Path) -> None:
    """containerd's folder with images that other machines pull from a registry, unpacked."""
    store = LAYERS / "images/store"
    if not store.exists():
        return
    say(f"copying path '/var/lib/containerd' from 'file://{store}'...")
    target = root / "var/lib/containerd"
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([str(find_program("cp")), "-a", f"{store}/.", str(target)], check=True)


def say(text: str) -> None:
    # To stderr as the real one's progress, and at once: it is watched.
    print(text, file=sys.stderr, flush=True)
