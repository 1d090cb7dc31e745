"""`python -m meddanet` and `meddanet` are one command, which Ctrl-C ends in one line.

What it takes half a second to import is imported here, where an interrupt is caught.
"""

import sys


def start() -> None:
    """Runs the process's own command and ends the process."""
    try:
        from .cli import entry

        entry()
    except KeyboardInterrupt:
        # what says it otherwise may not be there yet
        if sys.stderr is not None:
            print("meddanet: error: interrupted", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    start()
