"""`meddanet demo`: a synthetic case, segmented and scored."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from ..cases import output_folder
from ..cohort import segment_case
from ..data import find_cases
from ..data.phantom import write_phantom
from ..evaluation import compare
from ..messages import say
from ..pairs import find_pairs
from ..predictor import VolumePredictor
from ..weights import load_model
from .evaluate import score_line
from .segment import running_on, summary


def run(options: Namespace) -> int:
    """Makes a case, segments it, scores the labels and says where everything is."""
    out = output_folder(options.out)
    predictor = VolumePredictor(load_model())
    say(running_on(predictor), sys.stderr)
    say("generating a phantom case ...", sys.stderr)
    folder = write_phantom(out, seed=options.seed, name=f"phantom_{options.seed:03d}")
    case = find_cases(folder)[0]
    say("segmenting it ...", sys.stderr)
    report = segment_case(case, predictor, out, weights="brats2021", preview=True)
    labels = out / f"{case.name}.nii.gz"
    say(summary(report))
    say(f"against the phantom's truth: {score_line(compare(find_pairs(labels, folder)[0]))}")
    for what, ending in (("labels", ".nii.gz"), ("picture", ".png"), ("report", ".json")):
        say(f"{what:8} {out / case.name}{ending}")
    say(f"{'input':8} {folder}")
    return 0
