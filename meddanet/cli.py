"""The `meddanet` command. Nothing heavy is imported before the arguments are read.

Results go to stdout, messages and progress to stderr. Exit code 0 only if everything was done,
2 for a usage error, 1 otherwise.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from .arguments import UsageError, parse_command
from .messages import complain, prepare_streams, say

# commands that leave nothing to do when they return 0; training may have loggers and processes
_AT_ONCE = ("demo", "segment", "evaluate", "info")


def entry() -> NoReturn:
    """Runs the process's own command and ends the process, after success as it is.

    To take PyTorch apart takes half a second, for nobody.
    """
    prepare_streams()
    code = main()
    if code == 0 and sys.argv[1] in _AT_ONCE:
        with suppress(OSError):  # then Python's own end says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, by default the process's own, and returns its exit code."""
    stdout = sys.stdout
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(
            f"meddanet: warning: {' '.join(str(message).split())}", sys.stderr
        )
        try:
            options = parse_command(argv)
            command = import_module(f".commands.{options.command}", __package__)
            code = command.run(options[options.command])
            return code if sys.stdout is stdout else 1
        except UsageError as error:
            complain(error)
            return 2
        except (
            ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError
        ) as error:
            complain(error)
        except KeyboardInterrupt:
            if argv is None:
                # the process ends as soon as the case at hand is written; again is no sooner
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            complain("interrupted")
        finally:
            sys.stdout = stdout
    return 1
