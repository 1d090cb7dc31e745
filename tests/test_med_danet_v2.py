"""The dynamic model; each test named d1..d13 holds a defect of the official code at bay."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meddanet.build import build_med_danet_v2
from meddanet.cost import cost_table
from meddanet.data import Volume, from_slices, to_slices
from meddanet.layers import BitSelector, QuantConv2d, set_quantization
from meddanet.losses import segmentation_loss
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.networks.decision import ShuffleNetV2
from meddanet.predictor import VolumePredictor

pytestmark = pytest.mark.usefixtures("few_units")


class FixedLogits(nn.Module):
    """A decision network whose answer for each slice is written in the slice's first pixel row."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, slices: torch.Tensor) -> torch.Tensor:
        return self.table[slices[:, 0, 0, 0].round().long()]


@pytest.fixture
def model() -> MedDANetV2:
    torch.manual_seed(0)
    model = build_med_danet_v2("unet-12", num_classes=3, in_channels=2, crop_sizes=(16, 24))
    set_quantization(model, quantize=False, update_range=False)
    model.policy = FixedLogits(torch.eye(4) * 9)
    return model.eval()


class AlwaysWhole(nn.Module):
    """A policy that lets no slice go."""

    def forward(self, slices):
        return torch.eye(3)[[2] * len(slices)]


class Shares(nn.Module):
    """A position network: the mean of each of two channels."""

    def forward(self, slices):
        return slices.mean((2, 3))


class Own(nn.Module):
    """A segmenter of another make, with an `encoder` of its own kind."""

    in_channels, num_classes, stride = 2, 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 6, 3, padding=1)
        self.encoder = nn.Conv2d(6, 6, 1)
        self.last_stage = nn.Conv2d(6, 3, 1)

    def features(self, input, choose_bits=None):
        return self.encoder(self.body(input))

    def forward(self, input):
        return self.last_stage(self.features(input))


@pytest.mark.parametrize("strict", [False, True])
def test_branches_are_exported_for_any_number_of_slices(strict, monkeypatch):
    monkeypatch.setattr(ShuffleNetV2, "repeats", (1, 1, 1))

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_med_danet_v2("unet-4", 2, 3, crop_sizes=(16,)).eval()
            set_quantization(self.model, quantize=False, update_range=False)

        def forward(self, slices):
            return self.model.decide(slices), self.model.locate(slices)

    whole, dims = Whole(), ({0: torch.export.Dim("slices", min=2, max=64)},)
    program = torch.export.export(
        whole, (torch.rand(2, 2, 32, 32),), dynamic_shapes=dims, strict=strict
    ).module()
    slices = torch.rand(5, 2, 32, 32)
    torch.testing.assert_close(program(slices), whole(slices))


def test_a_segmenter_of_another_make_without_widths():
    """It segments whole volumes, and its cost is told by its own parts."""
    torch.manual_seed(0)
    model = MedDANetV2(
        segmenter=Own(), policy=AlwaysWhole(), position=Shares(),
        bit_selectors=[], crop_last_stages=[nn.Conv2d(6, 3, 1)], crop_sizes=(16,),
    )
    data = np.random.default_rng(0).uniform(1, 9, (2, 24, 32, 5)).astype(np.float32)
    volume = Volume(data, np.diag([-1.0, -1.0, 1.0, 1.0]), None, ("a", "b"))
    predictor = VolumePredictor(model, "cpu")
    prediction = predictor.predict(volume)
    own = model.segmenter(predictor.fitted(torch.from_numpy(to_slices(volume)))).argmax(1)
    assert np.array_equal(prediction.labels, from_slices(own.numpy().astype(np.uint8), volume))
    assert prediction.num_bits.shape == (5, 0) and prediction.label_convention == "values"
    pixels = 24 * 32
    assert prediction.cost["mac"] == 5 * pixels * (2 * 6 * 9 + 6 * 6 + 6 * 3)
    assert prediction.cost["scaled_paper"] == prediction.cost["paper"] == prediction.cost["mac"]
    table = cost_table(model, (1, 2, 24, 32))
    assert {part: macs / pixels for part, macs in table.parts["whole"].items()} == {
        "body": 108, "encoder": 36, "last_stage": 18
    }


class Listed(Own):
    """One whose stages follow the chosen widths: in an `encoder` in sequence, or in a list."""

    def __init__(self, name: str) -> None:
        super().__init__()
        del self.encoder
        self.name, stages = name, [QuantConv2d(6, 6, 1), QuantConv2d(6, 6, 1)]
        kind = nn.Sequential(*stages) if name == "encoder" else nn.ModuleList(stages)
        self.add_module(name, kind)

    def features(self, input, choose_bits=None):
        feature = self.body(input)
        for index, stage in enumerate(getattr(self, self.name)):
            width = None if choose_bits is None else choose_bits(index, feature)
            feature = stage(feature, width, width)
        return feature


@pytest.mark.parametrize("name", ["encoder", "levels"])
def test_stages_of_another_make_are_no_selectors(name):
    model = MedDANetV2(
        segmenter=Listed(name), policy=AlwaysWhole(), position=Shares(),
        bit_selectors=[BitSelector(6, 2), BitSelector(6, 2)],
        crop_last_stages=[nn.Conv2d(6, 3, 1)], crop_sizes=(16,),
    )
    table, pixels = cost_table(model, (1, 2, 16, 16)), 16 * 16
    parts = {part: macs for part, macs in table.parts["whole"].items() if part != "selectors"}
    listed = {"enc1": 36, "enc2": 36} if name == "encoder" else {name: 72}
    assert parts == {
        part: count * pixels for part, count in {"body": 108, **listed, "last_stage": 18}.items()
    }
    # two linear layers of 6 spreads and 4 gradients each, and the gradients' nine taps, four times
    assert table.parts["whole"]["selectors"] == 2 * 2 * (6 + 4) + 4 * 9 * pixels
    staged = sum(table.staged["whole"].values())
    assert staged == (72 * pixels if name == "encoder" else 0)


class Halved(Own):
    """One that leaves its features at half of the size, for its last stage to enlarge."""

    def features(self, input, choose_bits=None):
        return F.avg_pool2d(super().features(input), 2)


class Answer(nn.Module):
    """A network that answers each slice with as many numbers."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, slices):
        return slices.new_ones(len(slices), *self.shape).cumsum(1)


def made_by_hand(**changes) -> MedDANetV2:
    parts = {
        "segmenter": Own(), "policy": Answer(3), "position": Shares(), "bit_selectors": [],
        "crop_last_stages": [nn.Conv2d(6, 3, 1)], "crop_sizes": (16,),
    }
    return MedDANetV2(**{**parts, **changes}).eval()


@pytest.mark.parametrize(
    ("parts", "message"),
    [({"crop_sizes": (18,)}, r"crop_sizes must be multiples of 4, got \(18,\)"),
     ({"crop_sizes": (0,)}, r"crop_sizes must be multiples of 4, got \(0,\)"),
     ({"crop_sizes": (16, 24)}, "one for each of 2 crop_sizes, got 1"),
     ({"crop_sizes": ()}, "one for each of 0 crop_sizes, got 1")],
)
def test_parts_that_do_not_belong_together(parts, message):
    with pytest.raises(ValueError, match=message):
        made_by_hand(**parts)


@pytest.mark.parametrize(
    ("parts", "message"),
    [({"policy": Answer(1)}, r"policy must return shape \[2, 3\], got \[2, 1\]"),
     ({"policy": Answer(4)}, r"policy must return shape \[2, 3\], got \[2, 4\]"),
     ({"position": Answer(1)}, r"position must return shape \[2, 2\], got \[2, 1\]"),
     ({"position": Answer(2, 1, 1)}, r"shape \[2, 2\], got \[2, 2, 1, 1\]"),
     ({"segmenter": Halved()}, r"features must return shape \[2, 6, 16, 16\], got \[2, 6, 8, 8\]"),
     ({"bit_selectors": [BitSelector(6, 2)]}, "once for each of 1 bit_selectors, asked 0 times")],
)
def test_answers_of_another_shape_are_refused(parts, message):
    """Broadcast or pasted they would be a route that is none, one share for two, a smaller crop."""
    model = made_by_hand(**parts)
    slices = torch.rand(2, 2, 24, 32)
    with pytest.raises(ValueError, match=message):
        model(slices)
    if "policy" not in parts:
        model.policy = Crop()
    with pytest.raises(ValueError, match=message):
        model.segment(slices)


class Crop(nn.Module):
    """A policy that has every slice cropped."""

    def forward(self, slices):
        return torch.eye(3)[[1] * len(slices)]


def slices_for(decisions: list[int], side: tuple[int, int] = (40, 48)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    slices = torch.randn(len(decisions), 2, *side, generator=generator)
    slices[:, 0, 0, 0] = torch.tensor(decisions, dtype=torch.float32)
    return slices


def expected_labels(model: MedDANetV2, slices: torch.Tensor, decision: int) -> torch.Tensor:
    """One slice, by hand: slicing instead of the crop op, an indexed copy instead of the paste."""
    height, width = slices.shape[2:]
    if decision == 0:
        return torch.zeros(1, height, width, dtype=torch.uint8)
    if decision == 3:
        return model.segmenter(slices).argmax(1).to(torch.uint8)
    size = model.crop_sizes[decision - 1]
    share = model.position(slices).sigmoid()[0]
    # the centre of the smallest crop, and what keeps a larger one inside
    y, x = (
        min(max(int((part * (side - 16) + 8 - size / 2).round()), 0), side - size)
        for part, side in zip(share, (height, width), strict=True)
    )
    features = model.segmenter.features(slices[:, :, y : y + size, x : x + size])
    canvas = torch.zeros(1, features.shape[1], height, width)
    canvas[:, :, y : y + size, x : x + size] = features
    return model.crop_last_stages[decision - 1](canvas).argmax(1).to(torch.uint8)


@torch.no_grad()
def test_d8_segment_routes_a_mixed_batch_as_slice_by_slice(model):
    decisions = [0, 1, 3, 2, 1, 0, 3]
    slices = slices_for(decisions)
    result = model.segment(slices)
    assert result.decisions.tolist() == decisions
    for index, decision in enumerate(decisions):
        wanted = expected_labels(model, slices[index : index + 1], decision)
        # rounding differs with the batch only where two logits tie
        assert (result.labels[index] != wanted[0]).float().mean() < 1e-3


@torch.no_grad()
def test_d1_a_crop_comes_back_where_it_was_cut(model):
    """With the segmenter an identity, a bright pixel returns to its own place."""

    class Identity(nn.Module):
        in_channels, num_classes, stride = 2, 3, 8

        def features(self, input, choose_bits=None):
            for stage in range(4):
                choose_bits(stage, input)
            return input

    model.segmenter = Identity()
    model.bit_selectors = nn.ModuleList(
        type(selector)(2, in_channels=2) for selector in model.bit_selectors
    )
    model.crop_last_stages[0] = nn.Identity()
    slices = torch.zeros(1, 2, 40, 48)
    slices[0, 1, 12, 30] = 1.0
    logits, _ = model.crop_branch(slices, torch.tensor([[4.0, 20.0]]), 0)
    assert torch.equal(logits, slices)


def test_d2_the_crop_teaches_the_position_network(model):
    slices = slices_for([1, 1])
    offset = model.offset(model.locate(slices), 16, 40, 48).detach().requires_grad_()
    from meddanet.kernels import bilinear_crop

    bilinear_crop(slices, offset, 16).square().sum().backward()
    assert (offset.grad.abs() > 1e-3).all()
    out = model.train()(slices)
    out.branch_logits[0].square().mean().backward()
    assert model.position.classifier.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_d3_evaluation_is_deterministic(model):
    slices = slices_for([3, 1, 2])
    first, second = model(slices), model(slices)
    assert torch.equal(first.mixed, second.mixed)
    assert torch.equal(model.segment(slices).labels, model.segment(slices).labels)


@torch.no_grad()
def test_d4_skip_is_background_with_probability_one(model):
    slices = slices_for([0, 0])
    mixed = model(slices).mixed
    assert torch.equal(mixed[:, 0], torch.ones(2, 40, 48)) and not mixed[:, 1:].any()
    assert not model.segment(slices).labels.any()


@torch.no_grad()
def test_d4_a_skipping_window_votes_for_background(model):
    """Where windows disagree, the mean counts the skipping ones as background, none abstains."""
    slices = slices_for([3], (48, 48))
    slices[0, 0] = 0.0
    slices[0, 0, 0, 0] = 3.0  # only the first window runs; all others read decision 0
    result = model.segment_windows(slices, window=32)
    origins = [(y, x) for y in (0, 10, 16) for x in (0, 10, 16)]
    assert result.decisions[0].tolist() == [3] + [0] * 8
    votes = torch.zeros(3, 48, 48)
    for y, x in origins:
        if (y, x) == (0, 0):
            votes[:, :32, :32] += model.segmenter(slices[:, :, :32, :32]).softmax(1)[0]
        else:
            votes[0, y : y + 32, x : x + 32] += 1
    assert torch.equal(result.labels[0].long(), votes.argmax(0))


def test_d12_calling_the_background_one_class_is_no_optimum():
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, 10:14, 10:14] = 2
    absorbed = F.one_hot(torch.where(labels == 0, 1, labels), 4).movedim(-1, 1) * 10.0
    missed = F.one_hot(torch.zeros_like(labels), 4).movedim(-1, 1) * 10.0
    right = F.one_hot(labels, 4).movedim(-1, 1) * 10.0
    assert segmentation_loss(right, labels) < segmentation_loss(missed, labels)
    assert segmentation_loss(missed, labels) < segmentation_loss(absorbed, labels)


@torch.no_grad()
def test_results_do_not_depend_on_neighbours_in_the_batch(model):
    set_quantization(model, quantize=True, update_range=False)
    slices = slices_for([1, 3, 2, 1])
    together = model.segment(slices)
    for index in range(4):
        alone = model.segment(slices[index : index + 1])
        assert (alone.labels[0] != together.labels[index]).float().mean() < 1e-3
        assert torch.equal(alone.num_bits[0], together.num_bits[index])


@torch.no_grad()
def test_blank_slices_do_not_even_reach_the_policy(model):
    seen = []
    model.policy.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    slices = slices_for([0, 3, 1])
    slices[0] = 0
    assert not model.segment(slices).labels[0].any()
    assert seen == [2]


def test_training_output_is_differentiable_everywhere(model):
    model.policy = build_med_danet_v2(
        "unet-12", num_classes=3, in_channels=2, crop_sizes=(16, 24)
    ).policy
    set_quantization(model, quantize=True, update_range=True)
    out = model.train()(slices_for([1, 2, 3]))
    assert out.mixed.shape == (3, 3, 40, 48) and out.choice.shape == (3, 4)
    loss = out.mixed.square().mean() + sum(bits.mean() for bits in out.num_bits)
    loss = loss + sum(logits.square().mean() for logits in out.branch_logits)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 41, 48), "pad to 48x48"), ((1, 3, 40, 48), r"\[N, 2, H, W\]"),
     ((1, 2, 16, 48), "smaller than the crop of 24")],
)
def test_bad_shapes_name_the_cure(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.segment(torch.ones(shape))


def test_d5_a_batch_holds_every_sample_asked_for(tmp_path):
    import numpy as np

    from meddanet.data.slices import SliceSampler, read_cache, write_cache

    images, labels = np.ones((5, 2, 16, 16), np.float32), np.zeros((5, 16, 16), np.uint8)
    write_cache("a", images, labels, tmp_path)
    sampler = SliceSampler([read_cache("a", tmp_path)])
    images, labels = sampler.batch(np.random.default_rng(0), 15)
    assert images.shape == (15, 2, 16, 16) and labels.shape == (15, 16, 16)


def test_crops_of_all_sizes_share_their_centre():
    model = build_med_danet_v2("unet-12", crop_sizes=(16, 24))
    position = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    # 40 x 48: a crop of 16 has 24 x 32 pixels of play; (6, 16) is its corner, (14, 24) its centre
    assert model.offset(position, 16, 40, 48).tolist() == [[0, 32], [6, 16]]
    # one of 24 around (8, 40) would leave the slice
    assert model.offset(position, 24, 40, 48).tolist() == [[0, 24], [2, 12]]


@torch.no_grad()
def test_the_decision_networks_see_squares_averaged():
    """decision_scale 2: deciding on a slice equals deciding at scale 1 on its 2 x 2 means."""
    model = build_med_danet_v2("unet-12", 2, 3, crop_sizes=(16,), decision_scale=2).eval()
    slices = torch.randn(3, 2, 32, 48, generator=torch.Generator().manual_seed(0))
    means = slices.reshape(3, 2, 16, 2, 24, 2).mean((3, 5))
    assert torch.allclose(model.decide(slices), model.policy(means), atol=1e-5)
    assert torch.allclose(model.locate(slices), model.position(means).sigmoid(), atol=1e-5)
    with pytest.raises(ValueError, match="must divide the stride 8"):
        build_med_danet_v2("unet-12", decision_scale=3)


def test_the_segmenter_of_ones_own_that_the_readme_shows(capsys):
    """It is routed, and every slice is labelled."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", text, re.S) if "Mine" in part]
    found: dict = {"__name__": "readme"}
    exec(code, found)
    assert found["result"].labels.shape == (2, 240, 240)
    assert capsys.readouterr().out.startswith("eager ")
