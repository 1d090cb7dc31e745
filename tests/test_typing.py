"""What type checkers see of `meddanet`, whose public names are imported on first use."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import meddanet

INIT = Path(meddanet.__file__)
ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import meddanet
from meddanet import VolumePredictor

model = meddanet.load_model()
reveal_type(model)
reveal_type(VolumePredictor(model).predict(meddanet.load_volume("case")).labels)
meddanet.load_model(3)
meddanet.segment
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
    *told, _ = run.stdout.splitlines()
    expected = (
        '6: note: Revealed type is "meddanet.routing.RoutedSegmenter"',
        "7: note: Revealed type is .*ndarray",
        '8: error: Argument 1 to "load_model" has incompatible type "int"',
        '9: error: Module has no attribute "segment"',
    )
    for line, start in zip(told, expected, strict=True):
        assert re.match(f"program.py:{start}", line)
