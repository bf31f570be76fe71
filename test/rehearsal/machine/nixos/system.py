"""A system in the store, made from an evaluated configuration: /etc, programs, kernel, init."""

import hashlib
import json
import shutil
from pathlib import Path

from layers import LAYERS, OWN, Failure, find_program, read_list
from store import below, link, link_packages, store_path, write

# Of each unit that is NixOS' own: what it is restarted (or reloaded) for when it changes.
TRIGGERS = {
    "sshd.service": ("Restart", ["/etc/ssh/sshd_config"]),
    "systemd-networkd.service": ("Restart", ["/etc/systemd/networkd.conf"]),
    "systemd-sysctl.service": ("Restart", ["/etc/sysctl.d/60-nixos.conf"]),
    "systemd-modules-load.service": ("Restart", ["/etc/modules-load.d/nixos.conf"]),
}
WANTS = {
    "multi-user.target": ["sshd.service"],
    "network-online.target": ["systemd-networkd-wait-online.service"],
}


def build(spec: dict, root: Path, release: str, kernel: Path, ramdisk: Path, say=print) -> Path:
    """Makes the system below `root` and returns its path in the store.

    release: of NixOS, which is built the same whatever it is.
    kernel, ramdisk: files below root's store. The same configuration gives the same path.
    """
    if spec.get("firewall"):
        raise Failure("error: the stand-in has no firewall: networking.firewall.enable")
    made = link_packages(root, spec["store"])
    etc = build_etc(spec, root, release)

    content = json.dumps([spec, str(etc), str(kernel), str(ramdisk), release], sort_keys=True)
    system = store_path(f"nixos-system-{spec['hostName']}-{release}.stand-in", content)
    folder = below(root, system)
    if not folder.exists():
        made += [etc, system]
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        link(etc / "etc", partial / "etc")
        link(kernel, partial / "kernel")
        link(ramdisk, partial / "initrd")
        link_programs(spec, partial / "sw/bin")
        write(partial / "spec.json", json.dumps(spec, indent=1, sort_keys=True))
        write(partial / "kernel-params", " ".join(spec["kernelParams"]))
        write(partial / "nixos-version", f"{release}.stand-in")
        # What a running system must not replace. Here each release has another D-Bus.
        write(partial / "switch-inhibitors", json.dumps({"dbus-implementation": f"dbus of {release}"}))
        link(OWN / "stage-2.sh", partial / "init")
        link(OWN / "bin/switch-to-configuration", partial / "bin/switch-to-configuration")
        partial.rename(folder)
    for path in made:
        say(f"building '{path}.drv'...")
    return system


def link_programs(spec: dict, folder: Path) -> None:
    """What is on the PATH: NixOS' own programs, and the configuration's packages."""
    for name in read_list(OWN / "tools/required.list"):
        program = find_program(name)
        if program:
            link(program, folder / name)
    for tool in sorted((OWN / "bin").iterdir()):
        if tool.name.startswith(("nix-", "nixos-")):
            link(tool, folder / tool.name)
    packages = {package["package"]: path for path, package in spec["store"].items()}
    for package in spec["systemPackages"]:
        path = packages[package]
        for name in spec["store"][path]["bin"]:
            if find_program(name, package):
                link(f"{path}/bin/{name}", folder / name)


def build_etc(spec: dict, root: Path, release: str) -> Path:
    """The folder in the store that /etc/static leads to: Debian's and our base, then the
    configuration's files over them."""
    files = {path: file for path, file in spec["files"].items() if path.startswith("/etc/")}
    for path, file in spec["files"].items():
        if path not in files:
            write(below(root, path), file["text"], 0o444)

    text = json.dumps([files, spec["wants"], spec["requires"], spec["certificateFiles"], release])
    certificates = certificate_bundle(spec)
    etc = store_path("etc", text + hashlib.sha256(certificates.encode()).hexdigest())
    if below(root, etc).exists():
        return etc
    partial = below(root, etc).with_name(f".{etc.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tree = partial / "etc"
    for base in (LAYERS / "debian/etc", OWN / "etc"):
        if base.exists():
            shutil.copytree(base, tree, symlinks=True, dirs_exist_ok=True)
    for path, file in files.items():
        target = below(partial, path)
        target.unlink(missing_ok=True)
        if "link" in file:
            link(file["link"], target)
        else:
            write(target, file["text"], int(file["mode"], 8))
    for name in ("ca-bundle.crt", "ca-certificates.crt"):
        write(tree / "ssl/certs" / name, certificates)
    variables = "".join(f"export {name}='{value}'\n" for name, value in spec["sessionVariables"].items())
    write(tree / "session-variables", variables)
    units = tree / "systemd/system"
    add_own_units(spec, units)
    for kind, targets in (("wants", [WANTS, spec["wants"]]), ("requires", [spec["requires"]])):
        for target, names in ((t, n) for table in targets for t, n in table.items()):
            for name in names:
                link(f"../{name}", units / f"{target}.{kind}" / name)
    partial.rename(below(root, etc))
    return etc


def add_own_units(spec: dict, units: Path) -> None:
    """NixOS' units: sshd from a template, and for all the triggers that a switch looks at."""
    openssh = next(path for path, package in spec["store"].items() if package["package"] == "openssh")
    for template in (OWN / "units").iterdir():
        write(units / template.name, template.read_text().replace("@openssh@", openssh))
    for unit, (kind, paths) in TRIGGERS.items():
        texts = json.dumps([spec["files"].get(path, {}).get("text") for path in paths])
        trigger = store_path(f"X-{kind}-Triggers-{unit.split('.')[0]}", texts)
        write(units / f"{unit}.d/overrides.conf", f"[Unit]\nX-{kind}-Triggers={trigger}\n")
    networks = {p: f for p, f in spec["files"].items() if p.startswith("/etc/systemd/network/")}
    trigger = store_path("X-Reload-Triggers-systemd-networkd", json.dumps(networks, sort_keys=True))
    overrides = units / "systemd-networkd.service.d/overrides.conf"
    write(overrides, f"{overrides.read_text()}X-Reload-Triggers={trigger}\n")


def certificate_bundle(spec: dict) -> str:
    """Debian's authorities, and those of the configuration."""
    debian = LAYERS / "debian/etc/ssl/certs/ca-certificates.crt"
    parts = [debian] if debian.exists() else []
    return "".join(path.read_text() for path in parts + [Path(p) for p in spec["certificateFiles"]])
