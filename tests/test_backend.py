"""use_backend: which executor an operation runs on, and what it says where that one cannot run."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from meddanet.kernels import aot, bilinear_crop, fake_quantize, precompiled, use_backend
from meddanet.kernels import backend as chooser

x = torch.ones(1, 1, 4, 4)
offset = torch.zeros(1, 2)


@pytest.fixture(autouse=True)
def backend():
    """Hides the fixture that chooses an executor for every other test."""
    with use_backend("auto"):
        yield


class Cuda:
    """What triton_runs asks of a CUDA tensor."""

    is_cuda, device = True, "cuda:0"


def install(monkeypatch, package):
    """Makes triton look installed or not, whatever this machine has."""
    fault = "" if package else "triton is not installed; pip install triton"
    monkeypatch.setattr(chooser, "import_fault", lambda *names: fault)
    monkeypatch.setattr(chooser, "triton_fault", lambda device: fault)


@pytest.mark.parametrize(
    ("name", "installed", "cuda", "cpu"),
    [
        ("auto", True, True, False),
        ("auto", False, False, False),
        ("onednn", True, False, False),
        ("reference", True, False, False),
    ],
)
def test_who_runs(monkeypatch, name, installed, cuda, cpu):
    install(monkeypatch, installed)
    with use_backend(name):
        assert (chooser.triton_runs(Cuda()), chooser.triton_runs(x)) == (cuda, cpu)


def test_triton_on_a_cpu_is_interpreted_or_refused(monkeypatch):
    runtime = pytest.importorskip("triton").knobs.runtime
    with use_backend("triton"):
        monkeypatch.setattr(runtime, "interpret", True)
        assert chooser.triton_runs(x)
        monkeypatch.setattr(runtime, "interpret", False)
        assert chooser.triton_runs(Cuda())
        for op in (lambda: bilinear_crop(x, offset, 2), lambda: fake_quantize(x, 8)):
            with pytest.raises(ValueError, match="runs on CUDA tensors, got one on cpu; TRITON_I"):
                op()


def test_triton_that_is_not_installed(monkeypatch):
    install(monkeypatch, False)
    with use_backend("triton"), pytest.raises(ValueError, match="pip install triton"):
        bilinear_crop(x, offset, 2)


@pytest.fixture
def broken(tmp_path, monkeypatch) -> str:
    """The name of a package whose import fails as one does that lacks a library."""
    (tmp_path / "broken.py").write_text("raise ImportError('libbroken.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    return "broken"


def test_what_is_wrong_with_a_package(broken):
    assert chooser.import_fault("json", "json") == ""
    assert chooser.import_fault("nothere", '"all[it]"') == (
        'nothere is not installed; pip install "all[it]"'
    )
    assert chooser.import_fault(broken, "broken") == (
        "broken is damaged (libbroken.so: cannot open); pip install --force-reinstall broken"
    )


@pytest.fixture
def asked_anew():
    """Lets a test ask afresh whether Triton launches, and those after it, too."""
    chooser.triton_fault.cache_clear()
    yield
    chooser.triton_fault.cache_clear()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find\nC compiler."), subprocess.CalledProcessError(1, ["gcc"]),
     # Triton's own, where it is installed
     *(error("no ptxas") for error in chooser.build_errors()[1:])],
)
def test_auto_does_without_a_triton_that_cannot_launch(monkeypatch, asked_anew, error):
    """As where no C compiler is found, or it fails for want of Python's headers."""
    launches = []

    def launch(device):
        launches.append(error)
        raise error

    monkeypatch.setattr(chooser, "import_fault", lambda *names: "")
    monkeypatch.setattr(chooser, "_launch", launch)
    assert not chooser.triton_runs(Cuda()) and not chooser.triton_runs(Cuda())
    assert len(launches) == 1, "it is tried once"
    told = " ".join(str(error).split())
    assert chooser.triton_fault("cuda:0") == (
        f"triton launches nothing here ({told}); it needs a C compiler and Python's headers"
    )


def test_a_gpu_that_is_full_is_tried_again(monkeypatch, asked_anew):
    answers = iter([RuntimeError("Triton Error [CUDA]: out of memory"), None])

    def launch(device):
        if error := next(answers):
            raise error

    monkeypatch.setattr(chooser, "import_fault", lambda *names: "")
    monkeypatch.setattr(chooser, "_launch", launch)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA.: out of memory"):
        chooser.triton_fault("cuda:0")
    assert chooser.triton_fault("cuda:0") == ""


def test_the_launch_that_is_tried():
    """It runs under the interpreter and on a GPU; where there is neither, Triton has no driver."""
    triton = pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if triton.knobs.runtime.interpret or device.type == "cuda":
        chooser._launch(device)
    else:
        with pytest.raises(RuntimeError, match="0 active drivers"):
            chooser._launch(device)


def test_a_setter_and_a_context():
    assert chooser._chosen == "auto"
    with use_backend("reference"):
        assert chooser._chosen == "reference"
        with pytest.raises(RuntimeError), use_backend("onednn"):
            assert chooser._chosen == "onednn"
            raise RuntimeError
        use_backend("triton")
        assert chooser._chosen == "triton"
    assert chooser._chosen == "auto"
    kept = use_backend("reference")
    for between in ("onednn", "auto"):
        use_backend(between)
        with kept:
            assert chooser._chosen == "reference"
        assert chooser._chosen == between


# the backend, and whether that has imported triton
CHOSEN = """
import sys
from meddanet.kernels import backend
print(backend._chosen, 'triton' in sys.modules)
"""


def test_an_unknown_name_changes_nothing():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, .* got 'cuda'"):
        use_backend("cuda")
    assert chooser._chosen == "auto"


@pytest.mark.parametrize(
    ("value", "answer"),
    [("reference", "reference False"), ("gpu", "MEDDANET_BACKEND must be one of auto")],
)
def test_the_environment_makes_the_first_choice(monkeypatch, value, answer):
    monkeypatch.setenv("MEDDANET_BACKEND", value)
    run = subprocess.run([sys.executable, "-c", CHOSEN], capture_output=True, text=True)
    assert answer in run.stdout + run.stderr


def test_a_user_without_a_home_has_the_packages_own_kernels(monkeypatch, tmp_path):
    """As in a container whose user is in no list."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(precompiled, "PACKAGED", tmp_path / "compiled")
    assert precompiled.folders() == (tmp_path / "compiled",)
    precompiled.install(None)
    assert not list(precompiled.entries(tmp_path / "compiled"))
    monkeypatch.setattr(aot, "PACKAGED", tmp_path / "absent" / "compiled")
    with pytest.raises(ValueError, match="absent cannot be written.*; set XDG_CACHE_HOME to a"):
        aot.writable_folder()


def test_a_home_that_may_not_be_entered_holds_no_kernels(monkeypatch, tmp_path):
    def locked(folder: Path, *_) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("iterdir", "is_file", "is_dir", "glob"):
        monkeypatch.setattr(Path, name, locked)
    precompiled.install(None)
    assert not list(precompiled.entries(tmp_path))
    kept = SimpleNamespace(get_group=lambda filename: {filename: "own"})
    overlay = precompiled._Overlay("key", "3.9.0", lambda: kept)
    assert overlay.get_group("a.json") == {"a.json": "own"}


def test_triton_is_imported_by_the_first_kernel_alone(monkeypatch):
    """Also where the variable is set to nothing, which chooses nothing."""
    monkeypatch.setenv("MEDDANET_BACKEND", "")
    run = subprocess.run([sys.executable, "-c", CHOSEN], capture_output=True, text=True)
    assert run.stdout.strip() == "auto False", run.stderr


def test_without_triton_the_kernels_import_and_a_launch_says_what_is_missing():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from meddanet.kernels.crop_paste_triton import shift_kernel\n"
        "shift_kernel[(1,)](torch.ones(1))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: this operation's kernel needs the package triton" in run.stderr
