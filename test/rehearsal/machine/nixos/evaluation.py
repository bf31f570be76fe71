"""A configuration as data, by the real nix-instantiate and the evaluator beside it."""

import json
import platform
import subprocess
from pathlib import Path

from layers import EVALUATOR, NIX_INSTANTIATE, Failure

# What has to be different in a machine made of namespaces; test/namespaces/differences.mts.
DIFFERENCES = Path("/nix/machine/differences.json")


def evaluate(configuration: Path) -> dict:
    """The system that the configuration describes; its fields are listed in system.nix.

    Raises Failure with what nix-instantiate said.
    """
    if not configuration.exists():
        raise Failure(f"configuration file {configuration} doesn't exist")
    command = [NIX_INSTANTIATE]
    # The dummy store needs no Nix daemon and no rights; evaluation alone writes nothing.
    command += ["--store", "dummy://", "--eval", "--strict", "--json", str(EVALUATOR)]
    command += ["--argstr", "configuration", str(configuration)]
    command += ["--argstr", "system", f"{platform.machine()}-linux"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(done.stderr.strip())
    spec = json.loads(done.stdout)
    for difference in json.loads(DIFFERENCES.read_text()) if DIFFERENCES.exists() else []:
        apply(difference, spec["files"])
    return spec


def apply(difference: dict, files: dict) -> None:
    """In each file whose path ends so: values of its JSON, or a text in place of another."""
    for path, file in files.items():
        if not path.endswith(difference.get("file", "/no file")):
            continue
        if "json" in difference:
            file["text"] = json.dumps(json.loads(file["text"]) | difference["json"])
        elif difference["find"] in file["text"]:
            file["text"] = file["text"].replace(difference["find"], difference["replace"])
        else:
            raise Failure(f"{path} has no {difference['find']}")
