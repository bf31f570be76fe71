"""Users and groups: the configuration's and NixOS' own, and nobody else (mutableUsers = false)."""

import json
from pathlib import Path

from layers import OWN
from store import below, write

NOLOGIN = "/run/current-system/sw/bin/nologin"


def write_accounts(spec: dict, root: Path) -> None:
    """Writes passwd, group, shadow. Accounts without a number get one, from 999 down, and keep it:
    NixOS remembers them in /var/lib/nixos, also after the account is gone."""
    groups = dict(base_entries("group"))
    users = dict(base_entries("passwd"))
    gid_of = {name: int(fields[2]) for name, fields in groups.items()}
    uid_of = {name: int(fields[2]) for name, fields in users.items()}

    gid_of |= numbers(root, "gid-map", spec["groups"], "gid", set(gid_of.values()))
    for group in spec["groups"]:
        name = group["name"]
        groups[name] = [name, "x", str(gid_of[name]), groups.get(name, [""] * 4)[3]]

    uid_of |= numbers(root, "uid-map", spec["users"], "uid", set(uid_of.values()))
    passwords = {}
    for user in spec["users"]:
        name = user["name"]
        shell = user["shell"] or NOLOGIN
        passwords[name] = user["hashedPassword"] or "!"
        users[name] = [
            *(name, "x", str(uid_of[name]), str(gid_of[user["group"]])),
            *(user.get("description") or "", user["home"], shell),
        ]

    write(below(root, "/etc/group"), lines(groups))
    write(below(root, "/etc/passwd"), lines(users))
    shadow = {name: [name, passwords.get(name, "!"), "1", "", "", "", "", "", ""] for name in users}
    write(below(root, "/etc/shadow"), lines(shadow), 0o600)


def base_entries(file: str):
    for line in (OWN / "accounts" / file).read_text().splitlines():
        fields = line.split(":")
        yield fields[0], fields


def lines(entries: dict[str, list[str]]) -> str:
    ordered = sorted(entries.values(), key=lambda fields: (fields[0] != "root", fields[0]))
    return "".join(":".join(fields) + "\n" for fields in ordered)


def numbers(root: Path, file: str, entries: list[dict], key: str, taken: set[int]) -> dict[str, int]:
    """The number of each entry: its own, the remembered one, or the next free one below 1000."""
    path = below(root, "/var/lib/nixos") / file
    remembered = json.loads(path.read_text()) if path.exists() else {}
    given = {entry["name"]: entry[key] for entry in entries if entry[key] is not None}
    taken = taken | set(remembered.values()) | set(given.values())
    result = {}
    for entry in entries:
        name = entry["name"]
        number = given.get(name, remembered.get(name))
        if number is None:
            number = next(free for free in range(999, 399, -1) if free not in taken)
        taken.add(number)
        result[name] = number
    write(path, json.dumps(remembered | result, indent=1, sort_keys=True))
    return result


def owner_ids(root: Path, user: str, group: str) -> tuple[int, int]:
    """uid and gid by the files below root, as the names are not the running system's."""
    def number(file: str, name: str) -> int:
        for line in below(root, f"/etc/{file}").read_text().splitlines():
            fields = line.split(":")
            if fields[0] == name:
                return int(fields[2])
        raise KeyError(f"no {name} in /etc/{file}")

    return number("passwd", user), number("group", group)
