"""OpenVINO without its usage reports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_REPORTS = "openvino_telemetry"


@contextmanager
def unreported() -> Iterator[None]:
    """Lets OpenVINO be imported inside without a word to anybody.

    `import openvino` alone forks a process that reports the import to a server, unless the package
    that does so, which pip installs along, cannot be imported: then OpenVINO takes a stub of its
    own. Who has imported OpenVINO before has made that choice already.
    """
    hidden: dict[str, Any] = {} if _REPORTS in sys.modules else {_REPORTS: None}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
