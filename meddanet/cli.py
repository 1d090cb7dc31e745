"""The `meddanet` command. Nothing heavy is imported before the arguments are read.

Results go to stdout, messages and progress to stderr. Exit code 0 only if everything was done,
2 for a usage error, 1 otherwise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from .recipe import TrainConfig
from .version import __version__

if TYPE_CHECKING:
    from .data import Case
    from .predictor import VolumePredictor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(argv)
    try:
        return COMMANDS[options.command](options[options.command])
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _complain(error)
        return 1
    except KeyboardInterrupt:
        print("meddanet: interrupted", file=sys.stderr)
        return 130


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="meddanet", description="Segments volumes slice by slice, skipping what holds nothing.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")

    demo = ArgumentParser(description="Generates a phantom case and segments it.")
    demo.add_argument("-o", "--out", default="demo", help="folder for everything it makes")
    demo.add_argument("--seed", type=int, default=0, help="which phantom")
    commands.add_subcommand("demo", demo, help="segment a generated phantom")

    segment = ArgumentParser(description="Segments cases, folders of cases or 4-D files.")
    segment.add_argument("inputs", nargs="+", help="case folder, folder of cases, or 4-D file")
    segment.add_argument("-o", "--out", required=True, help="folder for the results")
    segment.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    segment.add_argument(
        "--window", type=int, help="decide per window of this side (128: the papers' protocol)"
    )
    segment.add_argument("--labels", help="label convention: brats2021, brats2023 or msd")
    segment.add_argument("--weights", default="brats2021", help="shipped name or .safetensors file")
    segment.add_argument("--preview", action="store_true", help="write a picture of each case")
    segment.add_argument("--overwrite", action="store_true", help="redo finished cases")
    commands.add_subcommand("segment", segment, help="write label maps of volumes")

    train = ArgumentParser(description="Trains Med-DANet V2 on a folder of labelled cases.")
    train.add_argument("--config", action="config", help="YAML or JSON file of these options")
    train.add_class_arguments(TrainConfig)
    commands.add_subcommand("train", train, help="train on labelled cases")

    evaluate = ArgumentParser(description="Compares label maps with their references.")
    evaluate.add_argument("predictions", help="folder (or file) of label maps")
    evaluate.add_argument("references", help="folder of cases (or a label file)")
    evaluate.add_argument("--json", help="also write the table here")
    commands.add_subcommand("evaluate", evaluate, help="Dice per case and region")

    info = ArgumentParser(description="Shows versions, devices and weights, or what a model costs.")
    info.add_argument("--cost", help="a segmenter's name, or shipped weights")
    info.add_argument("--size", type=int, default=240, help="side of the slice in pixels")
    commands.add_subcommand("info", info, help="versions, devices, weights, costs")
    return parser


def _complain(error: object) -> None:
    line = " ".join(str(error).split())
    print(f"meddanet: error: {line}", file=sys.stderr)


# segment -------------------------------------------------------------------------------------


def _segment(options: Namespace) -> int:
    from .data import find_cases

    out = _output_folder(options.out)
    cases: list[Case] = []
    failed = 0
    for path in options.inputs:
        try:
            cases += find_cases(path)
        except ValueError as error:
            _complain(error)
            failed += 1
    pending = [case for case in cases if options.overwrite or not _finished(case, out, options)]
    if len(pending) < len(cases):
        print(f"{len(cases) - len(pending)} finished before, skipped", file=sys.stderr)
    return 1 if failed + _segment_all(pending, out, options) else 0


def _segment_all(cases: list[Case], out: Path, options: Namespace) -> int:
    """Segments the cases with one model; returns how many failed."""
    if not cases:
        return 0
    from tqdm import tqdm

    from .predictor import VolumePredictor
    from .weights import load_model

    predictor = VolumePredictor(
        load_model(options.weights), options.device, options.window, options.labels
    )
    failed = 0
    for case in tqdm(cases, desc="segment", unit="case", disable=None):
        try:
            print(_segment_case(case, predictor, out, options.preview), flush=True)
        except (ValueError, OSError) as error:
            _complain(error)
            failed += 1
    if len(cases) > 1:
        print(f"{len(cases) - failed} of {len(cases)} cases done", file=sys.stderr)
    return failed


def _segment_case(case: Case, predictor: VolumePredictor, out: Path, preview: bool) -> str:
    """Segments one case; returns its line for stdout."""
    from .data import load_volume, save_volume
    from .report import case_report, write_json, write_preview

    began = time.perf_counter()
    volume = load_volume(case)
    prediction = predictor.predict(volume)
    path = out / f"{case.name}.nii.gz"
    save_volume(prediction.labels, path, like=volume)
    seconds = time.perf_counter() - began
    if preview:
        write_preview(volume, prediction, out / f"{case.name}.png")
    report = case_report(volume, prediction, seconds)
    # last, because it marks the case as finished
    write_json(report, out / f"{case.name}.json")
    routes = ", ".join(f"{count} {route}" for route, count in report["decisions"].items())
    share = report["share_of_static"]["mac"]
    return f"{path}  {routes}; {share:.1%} of the static multiply-adds; {seconds:.1f} s"


def _finished(case: Case, out: Path, options: Namespace) -> bool:
    wanted = [".nii.gz", ".json", *([".png"] if options.preview else [])]
    return all((out / f"{case.name}{suffix}").is_file() for suffix in wanted)


def _output_folder(path: str) -> Path:
    """Creates the folder and tries to write in it, before any work is done."""
    from .data import VolumeError

    out = Path(path)
    probe = out / ".meddanet-write-test"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VolumeError(
            f"{out}: cannot write there ({error.strerror}); name another folder with -o"
        ) from error
    return out


# demo ----------------------------------------------------------------------------------------


def _demo(options: Namespace) -> int:
    from .data import find_cases, load_labels
    from .data.phantom import write_phantom
    from .metrics import dice_score
    from .predictor import VolumePredictor
    from .weights import load_model

    out = _output_folder(options.out)
    print("generating a phantom case ...", file=sys.stderr)
    folder = write_phantom(out, seed=options.seed, name=f"phantom_{options.seed:03d}")
    case = find_cases(folder)[0]
    print(_segment_case(case, VolumePredictor(load_model()), out, preview=True))
    labels = load_labels(out / f"{case.name}.nii.gz")
    dice = dice_score(labels, load_labels(case.label), labels=_regions("brats2021"))
    print("Dice against the phantom's truth: " + _one_line(dice))
    print(f"labels   {out / case.name}.nii.gz")
    print(f"picture  {out / case.name}.png")
    print(f"report   {out / case.name}.json")
    return 0


# evaluate ------------------------------------------------------------------------------------


def _regions(convention: str) -> dict[str, tuple[int, ...]]:
    from .data import LABELS

    values = LABELS[convention]
    return {"WT": tuple(values[k] for k in (1, 2, 3)), "TC": (values[1], values[3]), "ET": (values[3],)}


def _one_line(dice: dict[str, float]) -> str:
    return "  ".join(f"{region} {value:.4f}" for region, value in dice.items())


def _pairs(predictions: Path, references: Path) -> list[tuple[str, Path, Path]]:
    """Returns (name, prediction, reference); every reference must have its prediction."""
    from .data import VolumeError, find_cases

    if predictions.is_file():
        return [(predictions.name, predictions, references)]
    cases = [case for case in find_cases(references) if case.label is not None]
    pairs = [(case.name, predictions / f"{case.name}.nii.gz", case.label) for case in cases]
    found = [pair for pair in pairs if pair[1].is_file()]
    if not found:
        raise VolumeError(
            f"{predictions}: holds no <case>.nii.gz for any labelled case of {references}"
        )
    absent = [name for name, prediction, _ in pairs if not prediction.is_file()]
    if absent:
        print(f"no prediction for {', '.join(absent)}", file=sys.stderr)
    return found


def _evaluate(options: Namespace) -> int:
    from .data import detect_label_convention, find_cases, load_labels
    from .metrics import dice_score
    from .report import write_json

    table: dict[str, dict[str, float]] = {}
    references = Path(options.references)
    convention = "brats2021"
    if references.is_dir():
        convention = detect_label_convention(find_cases(references)[0])
    for name, prediction, reference in _pairs(Path(options.predictions), references):
        truth = load_labels(reference)
        table[name] = dice_score(load_labels(prediction), truth, labels=_regions(convention))
        print(f"{name}  {_one_line(table[name])}", flush=True)
    mean = {r: sum(row[r] for row in table.values()) / len(table) for r in _regions(convention)}
    print(f"mean of {len(table)}  {_one_line(mean)}")
    if options.json:
        write_json({"cases": table, "mean": mean, "empty": "brats"}, Path(options.json))
    return 0


# train, info ---------------------------------------------------------------------------------


def _train(options: Namespace) -> int:
    from .training import train

    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig, "recipe")
    values = {key: value for key, value in options.items() if key != "config"}
    recipe = parser.instantiate_classes(parser.parse_object({"recipe": Namespace(**values)}))
    print(train(recipe.recipe))
    return 0


def _info(options: Namespace) -> int:
    if options.cost:
        return _info_cost(options.cost, options.size)
    import platform

    import torch

    from .weights import pretrained_names

    print(f"meddanet  {__version__}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    print(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"gpu       {', '.join(gpus) or 'none'}")
    print(f"weights   {', '.join(pretrained_names()) or 'none'}")
    return 0


def _info_cost(name: str, size: int) -> int:
    from .build import build_segmenter
    from .cost import CONVENTIONS, cost_table
    from .weights import load_model, pretrained_names

    model = load_model(name) if name in pretrained_names() else build_segmenter(name)
    for convention in CONVENTIONS:
        counted = "true multiply-adds" if convention == "mac" else "as the papers count"
        print(f"{name}, one slice of {size}x{size}, {counted}")
        print(cost_table(model, (1, model.in_channels, size, size), convention).render())
        print()
    return 0


COMMANDS = {
    "demo": _demo, "segment": _segment, "train": _train, "evaluate": _evaluate, "info": _info,
}
