"""The `meddanet` command. Nothing heavy is imported before the arguments are read.

Results go to stdout, messages and progress to stderr. Exit code 0 only if everything was done,
2 for a usage error, 1 otherwise.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from jsonargparse import Namespace

from .arguments import UsageError, error_line, parse_command, train_config
from .version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    # nibabel prints a line of its own before it raises
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
    stdout = sys.stdout
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _say(f"meddanet: warning: {message}", sys.stderr)
        try:
            options = parse_command(argv)
            code = COMMANDS[options.command](options[options.command])
            return code if sys.stdout is stdout else 1
        except UsageError as error:
            _complain(error)
            return 2
        except (
            ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError
        ) as error:
            _complain(error)
        except KeyboardInterrupt:
            if argv is None:
                # the process ends as soon as the case at hand is written; again is no sooner
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _complain("interrupted")
        finally:
            sys.stdout = stdout
    return 1


def _complain(error: object) -> None:
    _say(error_line(error), sys.stderr)


def _say(line: str, stream: TextIO | None = None) -> None:
    """Prints one line, above the progress bar if there is one.

    Where nobody reads on, the command ends; where stdout has no room, it goes on without.
    """
    from tqdm import tqdm

    stream = stream or sys.stdout
    try:
        tqdm.write(line, file=stream)
        stream.flush()
    except BrokenPipeError as error:
        _discard(stream)
        raise SystemExit(1) from error
    except OSError as error:
        shown = stream is sys.stdout
        _discard(stream)
        if shown:
            _complain(f"standard output: cannot be written ({error.strerror}); redirect it "
                      "elsewhere, or make room on the disk")


def _discard(stream: TextIO) -> None:
    """Sends what a stream still holds nowhere; another stdout then tells `main` of the loss."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())  # a ValueError if it is no file
    if stream is sys.stdout:
        sys.stdout = io.StringIO()


def _demo(options: Namespace) -> int:
    from .cases import output_folder
    from .cohort import segment_case
    from .data import find_cases
    from .data.phantom import write_phantom
    from .evaluation import compare
    from .pairs import find_pairs
    from .predictor import VolumePredictor
    from .weights import load_model

    out = output_folder(options.out)
    predictor = VolumePredictor(load_model())
    _say(_running_on(predictor), sys.stderr)
    _say("generating a phantom case ...", sys.stderr)
    folder = write_phantom(out, seed=options.seed, name=f"phantom_{options.seed:03d}")
    case = find_cases(folder)[0]
    _say("segmenting it ...", sys.stderr)
    report = segment_case(case, predictor, out, weights="brats2021", preview=True)
    labels = out / f"{case.name}.nii.gz"
    _say(_summary(report))
    _say(f"against the phantom's truth: {_score_line(compare(find_pairs(labels, folder)[0]))}")
    for what, ending in (("labels", ".nii.gz"), ("picture", ".png"), ("report", ".json")):
        _say(f"{what:8} {out / case.name}{ending}")
    _say(f"{'input':8} {folder}")
    return 0


def _segment(options: Namespace) -> int:
    from .cases import ReadAhead, gather_cases, is_finished, output_folder

    out = output_folder(options.out)
    cases, errors = gather_cases(options.inputs)
    for error in errors:
        _complain(error)
    pending = [
        case for case in cases if options.overwrite or not is_finished(case, out, options.preview)
    ]
    if len(pending) < len(cases):
        _say(f"{len(cases) - len(pending)} finished before, skipped (see --overwrite)", sys.stderr)
    failed = 0
    if pending:
        # the first case is read while PyTorch is imported
        with ReadAhead(pending, out, _modalities(options), options.overwrite) as readings:
            failed = _segment_all(readings, len(pending), out, options)
    return 1 if errors or failed else 0


def _segment_all(readings: Any, count: int, out: Path, options: Namespace) -> int:
    """Segments `count` cases with one model; returns how many failed."""
    from tqdm import tqdm

    from .cohort import segment_cases
    from .predictor import VolumePredictor
    from .weights import load_model

    model = load_model(options.weights)
    predictor = VolumePredictor(
        model, options.device, options.window, options.labels, options.executor
    )
    _say(_running_on(predictor), sys.stderr)
    outcomes = segment_cases(
        readings, predictor, out, weights=options.weights, preview=options.preview
    )
    failed = 0
    for case, outcome in tqdm(
        outcomes, desc="segment", unit="case", total=count, disable=None
    ):
        if isinstance(outcome, Exception):
            _complain(outcome if case.name in str(outcome) else f"{case.name}: {outcome}")
            failed += 1
        else:
            _say(f"{out / case.name}.nii.gz  {_summary(outcome)}")
    if count > 1:
        _say(f"{count - failed} of {count} cases done", sys.stderr)
    return failed


def _modalities(options: Namespace) -> tuple[str, ...] | None:
    return tuple(options.modalities.split(",")) if options.modalities else None


def _running_on(predictor: Any) -> str:
    """What runs the networks, and why nothing faster does."""
    import torch

    engine, place = predictor.engine, predictor.device
    where = f"{torch.get_num_threads()} threads" if place.type == "cpu" else str(place)
    reason = f"; {engine.passed_over}" if engine.passed_over else ""
    if engine.executor == "triton":
        reason += (
            "; kernels that neither this installation nor Triton's cache holds are compiled at the "
            "first volume, which takes longer (see meddanet info --kernels)"
        )
    return f"running on {engine.executor}, {where}{reason}"


def _summary(report: dict) -> str:
    routes = ", ".join(f"{count} {route}" for route, count in report["decisions"].items())
    share, seconds = report["share_of_static"]["mac"], report["seconds"]["file_to_file"]
    return f"{routes}; {share:.1%} of the static multiply-adds; {seconds:.1f} s"


def _train(options: Namespace) -> int:
    from .training import train

    if options.resume and not (Path(options.out) / "config.json").is_file():
        raise ValueError(f"{options.out}: holds no run to resume; start one without --resume")
    path = train(train_config(options))
    if int(os.environ.get("RANK", "0")) == 0:
        _say(str(path))
    return 0


def _evaluate(options: Namespace) -> int:
    from .evaluation import check_groups, json_ready, mean_scores, parse_groups, write_csv
    from .metrics import check_tolerance
    from .pairs import find_pairs, unpaired
    from .report import write_json

    # what is wrong with the arguments is said before all cases are read
    check_tolerance(options.tolerance)
    groups = parse_groups(options.groups) if options.groups else None
    pairs = find_pairs(options.predictions, options.references)
    _check_targets(options, [path for pair in pairs for path in (pair.prediction, pair.reference)])
    if groups:
        check_groups(groups, pairs)
    alone = unpaired(pairs, options.predictions, options.references)
    _report_unpaired(alone, options.predictions)
    table = _score_all(pairs, groups, options)
    if not table:
        return 1
    failed = [pair.name for pair in pairs if pair.name not in table]
    missing = sorted([*alone["without_prediction"], *failed])
    total = len(table) + len(missing)
    mean = mean_scores(table)
    _say(f"mean of {len(table)} of {total} cases  {_score_line(mean)}")
    written = True
    if options.json:
        content = {
            "mean": json_ready(mean), "scored": len(table), "expected": total,
            "empty_rule": options.empty, "tolerance_mm": options.tolerance, **alone,
            "failed": failed, "cases": json_ready(table),
        }
        written &= _tried(write_json, content, Path(options.json))
    if options.csv:
        written &= _tried(write_csv, table, Path(options.csv), missing)
    return 1 if missing or not written else 0


def _tried(write: Callable[..., None], *arguments: Any) -> bool:
    """Writes a file and tells whether that went well; what is written after it is not lost."""
    try:
        write(*arguments)
    except (ValueError, OSError) as error:
        _complain(error)
        return False
    return True


def _report_unpaired(alone: dict[str, list[str]], predictions: str) -> None:
    from .evaluation import listed

    if names := alone["without_reference"]:
        _say(f"{len(names)} without reference: {listed(names)}", sys.stderr)
    if names := alone["without_prediction"]:
        _complain(
            f"{predictions}: holds no prediction of {listed(names)}; "
            "segment these too, the mean is over the others"
        )


def _score_all(pairs: list[Any], groups: Any, options: Namespace) -> dict[str, Any]:
    """Prints and returns the scores of the pairs; what is wrong with one does not stop others."""
    from .evaluation import compare

    table = {}
    for pair in pairs:
        try:
            table[pair.name] = compare(
                pair, options.labels, groups=groups, tolerance=options.tolerance,
                empty=options.empty,
            )
            _say(f"{pair.name}  {_score_line(table[pair.name])}")
        except (ValueError, OSError, MemoryError) as error:
            _complain(error)
    return table


def _score_line(scores: dict[str, dict[str, float]]) -> str:
    parts = ["Dice", *(f"{region} {value:.4f}" for region, value in scores["dice"].items())]
    if "hd95_mm" in scores:
        parts += [" HD95", *(f"{r} {value:.2f}" for r, value in scores["hd95_mm"].items()), "mm"]
        agreement = scores["surface_dice"].items()
        parts += [" surface", *(f"{region} {value:.4f}" for region, value in agreement)]
    volumes = zip(scores["volume_ml"].items(), scores["reference_ml"].values(), strict=True)
    parts += [" ml", *(f"{region} {value:.1f}/{truth:.1f}" for (region, value), truth in volumes)]
    return " ".join(parts)


def _bench(options: Namespace) -> int:
    import tempfile

    from .bench import bench_volume, check_rounds, render
    from .data import load_volume
    from .data.phantom import write_phantom
    from .data.sources import as_case, unnamed_channels
    from .report import write_json
    from .weights import load_model

    # what is wrong with the arguments is said before a minute of work
    check_rounds(options.rounds)
    case = as_case(options.case) if options.case else None
    _check_targets(options, case.paths if case else [])
    model = load_model(options.weights)
    with tempfile.TemporaryDirectory() as folder:
        case = case or as_case(write_phantom(Path(folder), seed=0))
        volume = load_volume(case, unnamed_channels(case, _modalities(options)))
    _say(f"timing {volume.name}, {options.rounds} rounds ...", sys.stderr)
    result = bench_volume(model, volume, options.device, options.executor, options.rounds)
    _say(f"{result['case']} on {result['machine']['processor']}, {result['device']}, "
         f"executor {result['executor']}, {result['machine']['threads']} threads")
    _say(render(result))
    if options.json:
        write_json(result, Path(options.json))
    return 0


def _check_targets(options: Namespace, inputs: Sequence[Path]) -> None:
    """Raises ValueError unless --json and --csv, if given, can be written and are no input."""
    from .data.conventions import stem

    # a report beside a label file tells what its labels mean, a dataset.json what channels are
    read = {path.with_name(f"{stem(path)}.json").resolve() for path in inputs}
    for kind in ("json", "csv"):
        target = options.get(kind)
        if target is None:
            continue
        path = Path(target)
        if path.suffix.lower() != f".{kind}":
            raise ValueError(f"--{kind} {path}: expected a name that ends in .{kind}")
        if path.resolve() in read or path.name == "dataset.json":
            raise ValueError(f"--{kind} {path}: is the name of an input; name another file")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(
                f"{path}: cannot be written, expected a file in a folder that is writable"
            )


def _info(options: Namespace) -> int:
    if options.cost:
        return _info_cost(options.cost, options.size)
    if options.kernels or options.build is not None:
        return _info_kernels(options.build)
    import platform

    import torch

    from .weights import pretrained_names

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _say(f"meddanet  {__version__}")
    _say(f"python    {platform.python_version()} on {platform.platform()}")
    _say(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    _say(f"gpu       {', '.join(gpus) or 'none'}")
    _say(f"weights   {', '.join(pretrained_names()) or 'none'}")
    return 0


def _info_cost(name: str, size: int) -> int:
    from .build import MODELS, build_segmenter
    from .cost import cost_tables
    from .weights import load_model, pretrained_names

    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    model: Any
    if name in MODELS:
        model = MODELS[name]()
    elif name in pretrained_names() or name.endswith(".safetensors"):
        model = load_model(name)
    else:
        try:
            model = build_segmenter(name)
        except ValueError as error:
            others = ", ".join((*MODELS, *pretrained_names()))
            raise ValueError(f"{error}, {others}, or a .safetensors file") from error
    for convention, table in cost_tables(model, (1, model.in_channels, size, size)).items():
        counted = "true multiply-adds" if convention == "mac" else "as the papers count"
        _say(f"{name}, one slice of {size}x{size}, {counted}\n{table.render()}\n")
    return 0


def _info_kernels(archs: str | None) -> int:
    from tqdm import tqdm

    from .kernels.aot import build, listing, parse_archs

    if archs is not None:
        wanted = parse_archs(archs)
        with tqdm(desc="compile", unit="kernel", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            folder = build(wanted, progress=progress)
        _say(f"compiled into {folder}", sys.stderr)
    lines = listing()
    for line in lines:
        _say(line)
    if not lines:
        _say("none precompiled: kernels compile on first use")
        _say("meddanet info --kernels --build 8.6,8.9 compiles them for these architectures")
    return 0


COMMANDS = {
    "demo": _demo, "segment": _segment, "train": _train, "evaluate": _evaluate, "info": _info,
    "bench": _bench,
}
