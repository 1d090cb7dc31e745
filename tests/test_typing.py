"""What type checkers see of `meddanet`, whose public names are imported on first use."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import meddanet
from meddanet.layers import QuantizedInput

INIT = Path(meddanet.__file__)
ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import meddanet
from meddanet import QuantConv2d, VolumePredictor

model = meddanet.load_model()
reveal_type(model)
reveal_type(VolumePredictor(model).predict(meddanet.load_volume("case")).labels)
meddanet.load_model(3)
meddanet.segment
QuantConv2d(2, 4, 3, padding="same", num_bits=4, bias=False)
QuantConv2d(2, 4, 3, bits=4)
"""


def seen_by_type_checkers() -> dict[str, str]:
    """Public name -> module, as the block that is never run imports them."""
    (block,) = (
        node for node in ast.parse(INIT.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    # only what is imported under a name that is said again is public: PEP 484
    return {
        alias.asname: node.module for node in imports for alias in node.names
        if alias.name == alias.asname
    }


def test_type_checkers_see_what_is_there():
    assert seen_by_type_checkers() == meddanet._PUBLIC
    assert {*meddanet._PUBLIC, "__version__"} == set(meddanet.__all__)


def test_a_users_program_is_checked(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    if not (ROOT / "meddanet" / "kernels").exists():
        pytest.skip("an sdist has no link meddanet/kernels, by which mypy finds the kernels")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    # what `make lint` leaves, which it would take half a minute to find out again
    options = ["--cache-dir", ROOT / ".mypy_cache", "--config-file", ROOT / "pyproject.toml"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, options), "program.py"], cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )
    told = re.findall("^.*: (?:error: |note: Revealed ).*", run.stdout, re.MULTILINE)
    expected = (
        '6: note: Revealed type is "meddanet.routing.RoutedSegmenter"',
        "7: note: Revealed type is .*ndarray",
        '8: error: Argument 1 to "load_model" has incompatible type "int"',
        '9: error: Module has no attribute "segment"',
        '11: error: Unexpected keyword argument "bits" for "QuantConv2d"',
    )
    for line, start in zip(told, expected, strict=True):
        assert re.match(f"program.py:{start}", line)


@pytest.mark.parametrize("layer", ["QuantConv2d", "QuantConvTranspose2d", "QuantLinear"])
def test_a_layers_signature_is_that_of_the_layer_it_replaces(layer):
    """By name, order and default; type checkers would refuse what runs, or let pass what fails."""
    tree = ast.parse((INIT.parent / "layers.py").read_text(encoding="utf-8"))
    (declared,) = (
        node.args for body in tree.body if getattr(body, "name", "") == layer
        for node in ast.walk(body) if getattr(node, "name", "") == "__init__"
    )
    replaced = inspect.signature(getattr(nn, layer.removeprefix("Quant"))).parameters.values()
    ours = inspect.signature(QuantizedInput).parameters.values()
    takes = {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: (replaced, declared.args[1:], declared.defaults),
        inspect.Parameter.KEYWORD_ONLY: (ours, declared.kwonlyargs, declared.kw_defaults),
    }
    for kind, (parameters, arguments, defaults) in takes.items():
        known = [parameter for parameter in parameters if parameter.kind is kind]
        assert [argument.arg for argument in arguments] == [p.name for p in known]
        assert [ast.literal_eval(default) for default in defaults] == [
            p.default for p in known if p.default is not p.empty
        ]
