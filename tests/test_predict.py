"""The prediction model against hand-worked cases, the vendor's arithmetic and the machine code."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from meddanet.build import build_decision_network, build_position_network
from meddanet.layers import set_quantization
from meddanet.networks.decision import ShuffleStem, ShuffleUnit

gpu_work = pytest.importorskip("gpu_work")
pytest.importorskip("triton")
plan_work = pytest.importorskip("plan_work")
predict = pytest.importorskip("predict")

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
VARIANTS = json.loads((RESULTS / "kernels_compiled.json").read_text())["variants"]
# int8 operations per clock and SM, of the four tensor cores together
PER_CLOCK = {"sm_80": 4096, "sm_86": 2048, "sm_89": 2048, "sm_90": 8192, "sm_120": 2048}
CARD = predict.Card("sm_89", 100, 2.0, 1000, 400, "made up")


@pytest.mark.parametrize("name", predict.CARDS)
def test_published_peaks_follow_from_clock_and_multiprocessors(name):
    card = predict.CARDS[name]
    tera = PER_CLOCK[card.arch] * card.multiprocessors * card.gigahertz / 1e3
    assert card.tera_ops == pytest.approx(tera, rel=5e-3)


@pytest.mark.parametrize(("work", "seconds", "bound"), [
    (gpu_work.Work("", 1e9), 1e-3, "memory"),
    (gpu_work.Work("", 1e6, 4e11), 1e-3, "operations"),
    (gpu_work.Work("", 1e6, 4e11, half=True), 2e-3, "operations"),
    # 100 SMs, 2 GHz, 128 bytes: 25.6 TB/s
    (gpu_work.Work("", 1e6, 1e9, 25.6e9), 1e-3, "shared memory"),
    # four instructions per clock and SM
    (gpu_work.Work("", 1e6, 1e9, 1e9, 8e8), 1e-3, "instructions"),
    (gpu_work.Work("", 1e5, launches=10), 11.3e-6, "launch"),
    (gpu_work.Work("", 1e5, programs=10000), 6e-6, "programs"),
])
def test_the_slowest_part_is_the_time(work, seconds, bound):
    found = predict.predict(work, CARD)
    assert found.bound == bound and found.seconds == pytest.approx(seconds)


def test_a_convolution_by_hand():
    """16 to 16 channels, 3x3, 240x240: what it moves and computes, at 8 and at 16 bit."""
    pixels, weights = 240 * 240, 9 * 16 * 16
    plain = gpu_work.Convolution("decoder block, first", 16, 16, 3, 240)
    work = plain.work(5, 8, None)
    assert work.operations == 5 * 2 * weights * pixels
    assert work.bytes == 5 * pixels * (16 + 16) + weights
    wide = plain.work(5, 16, None)
    # two byte planes each way, and four products of bytes
    assert wide.bytes == 2 * work.bytes and wide.operations == 4 * work.operations
    added = replace(plain, residual=True, stream=True).work(5, 8, None)
    assert added.bytes - work.bytes == 5 * pixels * 16 * (2 + 2)
    down = gpu_work.Convolution("down", 16, 32, 3, 240, stride=2, stream=True).work(1, 8, None)
    assert down.operations == 2 * 9 * 16 * 32 * 120 * 120
    assert down.bytes == pixels * 16 + 120 * 120 * 32 * (1 + 2) + 9 * 16 * 32


def test_shared_memory_traffic_and_instructions_by_hand():
    """450 tiles of 128 pixels, 160 bytes of each in, stored, read; weights read by two warps.

    Of 16 bits 900 parts of 64 pixels.
    """
    convolution = gpu_work.Convolution("decoder block, first", 16, 16, 3, 240)
    sizes = {"BLOCK_M": "128", "BLOCK_N": "16", "PART_M": "64", "PART_N": "16", "K": "160"}
    tile = {"constants": sizes, "of_these": {}, "num_warps": 2, "issued": 700}
    work = convolution.work(3, 8, tile)
    assert work.shared_bytes == 3 * 450 * 160 * (128 * 3 + 16 * (2 + 2))
    assert work.instructions == 3 * 450 * 2 * 700
    # codes of two bytes are copied, those of one still pass the registers
    copied = {**tile, "of_these": {"LDGSTS": 12}}
    assert convolution.work(3, 8, copied) == work
    wide = convolution.work(1, 16, copied)
    assert wide.shared_bytes == 2 * 900 * 160 * (64 * 2 + 16 * (1 + 2))
    assert wide.instructions == 450 * 2 * 700, "as if it had 8 bits"
    # two float32 per channel and tile
    told = replace(convolution, moments=True).work(3, 8, tile)
    assert told.bytes - work.bytes == 3 * 450 * 16 * 2 * 4


def test_the_list_of_convolutions_is_that_of_the_model():
    """Operations and launches agree with what PyTorch counts in U-Net-16 itself."""
    from torch.utils.flop_counter import FlopCounterMode

    from meddanet.build import build_segmenter

    network = build_segmenter("unet-16").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 4, 48, 48))
    listed = [c for c in [*gpu_work.unet(48), *gpu_work.last_stage(16, 48)] for _ in range(c.times)]
    last = 2 * 16 * 4 * 48 * 48  # the head's 1x1, which has its own kernel
    assert sum(c.work(1, 8, None).operations for c in listed) + last == counter.get_total_flops()
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    ways = [c for c in listed if isinstance(c, gpu_work.WayUp)]
    assert len(listed) + 2 * len(ways) + 1 == len(layers) and len(ways) == 3


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_120"])
def test_operations_are_those_of_the_machine_code(arch):
    """Each IMMA multiplies 16 x 8 x 32 per warp: tiles times instructions give the padded sums."""
    tiles = gpu_work.Tiles(VARIANTS, arch)
    checked = 0
    for convolution in [*gpu_work.unet(240), *gpu_work.last_stage(16, 240)]:
        tile = tiles(convolution)
        assert tile is not None, f"{convolution.label} was not compiled"
        constants = tile["constants"]
        if isinstance(convolution, gpu_work.WayUp):
            c, columns = int(constants["BLOCK_C"]), int(constants["COLUMNS"])
            # two neighbouring pixels' 16 channels in one product of up, and of fuse
            terms = 2 * c * c + 4 * c * columns + 4 * c // columns * 2 * columns**2
            products = tile["of_these"]["IMMA"] * tile["num_warps"] * 16 * 8 * 32
            assert products == int(constants["BLOCK_M"]) * terms, convolution.label
            checked += 1
            continue
        depth = int(constants["K"])
        if constants["WIDE"] == "True" or depth > 18 * int(constants["BLOCK_K"]):
            continue  # loops and branches: instructions are not executions
        block_m, block_n = int(constants["BLOCK_M"]), int(constants["BLOCK_N"])
        products = tile["of_these"]["IMMA"] * tile["num_warps"] * 16 * 8 * 32
        assert products == block_m * block_n * depth, convolution.label
        checked += 1
    assert checked >= 10


def test_half_precision_networks_by_hand():
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), nn.ReLU())
    work = plan_work.half_precision("net", layer, (3, 4, 10, 10))
    assert work.operations == 2 * 3 * 5 * 5 * 8 * 4 * 9 and work.half and work.launches == 1
    # a stage is one launch, whose maps between units are never stored
    units = [ShuffleUnit(8, 16, 2), *(ShuffleUnit(16, 16, 1) for _ in range(3))]
    stage = nn.Sequential(*units).eval()
    set_quantization(stage, quantize=False, update_range=False)
    stage = plan_work.half_precision("stage", stage, (3, 8, 20, 20))
    # all have 8 x 8 to expand and to mix and 8 x 9 per channel, the first one's side the last two
    first, other = 64 + 72 + 64 + 72 + 64, 64 + 72 + 64
    # it expands at four times as many pixels
    assert stage.launches == 1
    assert stage.operations == 2 * 300 * (first + 3 * 64 + 3 * other)
    assert stage.bytes == 2 * (3 * 8 * 400 + 3 * 16 * 100 + first + 3 * other)
    assert work.bytes == 2 * (3 * 4 * 100 + 3 * 8 * 25 + 8 * 4 * 9)
    # and so is a stem: what lies between convolution and pooling is never stored
    stem = ShuffleStem(4, 8).eval()
    set_quantization(stem, quantize=False, update_range=False)
    stem = plan_work.half_precision("stem", stem, (3, 4, 12, 12))
    assert stem.launches == 1 and stem.operations == 2 * 3 * 6 * 6 * 8 * 4 * 9
    assert stem.bytes == 2 * (3 * 4 * 144 + 3 * 8 * 9 + 8 * 4 * 9)


def test_decision_networks_by_hand():
    """Five launches and four, between which a map is stored once and read once."""
    policy = build_decision_network("shufflenetv2-m", 4)
    position = build_position_network("heatmap")
    maps = 12 * 8 * 8, 24 * 4 * 4, 48 * 2 * 2, 96
    for network, stored in ((policy.eval(), maps), (position.eval(), maps[:3])):
        work = plan_work.half_precision("net", network, (2, 4, 32, 32))
        weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
        assert work.launches == 1 + len(stored)
        assert work.bytes == 2 * (2 * 4 * 32 * 32 + 2 * 2 * sum(stored) + weights)


EIGHT = [{"8": 10}] * 4
TILES = gpu_work.Tiles(VARIANTS, "sm_90")


def test_the_prediction_goes_through_all_launches_of_the_plan():
    """The plan's own, in order; an H200 ran launches of these names."""
    work = plan_work.plan_work({"skip": 145, "crop-96": 10}, EIGHT, TILES)
    names = [part.name for part in work]
    assert names == [launch.name for launch in plan_work.shipped_plan(roomy=False).launches]
    now, measured = (
        json.loads((RESULTS / f"gpu_launches_h200_00000{suffix}.json").read_text())
        for suffix in ("", "_at_6eb4a23")
    )
    assert names == [name for name, _ in now["launches_us"]]
    ran = [name for name, _ in measured["launches_us"]]
    # launches of their own once: codes of nine skips, moments of twelve stages, two pastes, and
    # 27 convolutions where nine ways up are now
    assert names == predict.as_today(ran) and len(names) == 130 == len(ran) - 9 - 12 - 2 - 27 + 9
    # an empty group has its launches, and programs that find nothing to do
    for part in work:
        # nor has one that encodes slots of 16 bits, of which there are none
        idle = part.name.startswith(("crop-128", "whole")) or re.search(r"stage \d$", part.name)
        assert (part.bytes > 0) == (not idle), part.name
        assert part.launches and (part.programs or part.name in ("decide", "locate")), part.name
    programs = {part.name: part.programs for part in work}
    # 64 slots of 128 x 128 pixels, 256 at a time
    assert programs["crop-128: begin"] == 64 * 128 * 128 / 256


def test_a_launch_without_a_model_is_an_error(monkeypatch):
    monkeypatch.delitem(plan_work.MODELS, plan_work.lowering.head_kernel.run)
    with pytest.raises(KeyError):
        plan_work.plan_work({"whole": 10}, EIGHT, TILES)


@pytest.mark.parametrize("num_bits", [8, 16])
def test_the_plans_convolutions_are_those_of_the_list(num_bits):
    """Whole slices: the same bytes, operations and tiles as `gpu_work.unet` has."""
    listed = [c for c in [*gpu_work.unet(240), *gpu_work.last_stage(16, 240)]
              for _ in range(c.times)]
    works = [c.work(10, 8 if c.stage is None else num_bits, TILES(c)) for c in listed]
    chosen = [{str(num_bits): 10}] * 4
    planned = plan_work.plan_work({"whole": 10}, chosen, TILES, decided=False)
    planned = [part for part in planned if part.operations]
    assert len(planned) == len(works) == 31
    for amount in ("bytes", "operations", "shared_bytes"):
        assert sum(getattr(part, amount) for part in planned) == pytest.approx(
            sum(getattr(part, amount) for part in works)
        ), amount
    assert all(part.shared_bytes for part in planned)


def test_launches_of_a_group_by_hand():
    """Five crops of 96: what is read once and written once."""
    work = plan_work.plan_work({"skip": 150, "crop-96": 5}, [{"8": 4, "16": 1}] * 4, TILES)
    moved = {part.name: part.bytes for part in work}
    pixels, tile = 5 * 96 * 96, 5 * 104 * 104
    assert moved["crop-96: image"] == pixels * 4 * (4 + 1)
    # stream, codes of one byte, and 36 tiles' moments, of all; 9 taps of 4 channels
    first = pixels * (4 + 16 * (2 + 1)) + 5 * 36 * 16 * 2 * 4
    assert moved["crop-96: begin"] == first + 9 * 4 * 16
    # one of the five has codes of two bytes, which are made anew
    assert moved["crop-96: stage 0"] == 16 * pixels / 5 * (2 + 2)
    # 8 bit: codes, residual, codes, the skip's codes; 16 bit: codes of two bytes; weights of both
    last = pixels * 4 / 5 * (1 + 2 + 1 + 1) + pixels / 5 * (2 + 2 + 2 + 1)
    assert moved["crop-96: stage 0 block, second"] == 16 * last + (1 + 2) * 9 * 16 * 16
    # codes below, half as many pixels along an axis and twice the channels, and of the skip
    weights = [8 * channels**2 for channels in (64, 32, 16)]
    up = [pixels / 4**level * 16 * 2**level * (1 / 2 + 1) for level in (2, 1, 0)]
    stored = [64 * pixels / 16 * 3, 32 * pixels / 4 * 3, 16 * tile * 3]
    found = [part.bytes for part in work if part.name == "crop-96: way up"]
    assert found == [sum(parts) for parts in zip(up, stored, weights, strict=True)]
    assert moved["crop-96: labels"] == tile * (16 + 1)
    # sums of nine chunks, along two axes
    assert moved["crop-96: gradients"] == 4 * 4 * (pixels + 5 * 9 * 2)
    assert moved["crop-96: width 0"] == 5 * 2 * 4 * (9 * 4 + 36 * 16)


def test_branches_side_by_side_share_the_memory():
    first, second = gpu_work.Work("", 2e9), gpu_work.Work("", 1e9)
    assert predict.seconds_at_once([[first], [second]], CARD) == pytest.approx(3e-3)
    waiting = gpu_work.Work("", 0, launches=3000)
    # 3000 launches take 3.39 ms, in which the other branch has long ended
    assert predict.seconds_at_once([[first], [waiting]], CARD) == pytest.approx(3.39e-3)


def test_volumes_cost_as_they_are_routed():
    tiles = gpu_work.Tiles(VARIANTS, "sm_89")

    def milliseconds(routes, bits):
        ran = sum(n for route, n in routes.items() if route != "skip")
        work = plan_work.plan_work(routes, [{bits: ran}] * 4, tiles)
        return predict.predict_volume(work, predict.CARDS["RTX 4090"])["milliseconds"]

    skipped = milliseconds({"skip": 155}, "8")
    crops = milliseconds({"skip": 100, "crop-128": 55}, "8")
    wide = milliseconds({"skip": 100, "crop-128": 55}, "16")
    whole = milliseconds({"skip": 100, "whole": 55}, "8")
    assert skipped < crops < wide < whole


@pytest.mark.parametrize("case", ["00000", "00024"])
def test_no_part_was_faster_than_its_bound(case):
    measured = json.loads((RESULTS / f"gpu_launches_h200_{case}.json").read_text())
    cases = json.loads((RESULTS / "brats2021.json").read_text())["cases"]
    bounds = predict.bounds_of_launches(measured, cases, VARIANTS)
    assert bounds["milliseconds_by_part"].keys() == measured["parts_us"].keys()
    for part, time in measured["parts_us"].items():
        assert 1e3 * bounds["milliseconds_by_part"][part] < time, part
    assert 1e3 * bounds["milliseconds"] < measured["replay_us"]
    unknown = {**measured, "environment": {"device": "Made Up 9000"}}
    assert predict.bounds_of_launches(unknown, cases, VARIANTS) is None
    former = {**measured, "launches_us": measured["launches_us"][1:]}
    assert predict.bounds_of_launches(former, cases, VARIANTS) is None


def test_measured_kernels_stand_beside_their_roof(tmp_path):
    case = {
        "case": "integer convolution 3x3, C=16, 240x240, 8 bit", "ours": "quant_conv2d",
        "bytes": 4.8e9, "operations": 1e9,
        "providers": {"quant_conv2d": {"cold_ms": {"median": 2.0}}},
    }
    unmeasured = {**case, "bytes": None}
    found = predict.compare({
        "environment": {"device": "NVIDIA H200"}, "cases": [case, unmeasured],
    })
    assert len(found) == 1 and found[0]["bound"] == "memory"
    assert found[0]["predicted_microseconds"] == 1000 and found[0]["share_of_roof"] == 0.5


@pytest.mark.parametrize("device", ["Tesla T4", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_card_without_peaks_is_named(device, tmp_path, monkeypatch, capsys):
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"environment": {"device": device}, "cases": []}))
    monkeypatch.setattr("sys.argv", ["predict.py", "--compare", str(file)])
    with pytest.raises(SystemExit):
        predict.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert str(file) in error and repr(device) in error and "NVIDIA A100-SXM4-80GB" in error
