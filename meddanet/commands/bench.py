"""`meddanet bench`: the engine against static networks, on one case."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from jsonargparse import Namespace

from ..bench import bench_volume, check_rounds, render
from ..data import load_volume
from ..data.phantom import write_phantom
from ..data.sources import as_case, unnamed_channels
from ..data.storage import write_json
from ..heap import keep_freed_memory
from ..messages import say, say_lines
from ..weights import load_model
from .options import channel_names, check_targets


def run(options: Namespace) -> int:
    """Times one case and says the ratios."""
    # what is wrong with the arguments is said before a minute of work
    check_rounds(options.rounds)
    if options.case == "":
        raise ValueError("the case is empty; name a folder or a file, or leave it out")
    case = as_case(options.case) if options.case else None
    check_targets(options, case.paths if case else [])
    # maps that PyTorch asks the system for anew would slow its networks, not the engine
    keep_freed_memory()
    model = load_model(options.weights)
    with tempfile.TemporaryDirectory() as folder:
        case = case or as_case(write_phantom(Path(folder), seed=0))
        volume = load_volume(case, unnamed_channels(case, channel_names(options)))
    say(f"timing {volume.name}, {options.rounds} rounds ...", sys.stderr)
    result = bench_volume(
        model, volume, options.device, options.executor, options.rounds,
        tell=lambda line: say(f"{line} ...", sys.stderr),
    )
    say(f"{result['case']} on {result['machine']['processor']}, {result['device']}, "
        f"executor {result['executor']}, {result['machine']['threads']} threads")
    say_lines(render(result))
    if options.json:
        write_json(result, Path(options.json))
    return 0
