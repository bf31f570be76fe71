"""Unit files of a system, and what a difference between two of them means to a switch."""

from pathlib import Path

# Differences in these say nothing about a running unit.
IGNORED = {
    "X-Reload-Triggers", "Description", "Documentation", "OnFailure", "OnSuccess",
    "OnFailureJobMode", "IgnoreOnIsolate", "StopWhenUnneeded", "RefuseManualStart",
    "RefuseManualStop", "AllowIsolate", "CollectMode", "SourcePath",
}

Unit = dict[str, dict[str, list[str]]]


def read_unit(folder: Path, name: str) -> Unit | None:
    """Sections, settings and their values of a unit and its drop-ins in the folder; None when it
    has neither."""
    paths = [folder / name] if (folder / name).exists() else []
    paths += sorted((folder / f"{name}.d").glob("*.conf"))
    if not paths:
        return None
    unit: Unit = {}
    for path in paths:
        section: dict[str, list[str]] = {}
        for line in path.read_text().replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("["):
                section = unit.setdefault(line.strip("[]"), {})
            elif "=" in line and line[0] not in "#;":
                key, value = line.split("=", 1)
                # An empty value takes back what stands before it.
                section[key] = section.get(key, []) + [value] if value else []
    return unit


def differ(old: Unit, new: Unit) -> str:
    """"same", "reload" or "restart"."""
    def relevant(unit: Unit) -> Unit:
        kept = {name: dict(section) for name, section in unit.items() if name != "Install"}
        for key in IGNORED:
            kept.get("Unit", {}).pop(key, None)
        return {name: section for name, section in kept.items() if section}

    if relevant(old) != relevant(new):
        return "restart"
    triggers = [unit.get("Unit", {}).get("X-Reload-Triggers") for unit in (old, new)]
    return "same" if triggers[0] == triggers[1] else "reload"


def says(unit: Unit, key: str, default: bool) -> bool:
    """A yes or no among NixOS' own settings (X-…) and systemd's, in any section."""
    for section in unit.values():
        if section.get(key):
            return section[key][-1].lower() in ("1", "yes", "true", "on")
    return default
