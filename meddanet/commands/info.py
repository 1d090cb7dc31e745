"""`meddanet info`: what is installed, what models cost, which kernels are compiled."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from tqdm import tqdm

from ..build import MODELS, build_segmenter
from ..cost import cost_tables
from ..data.results import digest
from ..kernels.aot import build, listing, parse_archs
from ..messages import say, say_lines
from ..version import __version__
from ..weight_files import locate, pretrained_names, read_facts
from ..weights import load_model


def run(options: Namespace) -> int:
    """Says what is asked for, by default what is installed."""
    if options.weights:
        return _info_weights(options.weights)
    if options.cost:
        return _info_cost(options.cost, options.size)
    if options.kernels or options.build is not None:
        return _info_kernels(options.build)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    say(f"meddanet  {__version__}")
    say(f"python    {platform.python_version()} on {platform.platform()}")
    say(f"torch     {torch.__version__}, {torch.get_num_threads()} threads")
    say(f"gpu       {', '.join(gpus) or 'none'}")
    say(f"weights   {', '.join(pretrained_names()) or 'none'}")
    return 0


def _info_weights(name: str) -> int:
    path = locate(name)
    facts = read_facts(path) | {"file": str(path), "sha256": digest(path)}
    text = yaml.safe_dump(facts, default_flow_style=None, allow_unicode=True, width=100)
    say_lines(text.rstrip())
    return 0


def _info_cost(name: str, size: int) -> int:
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
        say_lines(f"{name}, one slice of {size}x{size}, {counted}\n{table.render()}\n")
    return 0


def _info_kernels(archs: str | None) -> int:
    if archs is not None:
        wanted = parse_archs(archs)
        with tqdm(desc="compile", unit="kernel", disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            folder = build(wanted, progress=progress)
        say(f"compiled into {folder}", sys.stderr)
    lines = listing()
    for line in lines:
        say(line)
    if not lines:
        say("none precompiled: kernels compile on first use")
        say("meddanet info --kernels --build 8.6,8.9 compiles them for these architectures")
    return 0
