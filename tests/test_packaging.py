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
if "openvino" in sys.argv:
    # these are asked for once OpenVINO is found
    for name in ("operations", "opset", "openvino_bank", "openvino_graphs", "openvino_networks"):
        names.remove(f"meddanet.engine.{name}")
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""

# argv: build_sdist or build_wheel, folder to build into; prints the archive's name
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


# argv: folder to import from, an architecture; prints how many of the listed kernels lie compiled
LOOK_UP = """
import sys
sys.path.insert(0, sys.argv[1])
from meddanet.kernels import variants
from triton import knobs
from triton.runtime.cache import FileCacheManager
listed = variants.variants(int(sys.argv[2]))
cache = knobs.cache.manager_class or FileCacheManager
print(sum(cache(v.key).get_group(f"{v.name}.json") is not None for v in listed), "of", len(listed))
"""


def run_python(
    code: str, *arguments: str | Path, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs code that sees neither the working directory nor a GPU."""
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "MEDDANET_CUDA_ARCHS": ""} | variables,
        capture_output=True,
        text=True,
    )


def python(code: str, *arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Runs code that has to succeed; returns its last line."""
    run = run_python(code, *arguments, cwd=cwd, **variables)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


def build_wheel(source: Path, folder: Path, **variables: str) -> Path:
    """Builds a wheel in a folder of its own and unpacks it."""
    archive = folder / python(BUILD, "build_wheel", folder, cwd=source, **variables)
    assert archive.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(archive, folder / "unpacked", format="zip")
    return folder / "unpacked"


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
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"))


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
    extras = {"test", "cpu", "train", "bench", "context", "plots"}
    assert set(metadata.get_all("Provides-Extra")) >= extras
    assert "meddanet = meddanet.__main__:start" in (folder / "entry_points.txt").read_text()


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param((), id="all-installed"),
        pytest.param(
            ("triton", "edt", "scipy", "tensorboard", "openvino", "matplotlib", "monai", "pytest"),
            id="none of what may be absent",
        ),
    ],
)
def test_wheel_imports_in_a_clean_directory(wheel, tmp_path, absent):
    files = json.loads(python(IMPORT_ALL, wheel, *absent, cwd=tmp_path))
    assert "meddanet.kernels" in files and "meddanet.data" in files
    assert {name for name, file in files.items() if not Path(file).is_relative_to(wheel)} == set()


@pytest.mark.skipif(
    not (ROOT / "meddanet" / "kernels").exists(),
    reason="an sdist has no link meddanet/kernels, by which a bare checkout finds the kernels",
)
def test_bare_checkout_imports(tmp_path):
    files = json.loads(python(IMPORT_ALL, ROOT, cwd=tmp_path))
    assert Path(files["meddanet.kernels"]) == ROOT / "meddanet" / "kernels" / "__init__.py"
    assert Path(files["meddanet.kernels"]).resolve() == ROOT / "kernels" / "__init__.py"


def test_command_line_does_not_import_torch(wheel, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import meddanet.cli; print(*sys.modules)"
    modules = set(python(code, wheel, cwd=tmp_path).split())
    assert "meddanet.cli" in modules and "torch" not in modules


def test_kernels_compiled_at_install_are_found_where_they_are_installed(sdist, tmp_path_factory):
    pytest.importorskip("triton")
    source = tmp_path_factory.mktemp("source") / "meddanet"
    shutil.copytree(sdist, source)
    # all kernels would take minutes
    for launcher in (source / "kernels").glob("*_triton.py"):
        if launcher.stem not in ("route_triton", "view_triton"):
            text = launcher.read_text().replace("def shape_classes", "def _shape_classes")
            launcher.write_text(text)
    folder = tmp_path_factory.mktemp("compiled")
    installed = build_wheel(source, folder, MEDDANET_CUDA_ARCHS="8.6")
    assert not (source / "kernels" / "compiled").exists(), "the sources stay as they are"
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "XDG_CACHE_HOME": str(folder)}
    found, _, listed = python(LOOK_UP, installed, 86, cwd=folder, **cache).split()
    assert found == listed != "0" and not (folder / "cache").exists()
    assert python(LOOK_UP, installed, 89, cwd=folder, **cache) == f"0 of {listed}"

    again = build_wheel(source, tmp_path_factory.mktemp("again"))
    assert not (again / "meddanet" / "kernels" / "compiled").exists(), "left by the build before"


@pytest.mark.parametrize(
    ("absent", "archs", "message", "hook"),
    [
        ("triton", "8.6", "needs the package triton", "build_wheel"),
        ("torch", "8.6", "import of torch halted", "build_wheel"),
        ("torch", "8.6", "import of torch halted", "build_editable"),
        ("edt", "8.5", "unknown CUDA architecture '8.5'; known are 8.0, 8.6", "build_wheel"),
    ],
)
def test_an_install_that_cannot_compile_fails_and_names_both_commands(
    sdist, tmp_path, hook, absent, archs, message
):
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    code = f"import sys; sys.modules[{absent!r}] = None\n{BUILD}"
    run = run_python(code, hook, tmp_path, cwd=source, MEDDANET_CUDA_ARCHS=archs)
    assert run.returncode == 1 and not list(tmp_path.glob("*.whl"))
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "pip install --no-build-isolation ." in line
    assert "meddanet info --kernels --build 8.6,8.9" in line
