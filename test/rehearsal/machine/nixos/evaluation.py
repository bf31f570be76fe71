"""A configuration as data, by the real nix-instantiate and the evaluator beside it."""

import json
import platform
import subprocess
from pathlib import Path

from layers import EVALUATOR, NIX_INSTANTIATE, Failure


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
    return json.loads(done.stdout)
