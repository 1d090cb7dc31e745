"""What the `meddanet` command understands. Nothing heavy is imported here."""

from __future__ import annotations

import sys
from argparse import Action
from dataclasses import asdict
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import restricted_string_type

from .recipe import (
    PAPERS_AUGMENTATION,
    RECIPES,
    AugmentConfig,
    DecisionConfig,
    PhaseConfig,
    TrainConfig,
)
from .version import __version__

# `data.LABELS` has the meanings; importing it would cost more than showing the help
EXECUTORS = ("auto", "openvino", "torch", "triton", "eager")
LABEL_CONVENTIONS = ("brats2021", "brats2023", "msd")
Device = restricted_string_type("Device", r"^(auto|cpu|cuda(:\d+)?)$")


def error_line(error: object) -> str:
    """Returns what stderr says of an error, in one line."""
    return f"meddanet: error: {' '.join(str(error).split())}"


class _Parser(ArgumentParser):
    """Reports a usage error in one line."""

    def __init__(self, *args: Any, prog: str = "meddanet", **kwargs: Any) -> None:
        # jsonargparse makes parsers of nested options, which would be named after sys.argv[0]
        super().__init__(*args, prog=prog, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = self.prog.replace(" [options]", "")
        print(error_line(f"{message} (see {command} --help)"), file=sys.stderr)
        raise SystemExit(2) from ex


def command_parser() -> ArgumentParser:
    """Returns the parser of the whole command."""
    parser = _Parser(
        description="Segments volumes slice by slice, each only as closely as it needs.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", parser_class=_Parser)
    commands.add_subcommand("demo", _demo_parser(), help="segment a generated phantom")
    commands.add_subcommand("segment", _segment_parser(), help="write label maps of volumes")
    commands.add_subcommand("train", _train_parser(), help="train on labelled cases")
    commands.add_subcommand("evaluate", _evaluate_parser(), help="compare with references")
    commands.add_subcommand("info", _info_parser(), help="versions, devices, weights, costs")
    commands.add_subcommand("bench", _bench_parser(), help="time this machine on one case")
    return parser


def _demo_parser() -> ArgumentParser:
    parser = _Parser(description="Generates a phantom case, segments it, tells how well.")
    parser.add_argument("-o", "--out", default="demo", help="folder for everything it makes")
    parser.add_argument("--seed", type=int, default=0, help="which phantom")
    return parser


def _segment_parser() -> ArgumentParser:
    parser = _Parser(description="Segments cases; cases that are finished in OUT are skipped.")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="case folder, folder of cases, image file, or named files: flair=a.nii.gz t1=b.nii.gz",
    )
    parser.add_argument("-o", "--out", required=True, help="folder for the results")
    parser.add_argument("--device", type=Device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--executor", choices=EXECUTORS, default="auto",
        help="what runs the networks: openvino (extra `cpu`), torch, triton (a GPU's), eager",
    )
    parser.add_argument(
        "--window", type=int, help="decide per window of this side (128: the papers' protocol)"
    )
    parser.add_argument(
        "--labels", choices=LABEL_CONVENTIONS, help="label convention, default the input's"
    )
    parser.add_argument(
        "--modalities", help="channels in file order where names do not tell: flair,t1ce,t1,t2"
    )
    parser.add_argument(
        "--weights", default="brats2021", help="name of shipped weights, or .safetensors file"
    )
    parser.add_argument("--preview", action="store_true", help="write a picture of each case")
    parser.add_argument("--overwrite", action="store_true", help="redo finished cases")
    return parser


def _train_parser() -> ArgumentParser:
    parser = _Parser(
        description="Trains Med-DANet V2, or V1, on a folder of labelled cases.",
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="YAML or JSON file of these options")
    parser.add_class_arguments(TrainConfig)
    # as plain values, which --print-config can write down
    parser.set_defaults({"phases": [asdict(phase) for phase in RECIPES["meddanet"]()]})
    parser.add_argument(
        "--recipe", action=_Recipe, choices=RECIPES, help="phases by name (default: meddanet)"
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="go on where the run in OUT stands; the same happens without, this wants one there",
    )
    return parser


def train_config(options: Namespace) -> TrainConfig:
    """Returns the run that the options of `meddanet train` ask for."""
    values = options.as_dict()
    for name in ("config", "resume"):
        del values[name]
    recipe = values.pop("recipe")
    values["phases"] = [PhaseConfig(**phase) for phase in values["phases"]]
    if recipe is not None and values["phases"] == TrainConfig("", "").phases:
        # named in a file; the option itself has put the phases in place
        values["phases"] = RECIPES[recipe]()
        if recipe != "meddanet":
            for name, value in _PAPERS.items():
                if values[name] == getattr(TrainConfig("", ""), name):
                    values[name] = value
            if values["augment"] == asdict(AugmentConfig()):
                values["augment"] = asdict(PAPERS_AUGMENTATION)
    if values["baseline"] is not None:
        values["baseline"] = PhaseConfig(**values["baseline"])
    values["decision"] = DecisionConfig(**values["decision"])
    values["augment"] = AugmentConfig(**values["augment"])
    return TrainConfig(**values)


# beside their augmentation
_PAPERS = {"position_network": None, "crop_sizes": (96,)}


class _Recipe(Action):
    """Puts a named schedule in place; with the papers' go their augmentation and networks."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        namespace["phases"] = [asdict(phase) for phase in RECIPES[values]()]
        if values != "meddanet":
            for name, value in asdict(PAPERS_AUGMENTATION).items():
                namespace[f"augment.{name}"] = value
            for name, value in _PAPERS.items():
                namespace[name] = value


def _evaluate_parser() -> ArgumentParser:
    parser = _Parser(
        description="Prints Dice, 95th percentile Hausdorff distance and surface Dice (with edt "
        "installed) and volumes, found / true, of whole tumour, tumour core and enhancing tumour "
        "or of any groups of labels, per case and on average."
    )
    parser.add_argument("predictions", metavar="PRED", help="folder of <case>.nii.gz, or a file")
    parser.add_argument("references", metavar="REF", help="folder of labelled cases, or a file")
    parser.add_argument(
        "--labels", choices=LABEL_CONVENTIONS, help="convention of label files that tell none"
    )
    parser.add_argument("--groups", help="regions by label values of the files: WT=1,2,4;TC=1,4")
    parser.add_argument(
        "--tolerance", type=float, default=1.0, help="of the surface Dice, in mm"
    )
    parser.add_argument(
        "--empty", choices=("brats", "nan"), default="brats",
        help="structures in neither file and in one of them score: brats, Dice 1 and 0, HD95 0 and "
        "373.13; nan, Dice nan (which means leave out) and 0, HD95 nan and inf",
    )
    parser.add_argument("--json", help="also write the table here")
    parser.add_argument("--csv", help="also write the table here")
    return parser


def _bench_parser() -> ArgumentParser:
    parser = _Parser(
        description="Times the engine against the static network of the same weights, eager and "
        "compiled, in turns, and prints the ratios."
    )
    parser.add_argument("case", nargs="?", help="case folder or image file, default a phantom")
    parser.add_argument("--device", type=Device, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--executor", choices=EXECUTORS, default="auto", help="as for segment")
    parser.add_argument(
        "--weights", default="brats2021", help="name of shipped weights, or .safetensors file"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed")
    parser.add_argument("--json", help="also write everything here, machine and versions included")
    return parser


def _info_parser() -> ArgumentParser:
    parser = _Parser(
        description="Shows versions, devices and weights, what a model costs, or which GPU kernels "
        "are compiled ahead of time."
    )
    parser.add_argument(
        "--cost", metavar="NAME",
        help="a segmenter, med-danet, med-danet-v2, or weights (name or file)",
    )
    parser.add_argument("--size", type=int, default=240, help="side of the slice in pixels")
    parser.add_argument("--kernels", action="store_true", help="list precompiled GPU kernels")
    parser.add_argument(
        "--build", metavar="ARCHS",
        help="with --kernels: first compile them for these CUDA architectures, such as 8.6,8.9",
    )
    return parser
