"""Which weights there are, and what their files say of them; nothing here imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PRETRAINED = Path(__file__).parent / "pretrained"
ENDING = ".safetensors"


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


def read_facts(path: Path) -> dict[str, Any]:
    """Returns what a weights file says of its model.

    Raises:
        ValueError: If it is not one of ours.
    """
    with weight_errors(path), safe_open(path, framework="np") as file:
        return facts_in(file)


def facts_in(file: Any) -> dict[str, Any]:
    """Returns the facts of an open safetensors file."""
    return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


@contextmanager
def weight_errors(path: Path) -> Iterator[None]:
    """Turns what is wrong within a weights file into a ValueError that names it."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a meddanet weights file ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: is not a meddanet weights file (another program's facts are in it); expected "
            "one written by save_model"
        ) from error
