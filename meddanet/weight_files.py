"""Which weights there are, and what their files say of them; nothing here imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PRETRAINED = Path(__file__).parent / "pretrained"
ENDING = ".safetensors"
# facts: how many numbers of which kind, each above
_NUMBERS = {
    "window_hu": (2, int | float, -math.inf), "spacing_mm": (3, int | float, 0),
    "canvas": (2, int, 0), "centre": (2, int | float, -math.inf),
}
_TOO_LARGE = 2**31


def pretrained_names() -> list[str]:
    """Returns the names of the weights that came with the package."""
    return sorted(path.stem for path in PRETRAINED.glob(f"*{ENDING}"))


def locate(path_or_name: str | Path) -> Path:
    """Returns where weights lie, or raises ValueError if there are none."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = PRETRAINED / f"{path_or_name}{ENDING}"
    if path.name != str(path_or_name) or not shipped.is_file():
        names = ", ".join(pretrained_names()) or "none"
        raise ValueError(
            f"{path_or_name}: no such weights; expected a {ENDING} file or a name of shipped "
            f"weights ({names})"
        )
    return shipped


def check_facts(facts: Mapping[str, Any]) -> None:
    """Raises ValueError unless what the package goes by has the form that it reads."""
    for name, (count, kind, least) in _NUMBERS.items():
        given = facts.get(name)
        if given is not None and not _are_numbers(given, count, kind, least):
            what = "whole numbers" if kind is int else "numbers"
            bound = "" if least == -math.inf else f" above {least:g}"
            raise ValueError(f"{name} is {_short(given)}, expected {count} {what}{bound}")
    low, high = facts.get("window_hu") or (0, 1)
    if low >= high:
        raise ValueError(f"window_hu is {low}, {high}, expected the lower value first")
    names = facts.get("modalities") or []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"modalities are {_short(names)}, expected a list of names")
    convention = facts.get("label_convention")
    if convention is not None and not isinstance(convention, str):
        raise ValueError(f"label_convention is {_short(convention)}, expected a name")
    values = facts.get("label_values") or {}
    if not isinstance(values, Mapping):
        raise ValueError(f"label_values are {_short(values)}, expected class -> value")


def _short(given: Any) -> str:
    """Says a value in one line that is not too long."""
    text = " ".join(str(given).split())
    return text if len(text) < 80 else f"{text[:80]}..."


def _are_numbers(given: Any, count: int, kind: Any, least: float) -> bool:
    return isinstance(given, list | tuple) and len(given) == count and all(
        isinstance(number, kind) and not isinstance(number, bool) and least < number < _TOO_LARGE
        for number in given
    )


def read_facts(path: Path) -> dict[str, Any]:
    """Returns what a weights file says of its model.

    Raises:
        ValueError: If it is not one of ours.
    """
    with weight_errors(path), safe_open(path, framework="np") as file:
        return facts_in(file, path)


def facts_in(file: Any, path: Path) -> dict[str, Any]:
    """Returns the facts of an open safetensors file."""
    try:
        facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: is not a meddanet weights file (another program's facts are in it); expected "
            "one written by save_model"
        ) from error
    try:
        check_facts(facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; save it anew by save_model") from error
    return facts


@contextmanager
def weight_errors(path: Path) -> Iterator[None]:
    """Turns what is wrong within a weights file into a ValueError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a meddanet weights file ({error})") from error
