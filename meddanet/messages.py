"""What commands say: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from .arguments import error_line, printable


def prepare_streams() -> None:
    """Has closed streams be as /dev/null, and stdout take every file's name.

    What its encoding lacks is escaped, as it is on stderr.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # it gets the closed number, which the next file, a scan or a result, would get
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, it stays open
    # another rule, such as a locale's surrogateescape, is somebody's choice
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def complain(error: object) -> None:
    """Says on stderr, in one line, what went wrong."""
    say(error_line(error), sys.stderr)


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints one line, above the progress bar if there is one; what could forge others is escaped.

    Where nobody reads on, the command ends; where stdout has no room, it goes on without.
    """
    from tqdm import tqdm

    stream = stream or sys.stdout
    try:
        tqdm.write(printable(line), file=stream)
        stream.flush()
    except BrokenPipeError as error:
        _discard(stream)
        raise SystemExit(1) from error
    except OSError as error:
        shown = stream is sys.stdout
        _discard(stream)
        if shown:
            complain(f"standard output: cannot be written ({error.strerror}); redirect it "
                     "elsewhere, or make room on the disk")


def say_lines(text: str) -> None:
    """Prints a text of several lines on stdout."""
    for line in text.split("\n"):
        say(line)


def _discard(stream: TextIO) -> None:
    """Sends what a stream still holds nowhere; another stdout then tells `main` of the loss."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())  # a ValueError if it is no file
    if stream is sys.stdout:
        sys.stdout = io.StringIO()
