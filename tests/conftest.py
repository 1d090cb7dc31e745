from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from meddanet.data import VolumeError
from meddanet.networks.decision import ShuffleNetV2

# the same examples on every run, and no deadline: a busy machine is no failure
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

# several workers share the cores instead of each taking all of them
torch.set_num_threads(
    max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)

REPEATS = ShuffleNetV2.repeats
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


class Tolerances:
    """How exact is exact: one rule per kind of result, never loosened inside a test.

    A rule changes only in a commit of its own, with the reason.
    """

    @staticmethod
    def elementwise(actual: Tensor, expected: Tensor) -> None:
        """float32, float64: gathers, element-wise arithmetic, quantisation, crop and paste."""
        assert expected.dtype in (torch.float32, torch.float64), f"no rule for {expected.dtype}"
        torch.testing.assert_close(actual, expected)

    @staticmethod
    def reduction(actual: Tensor, *, native: Tensor, exact: Tensor) -> None:
        """Convolutions and sums: at most twice the error of PyTorch's own operation, `native`.

        Both errors are taken against `exact`, the float64 answer; one epsilon of its largest
        value is added for natives that happen to hit it. float64 results have no better answer:
        the element-wise rule holds for them.
        """
        assert exact.dtype == torch.float64 and actual.dtype == native.dtype
        assert actual.shape == native.shape == exact.shape, "nothing is broadcast here"
        if actual.dtype == torch.float64:
            return torch.testing.assert_close(actual, exact)
        error = (actual.double() - exact).abs().max().item()
        native_error = (native.double() - exact).abs().max().item()
        bound = 2 * native_error + torch.finfo(actual.dtype).eps * exact.abs().max().item()
        # written so that a NaN fails
        assert error <= bound, f"error {error:.3g} > {bound:.3g} (PyTorch's own {native_error:.3g})"

    @staticmethod
    def codes(actual: Tensor, expected: Tensor, *, quotient: Tensor) -> None:
        """Integer codes: equal, or one step apart where rounding is a toss-up.

        `quotient` is the float64 value before rounding. A toss-up lies within one float32 ulp of
        a rounding tie; at most one code in a thousand may be decided by it.
        """
        assert quotient.dtype == torch.float64 and actual.shape == expected.shape
        from_tie = (quotient - quotient.floor() - 0.5).abs()
        tie = from_tie <= quotient.abs() * torch.finfo(torch.float32).eps
        difference = (actual.long() - expected.long()).abs()
        wrong = int(((difference > 1) | ((difference == 1) & ~tie)).sum())
        assert wrong == 0, f"{wrong} of {difference.numel()} codes differ away from a rounding tie"
        share = difference.count_nonzero().item() / max(1, difference.numel())
        print(f"codes that differ, all at rounding ties: {share:.2e}")
        assert share <= 1e-3, f"{share:.2e} of the codes differ at rounding ties, more than 1e-3"

    @staticmethod
    def labels(actual: np.ndarray, expected: np.ndarray, *, share: float = 0.0) -> None:
        """Label maps: equal, unless the test states the share of voxels that may differ."""
        assert actual.shape == expected.shape
        differing = float(np.mean(actual != expected))
        print(f"voxels that differ: {differing:.2e}")
        assert differing <= share, f"{differing:.2e} of the voxels differ, more than {share:.2e}"


@pytest.fixture(scope="session")
def tolerances() -> type[Tolerances]:
    return Tolerances


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes beside the checkout; tests that need it skip without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real volumes: ../shared/data is absent")
    return SHARED_DATA


@pytest.fixture
def nan_poisoning() -> Iterator[None]:
    """Fills uninitialised memory with NaN (integers: their maximum) while a test runs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def few_units() -> Iterator[None]:
    """Decision networks of two, two and one units, not of four, eight and four, which are alike.

    For modules in which they are beside the point: their units are most of what a step of training,
    an engine's graphs and a file of weights take. Shipped weights need `all_units`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShuffleNetV2, "repeats", (2, 2, 1))
        yield


@pytest.fixture
def all_units(monkeypatch) -> None:
    """Decision networks as they are, for a test in a module of `few_units`."""
    monkeypatch.setattr(ShuffleNetV2, "repeats", REPEATS)


class Scans:
    """Scans of noise as files, named as BraTS 2021 names them, and what reading a bad one says."""

    MRI = ("flair", "t1ce", "t1", "t2")
    AFFINE = np.array([[-1.0, 0, 0, 3], [0, -1, 0, 239], [0, 0, 2, -7], [0, 0, 0, 1]])
    SHAPE = (6, 5, 4)

    @staticmethod
    def image(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: type = np.int16) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 3000, shape).astype(dtype)

    @staticmethod
    def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, affine), path)
        return path

    @classmethod
    def write_case(cls, folder: Path, name: str = "p1") -> dict[str, Path]:
        """Writes an image of each modality, the first of seed 0, the second of seed 1, ..."""
        paths = {kind: folder / f"{name}_{kind}.nii.gz" for kind in cls.MRI}
        return {kind: cls.write(path, cls.image(n)) for n, (kind, path) in enumerate(paths.items())}

    @staticmethod
    def error(call: Callable[[], object]) -> str:
        """Returns the one line of the `VolumeError` that a call raises."""
        with pytest.raises(VolumeError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        return message


@pytest.fixture(scope="session")
def scans() -> type[Scans]:
    return Scans


@pytest.fixture
def decathlon(tmp_path) -> Path:
    """A task of one MR modality and two labels: five cases of odd sizes, nested discs in noise."""
    folder = tmp_path / "Task04_Discs"
    random = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    (folder / "dataset.json").write_text('{"modality": {"0": "MRI"}}')
    for number in range(5):
        height, width, depth = 21 + number, 30 - number, 5
        y, x, z = np.mgrid[:height, :width, :depth]
        radius = np.hypot(y - 11, x - 13) + 3 * np.abs(z - 2)
        labels = (radius < 8).astype(np.uint8) + (radius < 4)
        image = random.normal(60, 9, labels.shape) + 40 * labels
        for kind, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", labels)):
            path = folder / kind / f"disc_{number:03d}.nii.gz"
            nib.save(nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    return folder
