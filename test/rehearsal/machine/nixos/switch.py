"""switch-to-configuration: from the running system to another one, touching only the units whose
files have changed."""

import fcntl
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from activation import activate
from bootloader import install_boot_loader
from layers import Failure
from units import differ, read_unit, says

CURRENT = Path("/run/current-system")
# Pull in whatever the new system wants and the old one did not.
TARGETS = ["multi-user.target", "sockets.target", "timers.target"]
# Changes here are for the next boot.
UNTOUCHED = {"sysinit.target", "basic.target", *TARGETS}


@dataclass
class Plan:
    stop: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    restart: list[str] = field(default_factory=list)
    reload: list[str] = field(default_factory=list)
    skip: list[str] = field(default_factory=list)


def plan(old: Path, new: Path, active: list[str]) -> Plan:
    """What has to happen to the active units, given the unit folders of two systems."""
    result = Plan()
    for name in sorted(active):
        before, after = read_unit(old, name), read_unit(new, name)
        if before is None or name in UNTOUCHED:
            continue
        if after is None:
            if says(before, "X-StopOnRemoval", True):
                result.stop.append(name)
            continue
        change = differ(before, after)
        if change == "same":
            continue
        if change == "reload" or says(after, "X-ReloadIfChanged", False):
            result.reload.append(name)
        elif not says(after, "X-RestartIfChanged", True) or says(after, "RefuseManualStop", False):
            result.skip.append(name)
        elif not says(after, "X-StopIfChanged", True):
            result.restart.append(name)
        else:
            # Stopped while its old files are there, started when the new ones are.
            result.stop.append(name)
            result.start.append(name)
    return result


def switch_to_configuration(system: Path, action: str) -> int:
    """action: switch, boot, test or dry-activate. Returns the exit status: 0, 1 when only a restart
    may bring the system up, or 4 when units failed."""
    if action not in ("switch", "boot", "test", "dry-activate"):
        raise Failure(f"Usage: {system}/bin/switch-to-configuration [switch|boot|test|dry-activate]")
    if action in ("switch", "test") and not may_replace(CURRENT, system):
        return 1
    Path("/run/nixos").mkdir(exist_ok=True)
    with open("/run/nixos/switch-to-configuration.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Failure("Could not acquire lock") from None
        if action in ("switch", "boot"):
            install_boot_loader(Path("/"))
        return 0 if action == "boot" else apply(system, dry=action == "dry-activate")


def may_replace(old: Path, new: Path) -> bool:
    """NixOS 26.05's pre-switch check: no D-Bus is replaced under a running system."""
    before, after = (json.loads((folder / "switch-inhibitors").read_text()) for folder in (old, new))
    changed = [f"{name}: {before.get(name)} -> {after[name]}" for name in after if before.get(name) != after[name]]
    if changed:
        say("There are changes to critical components of the system:")
        for line in changed:
            say(f"    {line}")
        say("Pre-switch check 'switchInhibitors' failed")
    return not changed


def apply(system: Path, dry: bool) -> int:
    folder = "etc/systemd/system"
    was_active = active_units()
    todo = plan(CURRENT / folder, system / folder, was_active)
    would = "would " if dry else ""
    tell(f"{would}stop" if dry else "stopping", todo.stop)
    tell("NOT restarting", todo.skip)
    if dry:
        say("would activate the configuration...")
        for verb in ("reload", "restart", "start"):
            tell(f"would {verb}", getattr(todo, verb))
        return 0
    if todo.stop:
        systemctl("stop", *todo.stop)
    say("activating the configuration...")
    activate(system, say=say)
    systemctl("daemon-reload")
    say("restarting sysinit-reactivation.target")
    systemctl("restart", "sysinit-reactivation.target")
    for verb, names in (("reload", todo.reload), ("restart", todo.restart), ("start", todo.start)):
        tell(f"{verb}ing", names)
        if names:
            systemctl(verb, *names)
    systemctl("start", *TARGETS)

    now = active_units()
    tell("the following new units were started", sorted(set(now) - set(was_active) - set(todo.start)), "")
    # A service that fails at once and is to be restarted is "activating" between two attempts.
    failed = units_in("failed") + auto_restarting()
    if failed:
        tell("warning: the following units failed", failed, "")
        subprocess.run(["systemctl", "status", "--no-pager", "--full", "--lines=10", *failed])
        return 4
    return 0


def active_units() -> list[str]:
    return units_in("active,activating,reloading")


def units_in(states: str) -> list[str]:
    command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--full", f"--state={states}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]


def auto_restarting() -> list[str]:
    command = ["systemctl", "list-units", "--plain", "--no-legend", "--full", "--type=service"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [row[0] for row in rows if len(row) > 3 and row[3] == "auto-restart"]


def systemctl(*words: str) -> None:
    """What fails is found afterwards, by the units' states."""
    subprocess.run(["systemctl", *words])


def tell(what: str, names: list[str], suffix: str = " the following units") -> None:
    if names:
        say(f"{what}{suffix}: {', '.join(names)}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
