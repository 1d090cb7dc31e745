"""A way up against its three convolutions in float64, one by one, and patches pasted by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meddanet.kernels import fake_quantize, norm_affine, pack_conv, quant_conv2d_reference
from meddanet.kernels.pairs import split_affine
from meddanet.kernels.way_up import WayUpCall, run_reference
from meddanet.kernels.way_up_pack import PackedWayUp, pack_way_up

pytestmark = pytest.mark.usefixtures("nan_poisoning")
LAST = torch.channels_last
CHANNELS = [4, 6, 16, 24, 32]
# of the codes that are read, between the convolutions, of the skip, and stored at the end
RANGES, WIDTHS = (3.0, 4.0, 5.0, 6.0), (8, 8, 8, 8)


class WayUp:
    """Float weights of a way up, and the norm that follows."""

    def __init__(self, channels: int, ranges=RANGES, widths=WIDTHS) -> None:
        self.channels, self.widths = channels, widths
        self.ranges = [torch.full((1,), value) for value in ranges]
        shapes = ((channels, 2 * channels, 1, 1), (channels, channels, 2, 2),
                  (channels, 2 * channels, 1, 1))
        self.weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
        self.biases = [torch.randn(channels) for _ in shapes]
        norm = torch.nn.BatchNorm2d(channels).eval()
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias)
        torch.nn.init.normal_(norm.running_mean)
        self.affine = norm_affine(norm)

    def convs(self):
        """The packed convolutions."""
        layers = zip(self.weights, self.biases, (False, True, False), strict=True)
        return [
            pack_conv(weight, bias, 1 + up, num_bits=8, transposed=up)
            for weight, bias, up in layers
        ]

    def packed(self, device="cpu") -> PackedWayUp:
        *ranges, last = (amax.to(device) for amax in self.ranges)
        convs = [conv.to(device) for conv in self.convs()]
        affine = tuple(part.to(device) for part in split_affine(self.affine, self.channels))
        layers = zip(convs, ranges, self.widths[:3], strict=True)
        return pack_way_up(*layers, affine, last, self.widths[3])


def codes(*shape: int, num_bits: int = 8) -> torch.Tensor:
    """Random codes of a width, channels last."""
    largest = 2 ** (num_bits - 1) - 1
    random = torch.randint(-largest, largest + 1, shape, dtype=torch.int8)
    return random.contiguous(memory_format=LAST)


def inputs(net: WayUp, samples: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = size
    return (
        codes(samples, 2 * net.channels, height, width, num_bits=net.widths[0]),
        codes(samples, net.channels, 2 * height, 2 * width, num_bits=net.widths[2]),
    )


def patches(net: WayUp, below: torch.Tensor, skip: torch.Tensor, dtype=torch.float16):
    """(stream, codes) of three separate convolutions."""
    reduce, up, fuse = net.convs()
    chain = list(zip(net.ranges[:3], net.widths[:3], strict=True))

    def made(conv, source, step, target):
        return quant_conv2d_reference(
            source, conv, step[0], num_bits=step[1], output_amax=target[0],
            output_num_bits=target[1],
        ).codes

    small = made(reduce, below, chain[0], chain[1])
    large = made(up, small, chain[1], chain[2])
    found = quant_conv2d_reference(
        torch.cat([skip, large], 1), fuse, chain[2][0], num_bits=chain[2][1], stream=dtype,
        affine=net.affine, relu=True, output_amax=net.ranges[3], output_num_bits=net.widths[3],
    )
    return found.stream, found.codes


@pytest.fixture
def run(backend, device):
    """Computes a way up: `run(net, below, skip, size, shifts, count, dtype)`."""

    def on_device(values) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    def run(net, below, skip, size=None, shifts=None, count=None, dtype=torch.float16):
        """(stream, codes), of what is not written NaN and -128."""
        size = size or (skip.shape[2], skip.shape[3])
        call = WayUpCall(
            below.to(device), skip.to(device), net.packed(device), on_device(shifts), size,
            on_device(None if count is None else [count]),
        )
        shape = len(below), *size, net.channels
        stream = torch.full(shape, float("nan"), dtype=dtype, device=device).permute(0, 3, 1, 2)
        made = torch.full(shape, -128, dtype=torch.int8, device=device).permute(0, 3, 1, 2)
        if backend == "triton" or device.type == "cuda":
            from meddanet.kernels.way_up_triton import run as launch

            launch(call, stream, made)
        else:
            run_reference(call, stream, made)
        return stream.cpu(), made.cpu()

    return run


def check(found, expected):
    """Both outputs, bit for bit; what is expected to be NaN and -128 is not written."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 13)], ids=str)
def test_as_three_convolutions(channels, size, run):
    """One pixel, whole blocks, and blocks that are not full."""
    net = WayUp(channels)
    below, skip = inputs(net, 2, size)
    expected = patches(net, below, skip)
    assert len(expected[1].unique()) > 2, "codes that are all alike test nothing"
    check(run(net, below, skip), expected)


@pytest.mark.parametrize("channels", [64, 128])
def test_more_channels(channels, run):
    net = WayUp(channels)
    below, skip = inputs(net, 1, (3, 5))
    check(run(net, below, skip), patches(net, below, skip))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_the_stream(dtype, run, narrow):
    net = WayUp(16)
    below, skip = inputs(net, 2, (5, 4))
    exact, made = patches(net, below, skip, torch.float32)
    check(run(net, below, skip, dtype=dtype), (narrow(exact, dtype), made))


@pytest.mark.parametrize("widths", [(4, 8, 6, 8), (8, 3, 8, 2), (8, 8, 4, 5)], ids=str)
def test_narrower_codes(widths, run):
    net = WayUp(16, widths=widths)
    below, skip = inputs(net, 1, (6, 5))
    check(run(net, below, skip), patches(net, below, skip))


@pytest.mark.parametrize("place", range(4))
def test_a_range_of_zero_has_no_codes(place, run):
    ranges = [value * (index != place) for index, value in enumerate(RANGES)]
    net = WayUp(6, ranges)
    below, skip = inputs(net, 1, (4, 5))
    check(run(net, below, skip), patches(net, below, skip))


def test_against_floats(run):
    """The layers on the values that codes stand for, up to codes that round the other way."""
    net = WayUp(16)
    below, skip = inputs(net, 1, (16, 16))
    first, second, third, last = (amax.double() / 127 for amax in net.ranges)
    weights = [fake_quantize(weight.double(), 8) for weight in net.weights]
    biases = [bias.double() for bias in net.biases]

    def on_grid(value, step):
        return (value / step).round().clamp(-127, 127) * step

    small = on_grid(F.conv2d(below.double() * first, weights[0], biases[0]), second)
    large = on_grid(F.conv_transpose2d(small, weights[1], biases[1], 2), third)
    total = F.conv2d(torch.cat([skip.double() * third, large], 1), weights[2], biases[2])
    gain, shift = (part[:, None, None] for part in net.affine)
    wanted = ((total * gain + shift).relu() / last).round().clamp(max=127)
    stream, made = run(net, below, skip, dtype=torch.float32)
    near = (stream.double() - total).abs() <= 1e-4
    assert near.float().mean() > 0.99 and (made == wanted).float().mean() > 0.99
    assert int((made - wanted).abs().max()) <= 8, "one code off on the way"


# tiles -----------------------------------------------------------------------------------------


def pasted(net: WayUp, found, shifts: list[tuple[int, int]], size: tuple[int, int]):
    """Patches cut out of canvases of zeros, which have the codes of the norm's shift."""
    stream, made = found
    step = net.ranges[3] / 127
    empty = (net.affine[1].float().relu() / step).round().clamp(max=127).to(torch.int8)
    far, (height, width) = 60, stream.shape[2:]
    outputs = []
    for content, background in ((stream, torch.zeros(net.channels)), (made, empty)):
        tiles = []
        for index, (top, left) in enumerate(shifts):
            canvas = background.to(content.dtype)[:, None, None]
            canvas = canvas.repeat(1, height + 2 * far, width + 2 * far)
            canvas[:, far : far + height, far : far + width] = content[index]
            tiles.append(canvas[:, far + top :, far + left :][:, : size[0], : size[1]])
        outputs.append(torch.stack(tiles))
    return outputs


SHIFTS = [(0, 0), (-3, -4), (-4, -3), (3, 1), (2, -7), (-8, 6), (-30, 0), (0, 25)]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(20, 22), (21, 19), (5, 4)], ids=str)
def test_a_patch_on_its_tile(channels, size, run):
    """Tiles that hold all of a patch, some or nothing, at even and odd places."""
    net = WayUp(channels)
    below, skip = inputs(net, len(SHIFTS), (6, 7))
    expected = pasted(net, patches(net, below, skip), SHIFTS, size)
    check(run(net, below, skip, size, SHIFTS), expected)
    assert expected[1][6].unique().numel() > 1, "a background that is not zero"


@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("count", [0, 2, 3, 9])
def test_slots_from_the_count_on_are_left_alone(tile, count, run):
    net = WayUp(16)
    below, skip = inputs(net, 3, (5, 6))
    shifts = [(1, -1), (-2, 2), (0, -3)] if tile else [(0, 0)] * 3
    size = (11, 13) if tile else (10, 12)
    expected = pasted(net, patches(net, below, skip), shifts, size)
    expected[0][count:], expected[1][count:] = float("nan"), -128
    check(run(net, below, skip, size, shifts if tile else None, count), expected)


# packing ---------------------------------------------------------------------------------------


def test_packed_sizes():
    for channels, block, columns in ((6, 16, 32), (16, 16, 32), (24, 32, 32), (64, 64, 64)):
        way = WayUp(channels).packed()
        assert [tuple(weight.shape) for weight in way.weights] == [
            (block, 2 * block), (4 * block, columns), (2, columns, columns)
        ]
        assert way.constants.shape == (2 * block + 6 * columns,) and way.grids.shape == (3, 3)
        # nothing but zeros is added, and each of two neighbouring pixels has weights of its own
        sums = [int(weight.long().sum()) for weight in way.weights]
        own = [int(layer[0].codes.long().sum()) for layer in (way.reduce, way.up, way.fuse)]
        assert sums == [own[0], own[1], own[2] * (columns // block)]


@pytest.mark.parametrize(("ranges", "message"), [
    ((1.0, float("inf"), 1.0, 1.0), "no kernel for codes in steps of nan"),
    ((1.0, 1.0, float("nan"), 1.0), "no kernel for codes in steps of nan"),
    ((1.0, 1.0, 1.0, 1e-30), "no kernel for codes in steps of 7.8"),
    ((1.0, 1.0, 1.0, 2e32), "no kernel for codes in steps of 1.5"),
    ((float("inf"), 1.0, 1.0, 1.0), "scales of a way up are not finite"),
])
def test_ranges_that_only_single_convolutions_take(ranges, message):
    with pytest.raises(ValueError, match=message):
        WayUp(4, ranges).packed()


def test_a_way_up_of_too_many_channels():
    with pytest.raises(ValueError, match="kernel for up to 256 channels, not for 257"):
        WayUp(257).packed()
