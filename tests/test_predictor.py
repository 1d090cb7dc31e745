"""From a volume in memory to labels: order, orientation, conventions, padding, cost."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.utils.flop_counter import FlopCounterMode

from meddanet.build import build_med_danet, build_med_danet_v2
from meddanet.cost import cost_table
from meddanet.data import Volume, VolumeError, load_volume
from meddanet.data.phantom import make_phantom
from meddanet.engine import compile_engine
from meddanet.layers import quantized_layers, set_quantization
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.predictor import VolumePredictor
from meddanet.routing import Segmentation

pytestmark = pytest.mark.usefixtures("few_units")

MRI = ("flair", "t1ce", "t1", "t2")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def volume(data: np.ndarray, affine: np.ndarray = LPS, **changes) -> Volume:
    usual = {"header": None, "modalities": MRI, "convention": "brats2021", "name": "case"}
    return Volume(data, affine, **{**usual, **changes})


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 100, (4, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def built() -> MedDANetV2:
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-12", crop_sizes=(16,))
    for layer in quantized_layers(model).values():
        layer.input_amax.fill_(4.0)
    set_quantization(model, quantize=True, update_range=False)
    model.metadata = {
        "modalities": list(MRI), "spacing_mm": [1.0, 1.0, 1.0], "label_convention": "brats2021",
    }
    return model.eval()


@pytest.fixture
def model(built) -> Iterator[MedDANetV2]:
    """The built model; what a test sets on it is undone."""
    policy, metadata = built.policy, built.metadata
    yield built
    built.policy, built.metadata = policy, metadata
    built.__dict__.pop("segment", None)


class Predictor(VolumePredictor):
    """A predictor that does not count, on the model's own layers, for tests of everything else."""

    def __init__(self, model, device, **options) -> None:
        super().__init__(model, device, executor="eager", **options)

    def _cost(self, shape, seen, result):
        return {}


class Decide(torch.nn.Module):
    """A policy that takes the given routes in turn, slice after slice that it is shown."""

    def __init__(self, routes: list[int]) -> None:
        super().__init__()
        self.routes = routes

    def forward(self, slices):
        taken, self.routes = self.routes[: len(slices)], self.routes[len(slices) :]
        return torch.nn.functional.one_hot(torch.tensor(taken), 3).float()


def answer(model: MedDANetV2, label) -> list[torch.Tensor]:
    """Makes `label(slices)` the model's answer; returns the list of batches it will have seen."""
    seen = []

    def segment(slices):
        seen.append(slices)
        count = len(slices)
        return Segmentation(
            label(slices).to(torch.uint8), torch.zeros(count, dtype=torch.long),
            torch.zeros(count, 2), torch.zeros(count, 4, dtype=torch.long),
        )

    model.segment = segment
    return seen


@pytest.mark.parametrize(
    ("naming", "labels", "convention", "values"),
    [
        ("brats2021", None, "brats2021", (0, 1, 2, 4)),
        ("brats2023", None, "brats2023", (0, 1, 2, 3)),
        ("msd", None, "msd", (0, 2, 1, 3)),
        ("nnunet", None, "brats2021", (0, 1, 2, 4)),
        ("files", "msd", "msd", (0, 2, 1, 3)),
        ("brats2021", "brats2023", "brats2023", (0, 1, 2, 3)),
    ],
)
def test_labels_follow_the_convention(model, naming, labels, convention, values):
    answer(model, lambda slices: slices.argmax(1))
    data = noise(24, 32, 5)
    result = Predictor(model, "cpu", labels=labels).predict(volume(data, convention=naming))
    mean, spread = data.mean((1, 2, 3), keepdims=True), data.std((1, 2, 3), keepdims=True)
    classes = ((data - mean) / spread).argmax(0)
    assert np.array_equal(result.labels, np.array(values, np.uint8)[classes])
    assert result.labels.dtype == np.uint8
    assert result.label_convention == convention


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_the_network_sees_axial_slices_from_the_right(model, order, signs):
    """Whatever the orientation: row 0 lies at the patient's right, column 0 in front."""

    def corner(slices):
        labels = torch.zeros(len(slices), *slices.shape[2:])
        labels[:, :8, :16] = 3
        return labels

    seen = answer(model, corner)
    # voxel axis k runs along world axis order[k]
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[list(order)].T * np.array(signs) * 1.0
    shape = np.array([24, 32, 6])[list(order)]
    result = Predictor(model, "cpu").predict(volume(noise(*shape), affine))
    assert seen[0].shape[2:] == (24, 32) and sum(map(len, seen)) == 6
    assert result.labels.shape == tuple(shape)
    indices = np.indices(shape).reshape(3, -1)
    x, y, _ = affine[:3, :3] @ indices  # RAS+: x grows to the right, y to the front
    inside = result.labels.reshape(-1) == 4
    assert np.array_equal(inside, (x > x.max() - 8) & (y > y.max() - 16))


def test_modalities_are_put_into_the_models_order(model):
    answer(model, lambda slices: slices.argmax(1))
    predictor, data = Predictor(model, "cpu"), noise(16, 16, 3)
    usual = predictor.predict(volume(data)).labels
    other = predictor.predict(
        volume(data[[3, 0, 2, 1]], modalities=("t2", "flair", "t1", "t1ce"))
    ).labels
    assert np.array_equal(usual, other)


def test_a_modality_that_is_missing(model):
    with pytest.raises(VolumeError, match="case: modality t1ce is missing; .* the case has flair"):
        Predictor(model, "cpu").predict(
            volume(noise(16, 16, 3)[:3], modalities=("flair", "t1", "t2"))
        )


def test_a_model_that_names_no_modalities_takes_what_it_is_given(model):
    model.metadata = {}
    predictor = Predictor(model, "cpu")
    names = ("a", "b", "c", "d")
    assert predictor.predict(volume(noise(16, 16, 3), modalities=names)).labels.shape == (16, 16, 3)
    with pytest.raises(VolumeError, match="needs 4 channels, the case has a, b"):
        predictor.predict(volume(noise(16, 16, 3)[:2], modalities=names[:2]))


def test_slices_are_padded_at_their_end_and_cut_back(model):
    seen = answer(model, lambda slices: (slices != 0).any(1))
    # 13 is below the crop size of 16, 42 is no multiple of 8
    result = Predictor(model, "cpu").predict(volume(noise(13, 42, 3)))
    assert seen[0].shape == (3, 4, 16, 48)
    assert not seen[0][:, :, 13:].any() and not seen[0][:, :, :, 42:].any()
    assert result.labels.shape == (13, 42, 3) and (result.labels == 1).all()


def test_memory_is_bounded_by_chunks_of_slices(model):
    seen = answer(model, lambda slices: slices[:, 0] > 0)
    Predictor(model, "cpu").predict(volume(noise(16, 16, 50)))
    assert max(map(len, seen)) <= 16 and sum(map(len, seen)) == 50
    assert all(s.is_contiguous(memory_format=torch.channels_last) for s in seen)


def test_prediction_is_what_the_model_says_slice_by_slice(model, tolerances):
    phantom = make_phantom(1, (40, 48, 20))
    model.policy = Decide([0, 1, 2] * 7)
    result = Predictor(model, "cpu").predict(volume(phantom.data))
    brain = phantom.data.sum(0) > 0
    values = phantom.data[:, brain].astype(np.float64)
    mean, spread = values.mean(1), values.std(1)
    data = (phantom.data - mean[:, None, None, None]) / spread[:, None, None, None] * brain
    model.policy = Decide([0, 1, 2] * 7)
    expected, decided = [], []
    for index in range(20):
        alone = model.segment(torch.from_numpy(data[None, ..., index].astype(np.float32)))
        expected.append(np.array([0, 1, 2, 4], np.uint8)[alone.labels[0].numpy()])
        decided.append(alone.decisions.item())
    assert result.decisions.tolist() == decided and set(decided) == {0, 1, 2}
    # batches round differently where two logits tie
    tolerances.labels(result.labels, np.stack(expected, -1), share=1e-3)
    assert result.routes == ("skip", "crop-16", "whole")
    assert result.offsets.shape == (20, 2) and result.num_bits.shape == (20, 4)


def macs(run) -> int:
    """True multiply-adds, by PyTorch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@pytest.fixture
def price(model) -> dict[str, int]:
    """What each part costs on a 32 x 40 slice."""
    set_quantization(model, quantize=False, update_range=False)
    slices, offset = torch.rand(1, 4, 32, 40), torch.zeros(1, 2)
    prices = {
        "policy": macs(lambda: model.policy(slices)),
        "crop": macs(lambda: model.position(slices))
        + macs(lambda: model.features(slices[:, :, :16, :16]))
        + macs(lambda: model.crop_last_stages[0](torch.zeros(1, 12, 32, 40))),
        "whole": macs(lambda: model.whole_branch(slices)),
        "static": macs(lambda: model.segmenter(slices)),
    }
    assert macs(lambda: model.crop_branch(slices, offset, 0)) + macs(
        lambda: model.position(slices)
    ) == prices["crop"]
    set_quantization(model, quantize=True, update_range=False)
    return prices


def test_the_cost_of_a_case_counts_every_network_that_ran(model, price):
    data = noise(30, 40, 9)
    data[:, :, :, [0, 8]] = 0  # two slices that not even the policy sees
    predictor = VolumePredictor(model, "cpu", executor="eager")
    # costs are counted with the real policy, the routes are taken by a fixed one
    predictor.engine._model.policy = Decide([0, 1, 2, 1, 1, 0, 2])
    result = predictor.predict(volume(data))
    assert result.decisions.tolist() == [0, 0, 1, 2, 1, 1, 0, 2, 0]
    expected = 7 * price["policy"] + 3 * price["crop"] + 2 * price["whole"]
    assert result.cost["mac"] == expected
    assert result.cost["static_mac"] == 9 * price["static"]
    # norms and the output side of transposed convolutions come on top; 8 or 16 of 32 bits below
    assert result.cost["paper"] > result.cost["mac"] and result.cost["static_paper"] > 0
    assert result.cost["scaled_paper"] < result.cost["paper"]
    assert 8 * 8 * expected < result.cost["bit_operations"] < 16 * 16 * expected


def test_bit_operations_are_products_of_widths(model):
    model = deepcopy(model)
    set_quantization(model, quantize=True, update_range=False)
    for selector in model.bit_selectors:
        torch.nn.init.zeros_(selector.linear.weight)
        selector.linear.bias.data = torch.tensor([1.0, 0.0])
    predictor = VolumePredictor(model, "cpu", executor="eager")
    predictor.engine._model.policy = Decide([1, 2, 0])
    cost = predictor.predict(volume(noise(30, 40, 3))).cost
    # a crop of 16 x 16 and a slice of 32 x 40, two kernels of nine on four channels; the selectors
    gradients = (16 * 16 + 32 * 40) * 2 * 9 * 4
    selectors = 2 * sum((channels + 2 * 4) * 2 for channels in (12, 24, 48, 96))
    in_float = (gradients + selectors) * (32 * 32 - 8 * 8)
    assert cost["bit_operations"] == 8 * 8 * cost["mac"] + in_float


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window_hu", [None, (-100, 400)])
def test_voxels_that_are_no_numbers_are_refused(model, bad, window_hu):
    predictor = VolumePredictor(model, "cpu", executor="eager")
    predictor.window_hu = window_hu
    data = noise(16, 24, 3)
    data[2, 5, 6, 1] = bad
    with pytest.raises(VolumeError, match="^case: voxels are NaN or infinite; expected finite"):
        predictor.predict(volume(data))


def test_scans_that_tell_nothing_are_warned_of(model):
    predictor = Predictor(model, "cpu")
    data = noise(30, 40, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(volume(data))
    data[1], data[3] = 0, 7
    with pytest.warns(UserWarning, match="^case: t1ce, t2 has the same value everywhere; look at"):
        predictor.predict(volume(data))
    normalised = noise(30, 40, 9)
    normalised -= normalised.mean()
    with pytest.warns(UserWarning, match=r"^case: [45]\d% of its voxels that are not 0"):
        predictor.predict(volume(normalised))


def test_an_image_that_is_there_twice_is_a_warning(model, scans, tmp_path):
    """Though its copy was compressed anew; one that differs in a voxel is another image."""
    paths = scans.write_case(tmp_path, "case")
    predictor = Predictor(model, "cpu")
    answer(model, lambda slices: slices[:, 0] > 0)
    twice = nib.load(paths["t1ce"]).get_fdata().astype(np.int16)
    for voxel, told in ((None, 1), ((3, 2, 1), 0)):
        if voxel:
            twice[voxel] += 1
        scans.write(paths["t1"], twice)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predictor.predict(load_volume(tmp_path))
        messages = [str(w.message) for w in caught if "same image" in str(w.message)]
        assert messages == told * [
            "case: t1ce and t1 are the same image; give each its own file, or expect worse labels"
        ]


def test_padding_is_no_tissue(model):
    """One value around the body, whichever, changes no label; in one modality alone it hides it."""
    predictor = Predictor(model, "cpu")
    answer(model, lambda slices: (slices[:, 0] > 0).to(torch.uint8))
    padded, body = noise(40, 48, 9), np.zeros((40, 48, 9), bool)
    body[12:28, 12:28] = True
    expected = predictor.predict(volume(padded * body)).labels
    for values in ((-1024,) * 4, (-1, -2000, -3, -4), (0, 0, 0, -32768)):
        outside = np.array(values, np.float32)[:, None, None, None]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = predictor.predict(volume(np.where(body, padded, outside))).labels
        assert np.array_equal(found, expected)
    padded[3, :, 24:] = -32768
    with pytest.warns(UserWarning, match="^case: t2 is -32768 where others show .* 50% of the vox"):
        assert not predictor.predict(volume(padded)).labels[:, 24:].any()


def test_a_prediction_equals_itself_alone(model):
    one, other = (Predictor(model, "cpu").predict(volume(noise(16, 16, 2))) for _ in range(2))
    assert one != other and [other, one].index(one) == 1 and len({one, other, one}) == 2


def test_an_empty_volume_costs_nothing(model):
    result = VolumePredictor(model, "cpu").predict(volume(np.zeros((4, 16, 24, 4), np.float32)))
    assert not result.labels.any() and not result.decisions.any()
    assert result.cost["mac"] == result.cost["paper"] == result.cost["scaled_paper"] == 0
    assert result.cost["static_mac"] > 0


@pytest.mark.parametrize(("height", "width", "fits", "too_large"), [
    (24, 44, 48, 56), (44, 24, 48, 80000), (8, 8, 16, 24),
])
def test_a_window_larger_than_the_slices_is_refused(model, height, width, fits, too_large):
    """Beyond what rounding to the stride of 8, and the smallest side of 16, need."""
    scan = volume(noise(height, width, 3))
    assert Predictor(model, "cpu", window=fits).predict(scan).labels.shape == (height, width, 3)
    with pytest.raises(VolumeError) as error:
        Predictor(model, "cpu", window=too_large).predict(scan)
    assert str(error.value) == (
        f"case: window is {too_large}, larger than its slices of {height} x {width} pixels; name "
        f"at most {fits}, or none for whole slices"
    )


def test_windows_are_decided_one_by_one(model):
    """48 pixels give windows of 24 at 0, 8, 16 and 24; those that see nothing cost nothing."""
    data = noise(48, 48, 2)
    data[..., 1] = 0
    data[:, 24:, :, 0] = data[:, :, 8:, 0] = 0  # signal in rows 0..23 of columns 0..7 only
    predictor = VolumePredictor(model, "cpu", window=24)
    result = predictor.predict(volume(data))
    assert result.windows == tuple((y, x) for y in (0, 8, 16, 24) for x in (0, 8, 16, 24))
    assert result.decisions.shape == (2, 16) and result.num_bits.shape == (2, 16, 4)
    assert result.offsets.shape == (2, 16, 2) and result.labels.shape == (48, 48, 2)
    table = cost_table(predictor.model, (1, 4, 24, 24), "mac")
    spent = [table.macs(result.routes[result.decisions[0, m]]) for m in (0, 4, 8)]
    assert result.cost["mac"] == sum(spent)
    static = sum(
        count for part, count in table.parts["whole"].items() if part not in ("policy", "selectors")
    )
    assert result.cost["static_mac"] == 32 * static


def test_a_window_as_numpy_has_it(model):
    scan = volume(noise(32, 32, 2))
    expected, found = (
        Predictor(model, "cpu", window=window).predict(scan) for window in (16, np.int64(16))
    )
    assert found.windows == expected.windows
    np.testing.assert_array_equal(found.labels, expected.labels)


def test_two_runs_agree_exactly(model):
    phantom = volume(make_phantom(2, (40, 40, 16)).data)
    first, second = (Predictor(model, "cpu").predict(phantom) for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.decisions, second.decisions)
    assert first.timings.keys() == {"normalise", "network", "total"}
    assert 0 < first.timings["network"] <= first.timings["total"]


def test_a_spacing_the_model_was_not_trained_on_is_a_warning(model):
    predictor, data = Predictor(model, "cpu"), noise(16, 16, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(volume(data, LPS * [1.02, 1.02, 0.97, 1]))
    with pytest.warns(UserWarning, match="case: its voxels are 1 x 1 x 5 mm, .* 1 x 1 x 1 mm"):
        predictor.predict(volume(data, LPS * [1, 1, 5, 1]))


def test_a_tilted_gantry_is_a_warning(model):
    predictor, data = Predictor(model, "cpu"), noise(16, 16, 3)
    tilted = LPS.copy()
    tilted[1, 2] = 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(volume(data, tilted))
    tilted[1, 2] = np.tan(np.radians(15))
    tilted[:3, 2] *= np.cos(np.radians(15))
    with pytest.warns(UserWarning, match="^case: its voxel axes are 15 degrees off right angles"):
        predictor.predict(volume(data, tilted))


def test_an_oblique_scan_is_a_warning(model):
    predictor, data = Predictor(model, "cpu"), noise(16, 16, 3)
    for angle in (0, 15, 35):
        affine = LPS.copy()
        affine[:3, :3] = Rotation.from_euler("x", angle, degrees=True).as_matrix() @ LPS[:3, :3]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            predictor.predict(volume(data, affine))
        told = [str(warning.message) for warning in caught]
        assert len(told) == (angle > 20)
    assert told[0].startswith("case: its voxel axes are 35 degrees off the body's; resample")


def test_a_scan_of_zeros_is_a_warning(model):
    predictor, data = Predictor(model, "cpu"), np.zeros_like(noise(16, 16, 3))
    with pytest.warns(UserWarning, match="^case: its voxels are all 0; look at the scan$"):
        predictor.predict(volume(data))
    data[:, 5, 5, 1] = 1, 2, 3, 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict(volume(data))


@pytest.mark.parametrize(("sform", "qform"), [(0, 0), (1, 0), (0, 1), (4, 2)])
def test_a_header_without_an_orientation_is_a_warning(model, tmp_path, sform, qform):
    """Whose axes are then, as in nibabel, those that the warning names."""
    image = nib.Nifti1Image(noise(24, 24, 3)[0], np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine, qform)
    files = {kind: tmp_path / f"{kind}.nii" for kind in MRI}
    for path in files.values():
        nib.save(image, path)
    scan = load_volume(files)
    answer(model, lambda slices: slices[:, 0] > 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Predictor(model, "cpu").predict(scan)
    found = [str(w.message) for w in told if "orientation" in str(w.message)]
    assert len(found) == (sform == qform == 0)
    if found:
        assert found[0].startswith(f"{scan.name}: its header tells no orientation (sform_code and")
        assert "Left, Anterior and Superior" in found[0]
        assert nib.aff2axcodes(nib.load(files["t1"]).affine) == ("L", "A", "S")


# a template may be turned that much
OBLIQUE = [[-0.9, 0.436, 0, 0], [-0.436, -0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(("qform", "code", "told"), [
    (np.diag([-1.0, -1.0, 1.0, 1.0]), 1, None),
    (np.diag([-1.01, -1.0, 0.99, 1.0]), 1, None),
    (np.diag([1.0, 1.0, 1.0, 1.0]), 0, None),
    (np.diag([-1.0, 1.0, -1.0, 1.0]), 1, "(LPS, 1 x 1 x 1 mm), which is used, and qform (LAI,"),
    (np.array(OBLIQUE), 1, None),
    (np.diag([-1.0, -1.0, 5.0, 1.0]), 1, "which is used, and qform (LPS, 1 x 1 x 5 mm) are two"),
    (None, 1, None),
])
def test_two_geometries_in_a_header_are_a_warning(model, tmp_path, qform, code, told):
    """But none beside a qform that is no rotation; in metres sizes are told in millimetres, too."""
    header = nib.Nifti1Header()
    header.set_data_shape((24, 24, 3))
    header.set_sform(LPS * [1e-3, 1e-3, 1e-3, 1], 1)
    if qform is None:
        header["quatern_b"] = header["quatern_c"] = 1
    else:
        header.set_qform(qform * [1e-3, 1e-3, 1e-3, 1])
    header["qform_code"] = code
    header.set_xyzt_units("meter")
    nib.save(nib.Nifti1Image(noise(24, 24, 3)[0], None, header), tmp_path / "t1.nii")
    scan = replace(load_volume({"t1": tmp_path / "t1.nii"}), data=noise(24, 24, 3), modalities=MRI)
    answer(model, lambda slices: slices[:, 0] > 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Predictor(model, "cpu").predict(scan)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (told is not None)
    assert all(told in message for message in messages)


def test_a_ct_without_a_window_is_a_warning():
    """As of weights from before training refused it; values from 0 up lie in the mask."""
    one = build_med_danet_v2("unet-12", 1, 3, crop_sizes=(16,))
    positive = np.random.default_rng(0).uniform(1, 900, (1, 32, 32, 12)).astype(np.float32)

    def predict(data, modality, **facts):
        one.metadata = {"modalities": [modality], **facts}
        case = Volume(data, LPS, None, (modality,), "files", "case")
        Predictor(one, "cpu").predict(case)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(positive, "ct")
        predict(positive - 100, "ct", window_hu=[-160, 240])
    with pytest.warns(UserWarning, match=r"^case: 1\d% of its voxels that are not 0 are negative"):
        predict(positive - 100, "mri")
    with pytest.warns(UserWarning, match="^case: is a CT with negative values, .* window_hu"):
        predict(positive - 100, "ct")


def test_a_ct_with_an_offset_is_a_warning():
    """As it lies in a file whose rescale intercept got lost; a window above 0 asks for no air."""
    one = build_med_danet_v2("unet-12", 1, 3, crop_sizes=(16,))
    hounsfield = np.random.default_rng(0).integers(-1000, 900, (1, 32, 32, 12)).astype(np.float32)

    def told(data, *window_hu):
        one.metadata = {"modalities": ["ct"], "window_hu": window_hu}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Predictor(one, "cpu").predict(Volume(data, LPS, None, ("ct",), "lits", "case"))
        return [str(warning.message) for warning in caught]

    assert not told(hounsfield, -160, 240) and not told(hounsfield + 1000, 0, 80)
    assert not told(hounsfield.clip(-160, 240), -160, 240)
    (message,) = told(hounsfield + 1024, -160, 240)
    assert message.startswith("case: its values begin at 24, while air has -1000 Hounsfield units")


def test_defaults_of_pytorch_change_nothing(model):
    """A device and a dtype, as a program of one's own sets them."""
    scan = volume(noise(24, 32, 5))
    expected = VolumePredictor(model, "cpu").predict(scan)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = VolumePredictor(model, "cpu").predict(scan)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("labels", "decisions", "offsets", "num_bits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.cost == expected.cost


def test_the_engine_is_what_predicts(model, tolerances):
    """The default executor on a phantom, with a size that has to be padded, against eager."""
    phantom = volume(make_phantom(1, (42, 44, 20)).data)
    found = VolumePredictor(model, "cpu").predict(phantom)
    expected = VolumePredictor(model, "cpu", executor="eager").predict(phantom)
    assert np.array_equal(found.decisions, expected.decisions)
    assert np.array_equal(found.num_bits, expected.num_bits)
    assert found.cost == expected.cost
    tolerances.labels(found.labels, expected.labels, share=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": "torch", "window": 24}, "executor torch runs no windows; use auto or eager"),
        ({"executor": "fast"}, "executor is 'fast', expected one of auto, openvino, torch, triton"),
        ({"device": "gpu"}, "device is 'gpu', expected auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is 'meta', expected auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:77"}, "this machine has .* CUDA GPUs; use cpu"),
        ({"window": 20}, "window is 20, expected a multiple of 8 that is at least 16"),
        ({"window": 8}, "window is 8, expected a multiple of 8 that is at least 16"),
        ({"window": "128"}, "window is '128', expected None or a whole number of pixels"),
        ({"labels": "brats1999"}, "'brats1999', expected one of brats2021, brats2023, msd"),
    ],
)
def test_arguments_that_cannot_be(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        VolumePredictor(model, **arguments)


def test_a_module_that_routes_nothing_is_refused_at_once(model):
    for make in (VolumePredictor, compile_engine):
        with pytest.raises(ValueError, match="model is a UNet, which routes no slices; expected"):
            make(model.segmenter)


@pytest.mark.parametrize(("modalities", "num_classes"), [(("mri",) * 4, 4), (MRI, 6)])
def test_classes_of_which_nobody_has_told_keep_their_numbers(modalities, num_classes):
    """Class 3 is an enhancing tumour, 4 in BraTS 2021, in a brain tumour's model alone."""
    untold = build_med_danet(("unet-2",), num_classes=num_classes)
    answer(untold, lambda slices: torch.full((len(slices), 24, 32), 3))
    scan = volume(noise(24, 32, 2), modalities=modalities, convention="files")
    prediction = Predictor(untold, "cpu").predict(scan)
    assert np.unique(prediction.labels) == [3] and prediction.label_convention == "values"
    assert prediction.label_values == {k: k for k in range(1, num_classes)}


def test_labels_of_files_that_once_named_background_too(model):
    """As training wrote them for a label map with {0: 0}; and a convention that says nothing."""
    model.metadata = {
        **model.metadata, "label_values": {"0": 0, "1": 5, "2": 6, "3": 7, "9": 300},
        "label_convention": "brats2021",
    }
    answer(model, lambda slices: torch.full((len(slices), 24, 32), 3))
    prediction = Predictor(model, "cpu").predict(volume(noise(24, 32, 2)))
    assert np.unique(prediction.labels) == [7] and prediction.label_convention == "values"
    assert prediction.label_values == {1: 5, 2: 6, 3: 7}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_windows_of_a_model_of_another_dtype(built, dtype):
    other = deepcopy(built).to(dtype)
    scan = volume(noise(24, 32, 2))
    prediction = VolumePredictor(other, "cpu", window=16).predict(scan)
    assert prediction.labels.shape == (24, 32, 2) and len(prediction.windows) > 1


def test_the_callers_autocast_does_not_reach_windows(built):
    whole = deepcopy(built)
    with torch.no_grad():  # of features that are not 0
        whole.policy.last[1].bias.fill_(1.0)
        whole.policy.classifier.weight.copy_(torch.tensor([[-1.0], [-1.0], [1.0]]))
    scan, predictor = volume(noise(24, 32, 4)), VolumePredictor(whole, "cpu", window=16)
    expected = predictor.predict(scan).labels
    assert len(np.unique(expected)) > 1
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(predictor.predict(scan).labels, expected)


def test_a_convention_with_too_few_labels_is_refused_before_the_work():
    many = build_med_danet(("unet-2",), num_classes=6)
    with pytest.raises(ValueError, match="brats2023 has three classes, the model 5; say by label_"):
        VolumePredictor(many, "cpu", labels="brats2023")
    many.metadata = {"modalities": list(MRI), "label_values": {"1": 1, "2": 2}}
    with pytest.raises(ValueError, match="lack class 3, 4, 5"):
        VolumePredictor(many, "cpu")
