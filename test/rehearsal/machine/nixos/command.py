"""How the commands end: a Failure is told without a trace."""

import os
import sys
from typing import Callable

from layers import Failure


def run(command: Callable[[list[str]], None]) -> None:
    sys.stdout.reconfigure(line_buffering=True)
    os.umask(0o022)
    try:
        command(sys.argv[1:])
    except Failure as failure:
        print(failure, file=sys.stderr)
        sys.exit(1)
