"""Costs against PyTorch's own counter and arithmetic by hand; the papers' tables have a file."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from meddanet.build import build_med_danet_v2, build_segmenter
from meddanet.cost import cost_table, count_macs
from meddanet.layers import QuantConv2d, QuantConvTranspose2d, QuantLinear, set_quantization
from meddanet.macs import count_work

# the counter ---------------------------------------------------------------------------------


class Functional(nn.Module):
    """Products that belong to no layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(input, input, input)
        return torch.einsum("nhlc,nhmc->nhlm", mixed, input @ input.transpose(2, 3) @ input)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2), (3, 6, 9, 7), id="grouped"),
        pytest.param(nn.Conv2d(2, 4, (3, 1), dilation=2), (2, 2, 9, 8), id="dilated"),
        pytest.param(nn.Conv3d(2, 3, 3), (1, 2, 5, 6, 7), id="3-d"),
        pytest.param(nn.ConvTranspose2d(6, 4, 2, stride=2), (2, 6, 5, 4), id="transposed"),
        pytest.param(nn.ConvTranspose2d(6, 4, 3, groups=2), (1, 6, 5, 4), id="transposed grouped"),
        pytest.param(nn.Linear(5, 7), (2, 3, 4, 5), id="linear"),
        pytest.param(nn.Linear(5, 7, bias=False), (2, 5), id="linear without bias"),
        pytest.param(nn.TransformerEncoderLayer(16, 2, 24), (5, 2, 16), id="transformer layer"),
        pytest.param(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), (2, 5, 16), id="batch first"
        ),
        pytest.param(nn.LSTM(6, 5, batch_first=True), (2, 7, 6), id="recurrent"),
        pytest.param(Functional(), (2, 3, 5, 4), id="functional"),
    ],
)
def test_true_macs_are_half_of_pytorchs_flops(model, shape):
    on_meta = deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta(torch.zeros(shape, device="meta"))
    assert 2 * count_macs(model, shape, "mac") == counter.get_total_flops() > 0
    assert count_macs(model.eval(), shape) == count_macs(on_meta, shape)


def test_threads_that_count_leave_attention_as_it_was():
    """How it runs is the process's, so that one thread took what another had set for the usual."""
    first_in, second_in, first_out = Event(), Event(), Event()

    def first(_, input):
        first_in.set()
        second_in.wait(0.3)  # in vain where threads take turns

    def second(_, input):
        second_in.set()
        assert first_out.wait(20)

    def flags():
        cuda, mha = torch.backends.cuda, torch.backends.mha
        return (
            mha.get_fastpath_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
        )

    before = flags()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(count_work, nn.Identity(), {"first": first}, (1,))
        waiting.add_done_callback(lambda _: first_out.set())
        assert first_in.wait(20)
        count_work(nn.Identity(), {"second": second}, (1,))
    assert all(before) and flags() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_as_default_changes_nothing(dtype):
    model = build_segmenter("unet-8")
    expected = count_macs(model, (1, 4, 32, 32))
    torch.set_default_dtype(dtype)
    try:
        assert count_macs(model, (1, 4, 32, 32)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("model", "shape", "paper"),
    [
        # 64 output positions, four times those of the input
        pytest.param(
            nn.ConvTranspose2d(6, 6, 2, stride=2), (1, 6, 4, 4), 64 * 6 * 6 * 4, id="transposed"
        ),
        pytest.param(nn.BatchNorm2d(3), (2, 3, 4, 5), 5 * 120, id="batch norm"),
        pytest.param(nn.GroupNorm(3, 6), (1, 6, 4, 5), 5 * 120, id="group norm"),
        pytest.param(nn.LayerNorm(6), (1, 4, 5, 6), 5 * 120, id="layer norm"),
        pytest.param(nn.InstanceNorm2d(3), (2, 3, 4, 5), 5 * 120, id="instance norm"),
    ],
)
def test_what_the_papers_count_by_hand(model, shape, paper):
    assert count_macs(model, shape, "paper") == paper
    true = paper // 4 if isinstance(model, nn.ConvTranspose2d) else 0
    assert count_macs(model, shape, "mac") == true


class Product(nn.Module):
    """A product with a vector, of which PyTorch's counter knows nothing."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input)


@pytest.mark.parametrize(
    ("function", "shape", "macs"),
    [
        pytest.param(lambda x: x @ torch.ones(16), (1, 4, 16, 16), 4 * 16 * 16, id="matmul"),
        pytest.param(lambda x: torch.mv(x, torch.ones(16)), (4, 16), 4 * 16, id="mv"),
        pytest.param(lambda x: torch.ones(4) @ x, (4, 16), 4 * 16, id="from the left"),
        pytest.param(lambda x: x @ torch.ones(16), (16,), 16, id="dot"),
        pytest.param(lambda x: torch.addmv(torch.ones(4), x, x[0]), (4, 16), 4 * 16, id="addmv"),
    ],
)
def test_products_with_a_vector_by_hand(function, shape, macs):
    assert count_macs(Product(function), shape) == count_macs(Product(function), shape, "paper")
    assert count_macs(Product(function), shape) == macs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_dtype_counts(dtype):
    model, shape = build_segmenter("unet-2"), (1, 4, 16, 16)
    assert count_macs(deepcopy(model).to(dtype), shape) == count_macs(model, shape)


@pytest.mark.parametrize("convention", ["mac", "paper"])
@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.Softmax(1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.GELU()]
)
def test_what_costs_nothing(model, convention):
    assert count_macs(model, (2, 3, 8, 8), convention) == 0


def test_quantised_layers_count_like_plain_ones():
    def stack(conv, transposed, linear):
        return nn.Sequential(conv(3, 8, 3, padding=1), transposed(8, 4, 2, stride=2), linear(8, 5))

    plain = stack(nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    quantised = stack(QuantConv2d, QuantConvTranspose2d, QuantLinear)
    for convention in ("mac", "paper"):
        assert count_macs(quantised, (1, 3, 4, 4), convention) == count_macs(
            plain, (1, 3, 4, 4), convention
        )


def test_counting_leaves_the_model_as_it_was():
    model = build_med_danet_v2("unet-12").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, (1, 4, 96, 96))
    assert model.training and model.segmenter.init.quantize
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_counting_in_inference_mode_counts_the_same():
    model, shape = build_segmenter("unet-4"), (1, 4, 16, 16)
    outside = cost_table(model, shape).parts
    with torch.inference_mode():
        assert cost_table(model, shape).parts == outside
        assert count_macs(nn.Linear(5, 7), (2, 5)) == 70


def test_a_batch_costs_its_size():
    model = build_segmenter("unet-12")
    assert count_macs(model, (3, 4, 32, 40)) == 3 * count_macs(model, (1, 4, 32, 40))


# tables --------------------------------------------------------------------------------------


def test_parts_of_the_unet_by_hand():
    """Convolution by convolution for b = 16 at 128 x 128, in M."""
    table = cost_table(build_segmenter("unet-16"), (1, 4, 128, 128))
    millions = {part: round(macs / 1e6, 3) for part, macs in table.parts["whole"].items()}
    decoder = {"up3": 14.680, "up2": 14.680, "up1": 14.680, "dec3": 75.497, "dec2": 75.497}
    assert millions == {
        "init": 9.437, "enc1": 94.372, "enc2": 169.869, "enc3": 169.869, "enc4": 301.990,
        **decoder, "last_stage": round(75.497 + 1.049, 3),
    }
    assert table.stages == ("enc1", "enc2", "enc3", "enc4")
    assert table.routes == ("whole",)
    # all of the stages' true multiply-adds are convolutions and follow the width
    share = sum(table.staged["whole"].values()) / table.macs("whole")
    assert f"{share:.2f}" == "0.72"


@pytest.fixture(scope="module")
def dynamic() -> nn.Module:
    return build_med_danet_v2("unet-16", crop_sizes=(64, 96))


@pytest.mark.parametrize(("convention", "crop"), [("mac", "605.6"), ("paper", "635.0")])
def test_a_crop_pays_for_its_last_stage_on_the_whole_window(dynamic, convention, crop):
    table = cost_table(dynamic, (1, 4, 128, 128), convention)
    parts = dict(table.parts["crop-96"])
    deciding = sum(parts.pop(name) for name in ("policy", "position", "selectors"))
    assert f"{sum(parts.values()) / 1e6:.1f}" == crop
    assert table.macs("crop-96") == sum(parts.values()) + deciding
    assert parts["last_stage"] == table.parts["whole"]["last_stage"]


def test_routes_count_the_networks_that_decide(dynamic):
    table = cost_table(dynamic, (1, 4, 128, 128), "paper")
    policy = count_macs(dynamic.policy, (1, 4, 128, 128), "paper")
    position = count_macs(dynamic.position, (1, 4, 128, 128), "paper")
    assert table.routes == dynamic.routes == ("skip", "crop-64", "crop-96", "whole")
    assert table.parts["skip"] == {"policy": policy}
    for route in ("crop-64", "crop-96"):
        assert table.parts[route]["policy"] == policy
        assert table.parts[route]["position"] == position
    assert "position" not in table.parts["whole"]
    # Sobel in x and y on four channels, and four linear layers (papers count norms, here none)
    sobel = 128**2 * 4 * 2 * 9
    linear = sum(2 * (channels + 8) for channels in (16, 32, 64, 128))
    assert table.parts["whole"]["selectors"] == sobel + linear
    assert table.macs("whole") == (
        count_macs(dynamic.segmenter, (1, 4, 128, 128), "paper") + policy + sobel + linear
    )
    assert count_macs(dynamic, (2, 4, 128, 128), "paper") == 2 * table.macs("whole")


def test_slice_cost_scales_the_stages_only(dynamic):
    """Per sample, by hand: stages times b / 32, everything else as it is."""
    table = cost_table(dynamic, (1, 4, 128, 128))
    route = torch.tensor([0, 3, 2])
    bits = torch.tensor([[0, 0, 0, 0], [8, 16, 8, 16], [16, 16, 12, 8]])
    wanted = []
    for name, widths in zip(("skip", "whole", "crop-96"), bits.tolist(), strict=True):
        parts = dict(table.parts[name])
        stages = [parts.pop(f"enc{i}", 0) for i in (1, 2, 3, 4)]
        scaled = [s * b / 32 for s, b in zip(stages, widths, strict=True)]
        wanted.append(sum(parts.values()) + sum(scaled))
    torch.testing.assert_close(table.slice_cost(route, bits), torch.tensor(wanted))
    torch.testing.assert_close(
        table.slice_cost(route, bits.double()), torch.tensor(wanted, dtype=torch.float64)
    )
    at_32 = table.slice_cost(route, torch.full((3, 4), 32.0, dtype=torch.float64))
    assert torch.equal(at_32, table.slice_macs(route))
    assert table.slice_macs(route).tolist() == [table.macs(r) for r in ("skip", "whole", "crop-96")]


def test_the_papers_norms_do_not_follow_the_width():
    mac, paper = (
        cost_table(build_segmenter("unet-16"), (1, 4, 128, 128), c) for c in ("mac", "paper")
    )
    assert paper.parts["whole"]["enc1"] - mac.parts["whole"]["enc1"] == 5 * 2 * 16 * 128**2
    assert paper.staged == mac.staged


def test_slice_cost_is_differentiable_in_the_widths(dynamic):
    table = cost_table(dynamic, (1, 4, 128, 128))
    bits = torch.full((2, 4), 8.0, requires_grad=True)
    table.slice_cost(torch.tensor([3, 0]), bits).sum().backward()
    stages = torch.tensor([float(table.parts["whole"][f"enc{i}"]) for i in (1, 2, 3, 4)])
    torch.testing.assert_close(bits.grad, torch.stack([stages / 32, torch.zeros(4)]))


def test_bit_operations_by_hand(dynamic):
    """8 x 8 for what is fixed on the grid, 32 x 32 for float selectors, b x b for the stages."""
    table = cost_table(dynamic, (1, 4, 128, 128))
    parts = dict(table.parts["whole"])
    stages = [parts.pop(f"enc{i}") for i in (1, 2, 3, 4)]
    selectors = parts.pop("selectors")
    widths = (8, 16, 16, 8)
    wanted = 64 * sum(parts.values()) + 1024 * selectors
    wanted += sum(s * b * b for s, b in zip(stages, widths, strict=True))
    operations = table.slice_bit_operations(torch.tensor([3]), torch.tensor([widths]).double())
    assert operations.item() == wanted


def test_a_float_model_has_32_bit_operations():
    model = build_med_danet_v2("unet-12")
    set_quantization(model, quantize=False, update_range=True)
    table = cost_table(model, (1, 4, 96, 96), "paper")
    route = torch.arange(3)
    bits = torch.full((3, 4), 32.0, dtype=torch.float64)
    assert torch.equal(table.slice_bit_operations(route, bits), 1024 * table.slice_macs(route))


def test_the_text_holds_the_numbers():
    table = cost_table(build_segmenter("unet-16"), (1, 4, 128, 128), "paper")
    lines = table.render().splitlines()
    assert lines[1].split()[:4] == ["whole", "1,067.319", "515.244", "699.269"]
    assert len(lines) == 2 + len(table.parts["whole"]) + 2
    assert "17.077 G MACs per slice of 240x240" in lines[-1]
    assert "136.62 per case of 128" in lines[-1]
    per_slice = cost_table(build_segmenter("unet-16"), (1, 4, 240, 240), "paper").render()
    assert per_slice.endswith("whole: 3.752 G MACs per slice of 240x240, 581.61 per case of 155")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: count_macs(nn.ReLU(), (1, 4, 8, 8), "flops"), "'mac' or 'paper', got 'flops'"),
        (lambda: cost_table(nn.Conv2d(4, 4, 1), (1, 4, 8, 8)), "Conv2d has no encoder stages"),
        (lambda: cost_table(build_med_danet_v2(), (1, 4, 64, 64)), "crop of 96 does not fit"),
        (lambda: count_macs(build_segmenter("unet-12"), (1, 4, 60, 64)), "pad to 64x64"),
        (lambda: count_macs(nn.Conv2d(4, 8, 3), (1, 3, 9, 9)), "of 4 channels is given 3"),
        (lambda: count_macs(nn.ConvTranspose2d(4, 8, 3), (1, 3, 9, 9)), "of 4 channels is given 3"),
        (lambda: count_macs(nn.Conv2d(4, 8, 3, groups=2), (1, 2, 9, 9)), "4 channels is given 2"),
        (lambda: count_macs(nn.Linear(5, 7), (2, 4)), "a matrix of 5 rows is given 4"),
    ],
)
def test_bad_requests_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
