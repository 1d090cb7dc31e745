"""Numbers of a configuration within what they can be."""

from __future__ import annotations

from collections.abc import Callable


def check_numbers(config: object, **bounds: tuple[str, ...]) -> None:
    """Sees that the named fields are numbers within bounds; None passes.

    Args:
        config: Whose fields.
        **bounds: Names of fields that are "positive", "whole" (0, 1, ...), "counted" (1, 2, ...),
            "not_negative" or a "share" (0 to 1).

    Raises:
        ValueError: If one is not; it is named.
    """
    for kind, names in bounds.items():
        expected, holds = _BOUNDS[kind]
        for name in names:
            value = getattr(config, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and holds(value)):
                raise ValueError(f"{name} is {value!r}, expected {expected}")


_BOUNDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "positive": ("more than 0", lambda value: 0 < value < float("inf")),
    "not_negative": ("0 or more", lambda value: 0 <= value < float("inf")),
    "whole": ("a whole number, 0 or more", lambda value: isinstance(value, int) and value >= 0),
    "counted": ("a whole number, 1 or more", lambda value: isinstance(value, int) and value >= 1),
    "share": ("0 to 1", lambda value: 0 <= value <= 1),
}
