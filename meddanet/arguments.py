"""What the `meddanet` command understands. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader
from jsonargparse.typing import restricted_string_type

from .recipe import AugmentConfig, DecisionConfig, PhaseConfig, TrainConfig
from .schedules import RECIPES, recipe_settings
from .version import __version__

# `data.LABELS` has the meanings; importing it would cost more than showing the help
EXECUTORS = ("auto", "openvino", "torch", "triton", "eager")
LABEL_CONVENTIONS = ("brats2021", "brats2023", "msd")
Device = restricted_string_type("Device", r"^(auto|cpu|cuda(:\d+)?)$")


_read_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    """Reads YAML, but nothing that jsonargparse would import, nor aliases, which explode.

    Raises:
        ValueError: If it names a class, or repeats a part by an alias.
    """
    if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("aliases (*name) are not read; write the values out")
    if _names_a_class(value := _read_yaml(text)):
        raise ValueError("class_path is no option: nothing is imported that a file names")
    return value


def _names_a_class(value: object) -> bool:
    if isinstance(value, dict):
        return "class_path" in value or any(map(_names_a_class, value.values()))
    return isinstance(value, list) and any(map(_names_a_class, value))


set_loader("yaml", _load, exceptions=(yaml.YAMLError, ValueError))


def printable(text: str) -> str:
    """Returns a line with control characters, which could hide or forge others, escaped.

    Bytes of names that are no text stay: the stream's own rule says what becomes of them.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or "\udc80" <= c <= "\udcff" else c.encode("unicode_escape").decode()
        for c in text
    )


def error_line(error: object) -> str:
    """Returns what stderr says of an error, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        text = f"not enough memory ({text})" if text else "not enough memory"
    return printable(f"meddanet: error: {text or type(error).__name__}")


class UsageError(ValueError):
    """Reports arguments that the command does not have; the exit code is 2."""


class _Parser(ArgumentParser):
    """Reports a usage error in one line."""

    def __init__(self, *args: Any, prog: str = "meddanet", **kwargs: Any) -> None:
        # jsonargparse makes parsers of nested options, which would be named after sys.argv[0]
        super().__init__(*args, prog=prog, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser, needs = self, "the following arguments are required: "
        if message.startswith(needs) and "." in message:
            # jsonargparse names what a command lacks as it is stored: segment.out
            lacking = [name.split(".") for name in message.removeprefix(needs).split(", ")]
            commands: Any = next(a.choices for a in self._actions if a.dest == "command")
            parser = commands[lacking[0][0]]
            message = needs + ", ".join(_as_typed(parser, dest) for _, dest in lacking)
        command = parser.prog.replace(" [options]", "")
        print(error_line(f"{message} (see {command} --help)"), file=sys.stderr)
        raise SystemExit(2) from ex


def _as_typed(parser: ArgumentParser, dest: str) -> str:
    """Returns what a user types for an argument: -o/--out, INPUT."""
    action = next(action for action in parser._actions if action.dest == dest)
    return "/".join(action.option_strings) or str(action.metavar)


def parse_command(arguments: Sequence[str] | None = None) -> Namespace:
    """Parses a command line, by default the process's own.

    Raises:
        UsageError: If it changes a field within the list of phases.
        SystemExit: After any other usage error, told on stderr, and after help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = command_parser(_asked_recipe(arguments)).parse_args(arguments)
    # jsonargparse would take it for a field of the last phase
    within = next((text for text in arguments if text.startswith("--phases.")), None)
    if within is not None:
        raise UsageError(
            f"{within.split('=')[0]}: phases are given as one list, by --phases '[{{objective: "
            "static, steps: 100}, ...]' or in a file by --config, which --print-config writes "
            "(see meddanet train --help)"
        )
    return options


def command_parser(recipe: str = "meddanet") -> ArgumentParser:
    """Returns the parser of the whole command; training has the defaults of a recipe."""
    parser = _Parser(
        description="Segments volumes slice by slice, each only as closely as it needs.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", parser_class=_Parser)
    commands.add_subcommand("demo", _demo_parser(), help="segment a generated phantom")
    commands.add_subcommand("segment", _segment_parser(), help="write label maps of volumes")
    commands.add_subcommand("train", _train_parser(recipe), help="train on labelled cases")
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
    _add_model(parser)
    parser.add_argument("--preview", action="store_true", help="write a picture of each case")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="redo finished cases, and replace files in OUT that meddanet did not write",
    )
    return parser


def _add_model(parser: ArgumentParser) -> None:
    """Adds the weights, and what tells their channels in the input."""
    parser.add_argument(
        "--modalities", help="channels in file order where names do not tell: flair,t1ce,t1,t2"
    )
    parser.add_argument(
        "--weights", default="brats2021", help="name of shipped weights, or .safetensors file"
    )


def _train_parser(recipe: str) -> ArgumentParser:
    parser = _Parser(
        description="Trains Med-DANet V2, or V1, on a folder of labelled cases.",
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="YAML or JSON file of these options")
    parser.add_argument(
        "--recipe", choices=RECIPES, default=recipe,
        help="defaults by name: phases and, of the papers, augmentation, networks and crop",
    )
    parser.add_class_arguments(TrainConfig, skip={"phases", "baseline", "modalities"})
    for action in parser._actions:
        # as options and files write it
        action.help = (action.help or "").replace("None =", "null =") or None
    # a class of their own would merge two lists field by field
    parser.add_argument(
        "--phases", type=list[dict[str, Any]],
        help="what is trained, in this order, a finished phase is not repeated; [{objective: "
        "static, steps: 100, ...}, ...], the fields are those of meddanet.recipe.PhaseConfig",
    )
    parser.add_argument(
        "--baseline", type=dict[str, Any] | None,
        help="a plain segmenter trained beside, to compare with: such a phase; it continues the "
        "first phases `static`, so that both have those in common. null = none",
    )
    parser.add_argument(
        "--modalities", type=list[str] | str | None,
        help="what the channels are, in file order, where the naming does not tell: flair,t1ce",
    )
    parser.add_argument(
        "--resume", action="store_true",
        help="go on where the run in OUT stands; the same happens without, this wants one there",
    )
    settings = recipe_settings(recipe)
    # as plain values, which --print-config can write down
    plain = json.loads(json.dumps(asdict(TrainConfig("", "", **settings))))
    parser.set_defaults({name: plain[name] for name in ("baseline", *settings)})
    return parser


def _asked_recipe(arguments: Sequence[str]) -> str:
    """Returns the recipe that options, or the files among them, name last."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--recipe", action="append", dest="asked")
    parser.add_argument("--config", action="append", dest="asked", type=Path)
    recipe = "meddanet"
    for asked in parser.parse_known_args(arguments)[0].asked or []:
        if isinstance(asked, Path):
            try:
                content = _load(asked.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue  # the command's own parser says what is wrong
            asked = content.get("recipe") if isinstance(content, dict) else None
        recipe = asked if isinstance(asked, str) and asked in RECIPES else recipe
    return recipe


def listed_names(text: str) -> list[str]:
    """Reads names that are separated by commas, with or without spaces."""
    return [name.strip() for name in text.split(",")]


def train_config(options: Namespace) -> TrainConfig:
    """Returns the run that the options of `meddanet train` ask for.

    Raises:
        UsageError: If a phase has an unknown field, or lacks one.
        ValueError: If a value is none that training takes; it is named.
    """
    values = options.as_dict()
    for name in ("config", "resume", "recipe"):
        del values[name]
    values["phases"] = [
        _phase(f"phases.{number}", phase) for number, phase in enumerate(values["phases"])
    ]
    if values["baseline"] is not None:
        values["baseline"] = _phase("baseline", values["baseline"])
    if isinstance(values["modalities"], str):
        values["modalities"] = listed_names(values["modalities"])
    values["decision"] = DecisionConfig(**values["decision"])
    values["augment"] = AugmentConfig(**values["augment"])
    return TrainConfig(**values)


def _phase(name: str, values: dict[str, Any]) -> PhaseConfig:
    """Returns a phase; errors say which one it is."""
    known = [field.name for field in fields(PhaseConfig)]
    if strange := sorted(set(values) - set(known)):
        raise UsageError(f"{name}.{strange[0]} is unknown, expected some of {', '.join(known)}")
    for needed in ("objective", "steps"):
        if needed not in values:
            raise UsageError(f"{name} has no {needed}")
    for field, kind in (("objective", str), ("parts", list), ("stay", list)):
        if not isinstance(values.get(field, kind()), kind):
            what = "a name" if kind is str else "a list"
            raise UsageError(f"{name}.{field} is {values[field]!r}, expected {what}")
    try:
        return PhaseConfig(**values)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


def _evaluate_parser() -> ArgumentParser:
    parser = _Parser(
        description="Prints Dice, 95th percentile Hausdorff distance and surface Dice "
        "(with the extra train) and volumes, found / true, of whole tumour, tumour core and "
        "enhancing tumour or of any groups of labels, per case and on average."
    )
    parser.add_argument("predictions", metavar="PRED", help="folder of <case>.nii.gz, or a file")
    parser.add_argument("references", metavar="REF", help="folder of labelled cases, or a file")
    parser.add_argument(
        "--labels", choices=LABEL_CONVENTIONS, help="convention of label files that tell none"
    )
    parser.add_argument(
        "--prediction-labels", choices=LABEL_CONVENTIONS,
        help="convention of predictions that tell none, default the reference's",
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
    _add_model(parser)
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is timed")
    parser.add_argument("--json", help="also write everything here, machine and versions included")
    return parser


def _info_parser() -> ArgumentParser:
    parser = _Parser(
        description="Shows versions, devices and weights, what weights say of themselves, what a "
        "model costs, or which GPU kernels are compiled ahead of time."
    )
    parser.add_argument(
        "--weights", metavar="NAME",
        help="say what shipped weights, or a file of one's own, take and were trained on",
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
