"""What a user installs: the sdist and the wheel built from this checkout, then imported."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

# imports every module of the package; argv: folder to import from, modules that must be absent
IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))
import meddanet
names = [m.name for m in pkgutil.walk_packages(meddanet.__path__, "meddanet.")]
names = [name for name in names if not name.endswith("__main__")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""

# argv: build_sdist or build_wheel, folder to build into; prints the archive's name
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def python(code: str, *arguments: str | Path, cwd: Path) -> str:
    """Runs code that sees neither the working directory nor a GPU; returns its last line."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def project_modules() -> set[str]:
    """The .py files of the checkout, under the paths they have once installed."""
    package = {p for p in (ROOT / "meddanet").rglob("*.py") if "kernels" not in p.parts}
    names = {p.relative_to(ROOT).as_posix() for p in package}
    kernels = (ROOT / "kernels").rglob("*.py")
    return names | {f"meddanet/{p.relative_to(ROOT).as_posix()}" for p in kernels}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built from a copy so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in ("meddanet", "kernels"):
        junk = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=junk)
    folder = tmp_path_factory.mktemp("sdist")
    archive = folder / python(BUILD, "build_sdist", folder, cwd=copy)
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The unpacked wheel, built from the sdist as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    archive = folder / python(BUILD, "build_wheel", folder, cwd=sdist)
    assert archive.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(archive, folder / "unpacked", format="zip")
    return folder / "unpacked"


def test_sdist_holds_the_kernels_once(sdist):
    assert (sdist / "kernels" / "__init__.py").is_file()
    assert not (sdist / "meddanet" / "kernels").exists()


def test_wheel_holds_every_module_and_the_kernels_inside_meddanet(wheel):
    assert {p.relative_to(wheel).as_posix() for p in wheel.rglob("*.py")} == project_modules()


def test_wheel_has_one_top_level_name(wheel):
    names = {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"}
    assert names == {"meddanet"}, "a top-level `kernels` would overwrite Hugging Face's package"


def test_wheel_holds_the_type_marker_and_the_shipped_weights(wheel):
    assert (wheel / "meddanet" / "py.typed").is_file()
    shipped = {p.name for p in (ROOT / "meddanet" / "pretrained").glob("*")}
    assert {p.name for p in (wheel / "meddanet" / "pretrained").glob("*")} == shipped


def test_wheel_metadata(wheel):
    version = runpy.run_path(str(ROOT / "meddanet" / "version.py"))["__version__"]
    (folder,) = wheel.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == version
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) >= {"test", "cpu", "train", "bench", "dicom"}
    assert "meddanet = meddanet.cli:main" in (folder / "entry_points.txt").read_text()


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param((), id="all-installed"),
        pytest.param(("triton",), id="no-triton"),
        pytest.param(
            ("edt", "cc3d", "scipy", "tensorboard", "openvino", "pydicom", "highdicom", "pytest"),
            id="no-extras",
        ),
    ],
)
def test_wheel_imports_in_a_clean_directory(wheel, tmp_path, absent):
    files = json.loads(python(IMPORT_ALL, wheel, *absent, cwd=tmp_path))
    assert "meddanet.kernels" in files and "meddanet.data" in files
    assert {name for name, file in files.items() if not Path(file).is_relative_to(wheel)} == set()


def test_bare_checkout_imports(tmp_path):
    files = json.loads(python(IMPORT_ALL, ROOT, cwd=tmp_path))
    assert Path(files["meddanet.kernels"]) == ROOT / "meddanet" / "kernels" / "__init__.py"
    assert Path(files["meddanet.kernels"]).resolve() == ROOT / "kernels" / "__init__.py"


def test_command_line_does_not_import_torch(wheel, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import meddanet.cli; print(*sys.modules)"
    modules = set(python(code, wheel, cwd=tmp_path).split())
    assert "meddanet.cli" in modules and "torch" not in modules
