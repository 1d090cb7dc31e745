"""The operations' tests once more, on the Triton kernels as Triton's interpreter runs them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = (
    "test_conv_int.py",
    "test_conv_on_codes.py",
    "test_crop_paste.py",
    "test_encode.py",
    "test_head.py",
    "test_properties.py",
    "test_quantize.py",
    "test_selector.py",
    "test_operators.py::test_opcheck",
)
CODE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this is the interpreted run")
def test_the_kernels_pass_interpreted(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", CODE, "-q", "-p", "no:cacheprovider",
         f"--rootdir={FOLDER.parents[1]}", f"-c{FOLDER.parents[1] / 'pyproject.toml'}",
         *(str(FOLDER / name) for name in FILES)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tmp_path,  # the checkout's root would bring `kernels` in by its folder's name
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and " skipped" not in run.stdout
