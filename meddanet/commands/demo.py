"""`meddanet demo`: a synthetic case, segmented and scored."""

from __future__ import annotations

import gzip
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from jsonargparse import Namespace

from ..cases import output_folder
from ..cohort import segment_case
from ..data import VolumeError, find_cases
from ..data.phantom import write_phantom
from ..data.results import kept_result, result_paths
from ..data.storage import read_head
from ..evaluation import compare
from ..messages import say
from ..pairs import find_pairs
from ..predictor import VolumePredictor
from ..weights import load_model
from .evaluate import score_line
from .segment import running_on, summary


def run(options: Namespace) -> int:
    """Makes a case, segments it, scores the labels and says where everything is."""
    out, name = output_folder(options.out), f"phantom_{options.seed:03d}"
    kept = kept_result(result_paths(name, out))
    if foreign := [kept[0]] if kept else _foreign_files(out / name, options.seed):
        raise VolumeError(
            f"{foreign[0]}: is not as meddanet demo writes it; name another folder with -o"
        )
    predictor = VolumePredictor(load_model())
    say(running_on(predictor), sys.stderr)
    say("generating a phantom case ...", sys.stderr)
    folder = write_phantom(out, seed=options.seed, name=name)
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


def _foreign_files(folder: Path, seed: int) -> list[Path]:
    """Returns what lies where the phantom is to be written and is not of an earlier demo."""
    if not folder.is_dir():
        return [folder] if folder.exists() else []
    with tempfile.TemporaryDirectory() as place:
        phantom = write_phantom(Path(place), seed=seed, name=folder.name)
        # hidden files are the file manager's
        return [
            path for path in sorted(folder.glob("[!.]*"))
            if not _same_content(path, phantom / path.name)
        ]


def _same_content(path: Path, own: Path) -> bool:
    """Compares what was compressed: how that is done hangs on the machine."""
    if not own.exists():
        return False
    content = gzip.decompress(own.read_bytes())
    with suppress(VolumeError):
        return read_head(path, len(content) + 1) == content
    return False
