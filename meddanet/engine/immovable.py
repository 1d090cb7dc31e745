"""What stays in the process, and the object, that it was made as."""

from __future__ import annotations

from typing import NoReturn


class Immovable:
    """Mixin of engines: pickle and copy, which would fail at some lock inside, are refused."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an engine holds threads and cannot be pickled or copied; send the model and make an "
            "engine in each process"
        )
