"""What the benchmarks of whole volumes share: cases, agreement, and where the numbers go."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from timing import environment

from meddanet.cases import ReadAhead
from meddanet.cohort import segment_cases
from meddanet.data import Case, find_cases
from meddanet.data.phantom import write_phantom
from meddanet.machine import machine
from meddanet.metrics import dice_score
from meddanet.predictor import VolumePredictor

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "brats2021"
RESULTS = Path(__file__).parent / "results"
HELD_OUT = ("BraTS2021_00000", "BraTS2021_00024", "BraTS2021_01480")


def cases(folder: Path) -> list[Case]:
    """Returns the real cases that no shipped weight has seen, or a phantom written to `folder`."""
    real = [DATA / name for name in HELD_OUT if (DATA / name).is_dir()]
    return [find_cases(path)[0] for path in real or [write_phantom(folder)]]


def folder_run(cohort: list[Case], out: Path, predictor: VolumePredictor) -> None:
    """Segments cases from files to files, as `meddanet segment` does; an error ends it."""
    with ReadAhead(cohort, out) as readings:
        for _, outcome in segment_cases(readings, predictor, weights="brats2021"):
            assert isinstance(outcome, dict), outcome


def lesion_dice(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the Dice score of two label maps' lesions, all classes together."""
    return round(float(dice_score(np.asarray(first) > 0, np.asarray(second) > 0)), 4)


def label_dice(first: np.ndarray, second: np.ndarray) -> float:
    """Returns a Dice score of two label maps in which only voxels of the same class overlap."""
    first, second = np.asarray(first), np.asarray(second)
    same, both = ((first == second) & (first > 0)).sum(), (first > 0).sum() + (second > 0).sum()
    # two maps without a lesion agree
    return round(float(2 * same / both), 4) if both else 1.0


def write_results(level: str, content: dict) -> Path:
    """Puts one level's numbers, and when and of what they are, into the JSON of this machine.

    Returns:
        Its path.
    """
    facts = machine()
    # processors of one name differ in their instructions
    names = (str(facts[key]).lower() for key in ("processor", "capability"))
    kind = "_".join(re.sub(r"\W+", "-", name).strip("-") for name in names)
    path = RESULTS / f"cpu_{kind}_{facts['threads']}threads.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[level] = {"machine": facts, "environment": environment(), **content}
    path.write_text(json.dumps(known, indent=2) + "\n")
    return path
