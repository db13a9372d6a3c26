"""The command line: the only place that prints.

Results go to stdout, one JSON object and nothing else with --json; progress, tables beside JSON,
and errors go to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 bad input file, 4 target
missed, 130 / 143 interrupted after a checkpoint.

torch and everything that imports it is imported inside the commands, so that --help is quick.
"""

from __future__ import annotations

import os
import sys

from rankprune.cli import compressing, deploying, training  # noqa: F401  (they add commands)
from rankprune.cli.shared import app, err, fail
from rankprune.errors import RankPruneError


def main() -> None:
    """Entry point; every error on purpose ends in one line and an exit code."""
    try:
        app()
    except RankPruneError as error:
        fail(error)
    except KeyboardInterrupt:
        err.print("interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:
        # the reader of our output has gone, as in `rankprune … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
