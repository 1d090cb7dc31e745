"""What the numbers in a label file mean, and how they become classes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np

from .conventions import MODALITIES, Case
from .volume import Volume, VolumeError

# class (1 necrotic core, 2 oedema, 3 enhancing tumour) -> value in the file
LABELS = {
    "brats2021": {1: 1, 2: 2, 3: 4},
    "brats2023": {1: 1, 2: 2, 3: 3},
    "msd": {1: 2, 2: 1, 3: 3},
}

# so many values are replaced one by one faster than by looking all of them up
_FEW = 4


def result_convention(
    asked: str | None, naming: str, modalities: Collection[str], trained: str
) -> str:
    """Returns the convention of a brain tumour's labels that are found in a case.

    Args:
        asked: Key of `LABELS`, or None.
        naming: That of the case, which may tell one; the Decathlon names ten tasks alike.
        modalities: Of the case.
        trained: The model's.
    """
    told = naming in LABELS and set(modalities) <= set(MODALITIES)
    return asked or (naming if told else trained)


def label_facts(
    convention: str | None,
    values: Mapping[Any, int] | None,
    modalities: Collection[str],
    num_classes: int,
) -> dict[str, Any]:
    """Returns what a model's classes are, in full: "label_convention", and "label_values" if any.

    Args:
        convention: Key of `LABELS`, "values", or None where nobody has told.
        values: Class -> value in label files, or None.
        modalities: Of the model, or of the volume where it has none.
        num_classes: Classes, background included.

    Raises:
        ValueError: If the convention is unknown, or a class has no value from 1 to 255.
    """
    classes = range(1, num_classes)
    if values is None and convention is None:
        brain = set(modalities) <= set(MODALITIES) and num_classes == 1 + len(LABELS["brats2021"])
        convention, values = ("brats2021", None) if brain else ("values", {k: k for k in classes})
    if values is None and convention in LABELS:
        if not set(classes) <= set(LABELS[convention]):
            raise ValueError(
                f"label convention {convention} has three classes, the model {len(classes)}; say "
                "by label_values of save_model which value each has"
            )
        return {"label_convention": convention}
    if values is None:
        _table(str(convention))
    expected = f"label_values are {values}, expected class -> value from 1 to 255"
    if not isinstance(values, Mapping):
        raise ValueError(expected)
    # JSON has no whole numbers as keys; what is no class of the model's is left out
    given = {str(k): value for k, value in values.items()}
    if missing := [k for k in classes if str(k) not in given]:
        raise ValueError(f"label_values {values} lack class {', '.join(map(str, missing))}")
    known = {k: given[str(k)] for k in classes}
    if not all(map(_is_byte, known.values())):
        raise ValueError(expected)
    return {
        "label_convention": "values", "label_values": {k: int(v) for k, v in known.items()}
    }


def _is_byte(value: object) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and 1 <= int(value) <= 255  # type: ignore[call-overload]  # it is whole


def to_classes(labels: np.ndarray, convention: str) -> np.ndarray:
    """Translates a label file's values to classes 0..3.

    Args:
        labels: Values of a label file, any shape.
        convention: Key of `LABELS`.

    Returns:
        uint8 of the same shape.

    Raises:
        VolumeError: If a value is not one of the convention's.
        ValueError: If the convention is unknown.
    """
    table = {value: index for index, value in _table(convention).items()}
    labels = _as_bytes(labels)
    _check_values(_present(labels), convention)
    return _look_up(labels, table)


def from_classes(classes: np.ndarray, convention: str | Mapping[int, int]) -> np.ndarray:
    """Translates classes, any shape, to the values of a label file, uint8.

    Args:
        classes: 0..3, or what the mapping knows; 0 stays 0.
        convention: Key of `LABELS`, or class -> value.

    Raises:
        ValueError: If a class has no value or the convention is unknown.
    """
    table = _table(convention) if isinstance(convention, str) else convention
    classes = _as_bytes(classes)
    without = set(range(1, int(classes.max(initial=0)) + 1)) - set(table)
    # few tables have gaps: only then all classes are looked at
    if without and (unknown := sorted(without & _present(classes))):
        raise ValueError(f"classes {unknown} have no value; expected 0 or one of {sorted(table)}")
    return _look_up(classes, table)


def detect_label_convention(case: Case | Volume, values: Iterable[int] = ()) -> str:
    """Returns the label convention of a brain tumour case, from its naming.

    Where the naming decides nothing (nnU-Net, named files), the values decide if only one
    convention has them all.

    Args:
        case: The case or the volume loaded from it.
        values: Values that occur in its label file, if there is one.

    Raises:
        VolumeError: If a value contradicts the naming, or nothing decides.
    """
    found = {int(value) for value in values} - {0}
    if case.modalities and not set(case.modalities) <= set(MODALITIES):
        raise VolumeError(
            f"{case.name}: modalities {', '.join(case.modalities)} have no brain tumour labels; "
            f"expected some of {', '.join(MODALITIES)}"
        )
    if case.convention in LABELS:
        _check_values(found, case.convention, case.name)
        return case.convention
    fitting = [name for name, table in LABELS.items() if found <= set(table.values())]
    if len(fitting) != 1:
        raise VolumeError(
            f"{case.name}: the names of its files do not tell the label convention; "
            f"choose one of {_choices(fitting or list(LABELS))}"
        )
    return fitting[0]


def _choices(conventions: list[str]) -> str:
    """Returns how each of some conventions is asked for."""
    maps = {
        name: {value: index for index, value in LABELS[name].items()} for name in conventions
    }
    spelt = " or ".join(f"--label_map '{table}' ({name})" for name, table in maps.items())
    return f"{', '.join(conventions)}: by --labels, in train by {spelt}"


def _table(convention: str) -> dict[int, int]:
    if convention not in LABELS:
        raise ValueError(f"label convention is {convention!r}, expected one of {', '.join(LABELS)}")
    return LABELS[convention]


def _as_bytes(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return array
    with np.errstate(invalid="ignore"):
        small = array.astype(np.uint8)
    if not np.array_equal(small, array):
        raise VolumeError("labels hold values that are not whole numbers from 0 to 255")
    return small


def _present(array: np.ndarray) -> set[int]:
    seen = np.zeros(256, bool)
    seen[array] = True
    return set(np.flatnonzero(seen).tolist()) - {0}


def _look_up(array: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    lookup = np.zeros(256, np.uint8)
    lookup[list(table)] = list(table.values())
    lookup[0] = 0
    changed = [value for value in range(1, int(array.max(initial=0)) + 1) if lookup[value] != value]
    if len(changed) > _FEW:
        return lookup[array]
    result = array.copy(order="K")
    for value in changed:
        np.copyto(result, lookup[value], where=array == value)
    return result


def _check_values(found: set[int], convention: str, name: str = "labels") -> None:
    expected = sorted(LABELS[convention].values())
    if not found - set(expected):
        return
    message = (
        f"{name}: values {sorted(found)} are not those of the {convention} convention {expected}"
    )
    if convention == "brats2021" and 3 in found:
        message += (
            "; enhancing tumour as 3 points to brats2023, or msd where 1 is oedema; choose one of "
            f"{_choices(['brats2023', 'msd'])}"
        )
    elif 4 in found:
        message += (
            "; 4 is enhancing tumour in brats2021 files, "
            "but the resection cavity in BraTS 2024 post-operative ones"
        )
    raise VolumeError(message)
