"""Weights files: complete, self-describing, and refused in one line where they are not."""

from __future__ import annotations

import json
import math
import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from meddanet.build import build_med_danet, build_med_danet_v2, build_segmenter
from meddanet.layers import quantized_layers
from meddanet.med_danet import MedDANet
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.weight_files import PRETRAINED, pretrained_names, read_facts
from meddanet.weights import load_model, save_model, take_weights

pytestmark = pytest.mark.usefixtures("few_units")


@pytest.fixture(scope="module")
def model() -> MedDANetV2:
    torch.manual_seed(0)
    model = build_med_danet_v2(
        "unet-12", in_channels=2, num_classes=3, crop_sizes=(16, 24), num_bits=(4, 8)
    )
    for number, layer in enumerate(quantized_layers(model).values()):
        layer.input_amax.fill_(1 + number / 7)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return model.eval()


@pytest.fixture
def path(model, tmp_path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_model(
        model, path, modalities=("t1", "t2"), label_convention="msd", trained_on=["p1", "p2"]
    )
    return path


def test_a_model_comes_back_as_it_was(model, path):
    loaded = load_model(path)
    expected, actual = model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    layers = quantized_layers(loaded)
    for name, layer in quantized_layers(model).items():
        assert layers[name].input_amax == layer.input_amax
        assert layers[name].quantize and not layers[name].update_range
    assert not loaded.training and loaded.routes == ("skip", "crop-16", "crop-24", "whole")
    slices = torch.randn(3, 2, 32, 32)
    assert torch.equal(loaded.segment(slices).labels, model.segment(slices).labels)


def test_defaults_and_the_generator_have_no_part_in_loading(model, path):
    generator = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as torch.set_default_device sets it
            loaded = load_model(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), generator)
    buffers = dict(loaded.named_buffers()), dict(model.named_buffers())
    for actual, expected in ((loaded.state_dict(), model.state_dict()), buffers):
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype, name
            assert torch.equal(actual[name], value), name


def test_weights_of_another_dtype_are_float32_once_loaded(model, path):
    save_model(deepcopy(model).bfloat16(), path, modalities=("t1", "t2"))
    loaded = load_model(path)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.policy.stem[0].weight, model.policy.stem[0].weight.bfloat16().float())


@pytest.mark.parametrize("build", [build_med_danet, build_med_danet_v2])
def test_a_model_by_numpys_numbers(tmp_path, build):
    number = np.int64
    if build is build_med_danet:
        model = build(("unet-4",), number(2), number(3))
    else:
        model = build("unet-4", number(2), number(3), (number(16),), np.array([8, 16]))
    save_model(model, tmp_path / "a.safetensors", modalities=("t1", "t2"))
    assert load_model(tmp_path / "a.safetensors").config == model.config


def test_another_model_takes_what_fits(model, path):
    """Another number of routes and of widths: the policy's answer and the selectors stay."""
    torch.manual_seed(1)
    other = build_med_danet_v2(
        "unet-12", in_channels=2, num_classes=3, crop_sizes=(32,), num_bits=(4, 8, 12)
    )
    before = {name: value.clone() for name, value in other.state_dict().items()}
    left, facts = take_weights(other, path)
    assert facts["trained_on"] == ["p1", "p2"]
    ends = [f"{k}.linear.{name}" for k in range(4) for name in ("weight", "bias")]
    assert sorted(left) == sorted([
        *(f"bit_selectors.{end}" for end in ends), "policy.classifier.weight"
    ])
    theirs = model.state_dict()
    for name, value in other.state_dict().items():
        assert torch.equal(value, (before if name in left else theirs)[name]), name
    ranges = {name: layer.input_amax for name, layer in quantized_layers(model).items()}
    for name, layer in quantized_layers(other).items():
        assert layer.input_amax == ranges[name]


def test_weights_of_which_nothing_fits(path):
    other = build_med_danet(["unet-2"], 2, 3)
    with pytest.raises(ValueError, match="tiny.safetensors: none .* fits this MedDANet;"):
        take_weights(other, path)


def test_the_file_says_what_it_is(model, path):
    with safe_open(path, framework="pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
        names = set(file.keys())
        amax = file.get_tensor("quantization.segmenter.init.input_amax")
    assert amax == model.segmenter.init.input_amax
    ranges = {name for name in names if name.startswith("quantization.")}
    assert len(ranges) == len(quantized_layers(model))
    assert names - ranges == model.state_dict().keys()
    assert facts["modalities"] == ["t1", "t2"] and facts["label_convention"] == "msd"
    assert facts["trained_on"] == ["p1", "p2"] and facts["spacing_mm"] == [1.0, 1.0, 1.0]
    assert facts["architecture"] == {
        "segmenter": "unet-12", "in_channels": 2, "num_classes": 3, "crop_sizes": [16, 24],
        "num_bits": [4, 8], "decision_network": "shufflenetv2-m", "decision_scale": 1,
        "quantize_decisions": True, "position_network": None,
    }
    assert facts["model"] == "MedDANetV2"
    assert load_model(path).metadata == facts


def test_the_same_weights_are_the_same_file(model, path):
    """Results tell weights by their SHA-256; safetensors writes facts in an order of chance."""
    once = path.read_bytes()
    for _ in range(5):
        save_model(
            model, path, trained_on=["p1", "p2"], label_convention="msd", modalities=("t1", "t2")
        )
        assert path.read_bytes() == once
    header = 8 + int.from_bytes(once[:8], "little")
    assert header % 8 == 0 and len(once) == header + sum(
        tensor.nbytes for tensor in load_file(path).values()
    )


FACTS = {
    "modalities": ["mri", "ct"], "label_convention": "values", "label_values": {"1": 7, "2": 9},
    "window_hu": [-160, 240], "spacing_mm": [1.5, 1.5, 3.0], "canvas": [48, 64],
    "centre": [20.5, 31.0], "trained_on": ["p1"],
}


def test_what_a_file_says_is_said_again_when_its_model_is_saved_anew(model, tmp_path):
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    values = {int(k): v for k, v in FACTS["label_values"].items()}
    given = {**FACTS, "modalities": ("MRI", "CT"), "label_values": values}
    save_model(model, first, **{k: v for k, v in given.items() if k != "label_convention"})
    assert FACTS.items() <= load_model(first).metadata.items()
    save_model(load_model(first), second)
    assert load_model(second).metadata == load_model(first).metadata
    save_model(load_model(first), second, label_convention="values")
    assert load_model(second).metadata == load_model(first).metadata
    # what is given anew takes the place of both ways to say what labels are
    save_model(load_model(first), third, label_convention="msd", canvas=[8, 8])
    told = load_model(third).metadata
    assert (told["label_convention"], told["canvas"]) == ("msd", [8, 8])
    assert "label_values" not in told and told["window_hu"] == FACTS["window_hu"]


@pytest.mark.parametrize(
    ("num_classes", "modalities", "expected"),
    [
        (4, ("flair", "t1"), ("brats2021", None)),
        (3, ("flair", "t1"), ("values", {"1": 1, "2": 2})),
        (4, ("mri", "t1"), ("values", {"1": 1, "2": 2, "3": 3})),
    ],
)
def test_classes_of_which_nobody_has_told(tmp_path, num_classes, modalities, expected):
    """A brain tumour's by default, if they can be that; all others as they are."""
    model = build_med_danet(("unet-2",), in_channels=2, num_classes=num_classes)
    save_model(model, tmp_path / "a.safetensors", modalities=modalities)
    facts = load_model(tmp_path / "a.safetensors").metadata
    assert (facts["label_convention"], facts.get("label_values")) == expected


@pytest.mark.parametrize(
    ("name", "value"), [("window_hu", [1]), ("canvas", "a"), ("modalities", [7]),
                        ("label_values", [1, 2]), ("spacing_mm", {"x": 1})],
)
def test_a_file_whose_facts_cannot_be_read_is_named(model, tmp_path, name, value):
    """As another program, or an earlier version, may have written them."""
    path = tmp_path / "a.safetensors"
    save_model(model, path, modalities=("t1", "t2"))
    with safe_open(path, "np") as file:
        facts = file.metadata() | {name: json.dumps(value)}
    save_file(load_file(path), path, facts)
    for read in (load_model, read_facts):
        with pytest.raises(ValueError, match=f"^{path}: {name} (is|are) .*; save it anew by save_"):
            read(path)


def test_an_interrupted_save_leaves_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="No space left"):
        save_model(model, path, modalities=("t1", "t2"))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        save_model(model, tmp_path / "model.pt", modalities=("t1", "t2"))
    file = tmp_path / "model.safetensors"
    for options, message in (
        ({"modalities": ("t1",)}, "modalities are t1, expected 2 names"),
        ({"modalities": "t1"}, "modalities are t1, expected 2 names"),
        ({"label_convention": "mine"}, "'mine', expected one of brats2021, brats2023, msd"),
        ({"label_values": {1: 300, 2: 1}}, "expected class -> value from 1 to 255"),
        ({"label_values": {1: True, 2: 1}}, "expected class -> value from 1 to 255"),
        ({"label_values": [1, 2]}, "expected class -> value from 1 to 255"),
        ({"label_values": {1: 7}}, r"label_values \{1: 7\} lack class 2"),
        ({"label_values": {0: 3, 1: 1, 2: 2}}, "label_values are of 0, expected classes 1 to 2"),
        ({"label_values": {1.7: 1, 1: 1, 2: 2}}, "label_values are of 1.7, expected classes"),
        ({"label_values": {1: 1, 2: 2}, "label_convention": "msd"}, "give one of them"),
        ({"label_values": {"one": 1, 1: 1, 2: 2}}, "are of one, expected classes 1 to 2"),
        ({"note": np.float32(1)}, "notes: Object of type float32 is not JSON serializable"),
        ({"spacing_mm": 1.0}, "spacing_mm is 1.0, expected 3 numbers above 0"),
        ({"spacing_mm": [1, 1, 0]}, r"spacing_mm is \[1, 1, 0\], expected 3 numbers above 0"),
        ({"window_hu": "-160,240"}, "window_hu is -160,240, expected 2 numbers$"),
        ({"window_hu": (240, -160)}, "window_hu is 240, -160, expected the lower value first"),
        ({"centre": [math.nan, 1]}, r"centre is \[nan, 1\], expected 2 numbers$"),
        ({"centre": [10**40, 1]}, "expected 2 numbers$"),
        ({"canvas": [True, 48]}, r"canvas is \[True, 48\], expected 2 whole numbers above 0"),
        ({"canvas": [48.5, 48]}, r"canvas is \[48.5, 48\], expected 2 whole numbers above 0"),
        ({"meddanet": "9", "architecture": "mine"}, "called architecture, meddanet, which is what"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(model, file, **{"modalities": ("t1", "t2"), **options})
    more = build_med_danet(("unet-2",), num_classes=5)
    with pytest.raises(ValueError, match="msd has three classes, the model 4; say by label_values"):
        save_model(more, file, label_convention="msd")
    own = MedDANet(bank=more.bank, decision=more.decision, in_channels=4, num_classes=5)
    for odd in (own, more.bank[0]):
        with pytest.raises(ValueError, match=f"of this {type(odd).__name__} keep the state_dict"):
            save_model(odd, file)
    assert not file.exists()
    with pytest.raises(ValueError, match="cannot be written"):
        save_model(model, tmp_path / "no" / "model.safetensors", modalities=("t1", "t2"))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (build_segmenter("unet-8", 2, 3), r"segmenter\.dec"),
        (torch.nn.Conv2d(2, 4, 1), r"quantization\.segmenter"),
    ],
    ids=["shape", "missing"],
)
def test_a_part_that_was_replaced_is_refused_before_anything_is_written(tmp_path, part, name):
    """load_model builds by the config and could not read it."""
    model = build_med_danet_v2("unet-12", in_channels=2, num_classes=3, crop_sizes=(16,))
    model.segmenter = part
    with pytest.raises(ValueError, match=f"not what its config builds: .* first {name}"):
        save_model(model, tmp_path / "a.safetensors", modalities=("t1", "t2"))
    assert not any(tmp_path.iterdir())


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(ValueError, match=r"brats1999: no such weights; .*brats2021"):
        load_model("brats1999")
    with pytest.raises(ValueError, match="no such weights"):
        load_model("folder/model.safetensors")


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"PK\x03\x04" + bytes(200)])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other.safetensors: is not a meddanet weights file"):
        load_model(path)


def test_a_truncated_file(path):
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="is not a meddanet weights file"):
        load_model(path)


def rewrite(path: Path, architecture: dict | None = None, **tensors: torch.Tensor | None) -> None:
    """Changes a weights file by way of the safetensors library alone."""
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118
    if architecture is not None:
        facts["architecture"] = json.dumps(json.loads(facts["architecture"]) | architecture)
    save_file({name: v for name, v in content.items() if v is not None}, path, facts)


def test_a_file_that_says_nothing_of_its_architecture(tmp_path):
    path = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="plain.safetensors: its architecture is not one"):
        load_model(path)


@pytest.mark.parametrize(
    "change",
    [{"segmenter": "vgg-16"}, {"heads": 8}, {"crop_sizes": [20]}, {"in_channels": -4}], ids=str,
)
def test_an_architecture_of_another_time(path, change):
    rewrite(path, change)
    with pytest.raises(ValueError, match="its architecture is not one that meddanet .* builds"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segmenter.init.weight", None),
        ("segmenter.init.weight", torch.zeros(12, 2, 5, 5)),
        ("quantization.segmenter.init.input_amax", None),
        ("another.weight", torch.zeros(1)),
    ],
    ids=["missing", "shape", "range", "unknown"],
)
def test_tensors_that_do_not_fit(path, name, value):
    rewrite(path, **{name: value})
    with pytest.raises(ValueError, match=f"1 tensors do not fit its architecture, first {name};"):
        load_model(path)


def test_weights_of_other_sizes_do_not_fit(path):
    rewrite(path, {"segmenter": "unet-16"})
    with pytest.raises(ValueError, match="tensors do not fit its architecture"):
        load_model(path)


@pytest.mark.usefixtures("all_units")
def test_every_shipped_file_is_small_and_has_its_card():
    assert "brats2021" in pretrained_names()
    for name in pretrained_names():
        assert (PRETRAINED / f"{name}.safetensors").stat().st_size <= 8e6
        assert (PRETRAINED / f"{name}.md").is_file()
        model = load_model(name)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        layers = quantized_layers(model).values()
        assert all(layer.input_amax > 0 for layer in layers if layer.quantize)
        assert any(layer.quantize for layer in layers)
        assert {"modalities", "label_convention", "trained_on"} <= model.metadata.keys()
