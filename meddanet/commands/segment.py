"""`meddanet segment`: label files of cases, folders of cases and image files."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm import tqdm

from ..cases import ReadAhead, gather_cases, output_folder
from ..data import Case, VolumeError
from ..data.lock import clear_leftovers
from ..data.sources import named_by_model
from ..finished import Request, is_finished, request
from ..messages import complain, say
from .options import channel_names


def run(options: Namespace) -> int:
    """Segments the cases that are not finished."""
    out = output_folder(options.out)
    clear_leftovers(out, days=1)
    asked = request(
        options.weights, window=options.window, labels=options.labels,
        modalities=channel_names(options), preview=options.preview,
    )
    cases, errors = gather_cases(options.inputs)
    if asked.modalities is None:
        cases = [named_by_model(case, asked.facts.get("modalities", ())) for case in cases]
    pending, refused = (cases, []) if options.overwrite else _pending(cases, out, asked)
    errors += refused
    for error in errors:
        complain(error)
    if finished := len(cases) - len(pending) - len(refused):
        say(f"{finished} finished before, skipped (see --overwrite)", sys.stderr)
    failed = 0
    if pending:
        # another process may finish cases of this folder meanwhile
        ask = None if options.overwrite else partial(is_finished, out=out, asked=asked)
        with ReadAhead(pending, out, asked.modalities, options.overwrite, ask) as readings:
            failed = _segment_all(readings, len(pending), options, asked)
    return 1 if errors or failed else 0


def _pending(
    cases: list[Case], out: Path, asked: Request
) -> tuple[list[Case], list[ValueError]]:
    """Returns the cases to segment, and why others are neither that nor finished."""
    pending: list[Case] = []
    refused: list[ValueError] = []
    for case in cases:
        try:
            if not is_finished(case, out, asked):
                pending.append(case)
        except VolumeError as error:
            refused.append(error)
    return pending, refused


def _segment_all(
    readings: ReadAhead, count: int, options: Namespace, asked: Request
) -> int:
    """Segments `count` cases with one model; returns how many failed."""
    # here, since they import PyTorch, beside which the first case is read
    from ..cohort import segment_cases
    from ..predictor import VolumePredictor
    from ..weights import load_model

    model = load_model(options.weights)
    predictor = VolumePredictor(
        model, options.device, options.window, options.labels, options.executor
    )
    say(running_on(predictor), sys.stderr)
    outcomes = segment_cases(
        readings, predictor, preview=asked.preview, asked=None if options.overwrite else asked,
        weights=asked.weights, weights_sha256=asked.weights_sha256, window=asked.window,
    )
    failed = 0
    progress = tqdm(outcomes, desc="segment", unit="case", total=count, disable=None)
    for case, outcome in progress:
        if isinstance(outcome, Exception):
            complain(outcome if case.name in str(outcome) else f"{case.name}: {outcome}")
            failed += 1
        else:
            say(f"{readings.out / case.name}.nii.gz  {summary(outcome)}")
    if count > 1:
        say(f"{count - failed} of {count} cases done", sys.stderr)
    return failed


def running_on(predictor: Any) -> str:
    """What runs the networks, and why nothing faster does."""
    import torch

    engine, place = predictor.engine, predictor.device
    where = f"{torch.get_num_threads()} threads" if place.type == "cpu" else str(place)
    reason = f"; {engine.passed_over}" if engine.passed_over else ""
    if engine.executor == "triton":
        reason += (
            "; kernels that neither this installation nor Triton's cache holds are compiled for "
            "the first volume, on all cores, which takes longer (see meddanet info --kernels)"
        )
    return f"running on {engine.executor}, {where}{reason}"


def summary(report: dict) -> str:
    """What became of a case, in a line."""
    routes = ", ".join(f"{count} {route}" for route, count in report["decisions"].items())
    share, seconds = report["share_of_static"]["mac"], report["seconds"]["file_to_file"]
    return f"{routes}; {share:.1%} of the static multiply-adds; {seconds:.1f} s"
