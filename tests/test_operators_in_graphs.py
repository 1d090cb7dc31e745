"""The operators in graphs: compilation, export, FLOP counts, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import meddanet.kernels.flops  # noqa: F401, registers the formulas
from meddanet.kernels import (
    affine_paste,
    bilinear_crop,
    encode,
    fake_quant_conv2d,
    fake_quantize,
    heat_head,
    label_head,
    pack_conv,
    pack_heat_head,
    pack_pooled_head,
    pack_stage,
    pack_stem,
    pack_unit,
    pooled_head,
    quant_conv2d,
    select_bits,
    shuffle_stage,
    shuffle_stem,
)


def leaf(*shape):
    return torch.randn(*shape).requires_grad_()


def image(layout=torch.contiguous_format):
    return torch.randn(2, 3, 7, 8).contiguous(memory_format=layout).requires_grad_()


LAST = torch.channels_last
WIDTHS = torch.tensor([8, 16])
ONE = torch.ones(1)
OFFSET = torch.tensor([[1, 2], [0, 0]], dtype=torch.int32)


def chain(image, offset, weight, widths):
    """A crop, its quantised convolutions and the paste: every operator the models use."""
    patch = bilinear_crop(image, offset, 5)
    feature = fake_quantize(patch, 8, torch.tensor(1.0))
    feature = fake_quant_conv2d(feature, weight, padding="same", num_bits=8)
    feature = fake_quant_conv2d(
        feature, weight, padding=1, num_bits=8, input_num_bits=16, input_amax=torch.tensor(1.0)
    )
    feature = fake_quant_conv2d(feature, weight, padding=1, num_bits=widths, input_num_bits=widths)
    return affine_paste(feature, offset, (7, 8))


def arguments():
    widths = torch.tensor([8.0, 16.0], dtype=torch.float64, requires_grad=True)
    tensors = image(LAST), leaf(2, 2), leaf(3, 3, 3, 3)
    return *(t.detach().double().requires_grad_() for t in tensors), widths


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(compiler):
    inputs = arguments()
    compiled = torch.compile(chain, fullgraph=True, backend=compiler)
    results = []
    for function in (chain, compiled):
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert results[0][0].stride() == results[1][0].stride()


class Chain(torch.nn.Module):
    def forward(self, image, offset, weight, widths):
        return chain(image, offset, weight, widths)


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(dynamic, tmp_path):
    inputs = tuple(t.detach() for t in arguments())
    batch = {0: torch.export.Dim("batch")} if dynamic else None
    shapes = {"image": batch, "offset": batch, "weight": None, "widths": batch}
    program = torch.export.export(Chain(), inputs, dynamic_shapes=shapes, strict=True)
    torch.export.save(program, tmp_path / "chain.pt2")
    loaded = torch.export.load(tmp_path / "chain.pt2").module()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        f"meddanet.{name}.default"
        for name in ("bilinear_shift", "fake_quantize", "fake_quant_conv2d")
    } <= called
    more = tuple(torch.cat([t, t.flip(0), t]) if t.shape[0] == 2 else t for t in inputs)
    for values in (inputs, more) if dynamic else (inputs,):
        torch.testing.assert_close(loaded(*values), chain(*values))


def no_offset(image):
    return torch.zeros(image.shape[0], 2, dtype=torch.int32)


KERNEL, SCALE = torch.randn(3, 3, 3, 3), torch.ones(3, 1, 1, requires_grad=True)
OF_AN_IMAGE = {
    "crop": lambda x: bilinear_crop(x, no_offset(x).float(), 5),
    "paste": lambda x: affine_paste(x, no_offset(x).float(), 30),
    "quantise": lambda x: fake_quantize(x, 8, ONE),
    "convolution": lambda x: fake_quant_conv2d(x, KERNEL, num_bits=8, input_num_bits=8),
    "convolution, masked": lambda x: fake_quant_conv2d(
        x * SCALE, KERNEL, num_bits=8, input_num_bits=8, input_amax=ONE
    ),
    "encode": lambda x: encode(x, ONE),
    "head": lambda x: label_head(x, KERNEL[:, :, 0, 0], offset=no_offset(x), size=30),
}


class OfAnImage(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, image):
        return OF_AN_IMAGE[self.name](image)


@pytest.mark.parametrize("name", OF_AN_IMAGE)
def test_one_graph_serves_all_sizes(name):
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(OfAnImage(name), fullgraph=True, backend=graphs, dynamic=True)
    for more in range(4):
        compiled(torch.randn(4 + more, 3, 9 + more, 14 + 2 * more))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", OF_AN_IMAGE)
def test_exported_for_all_sizes(name, strict):
    height, width = (torch.export.Dim(side, min=6) for side in ("height", "width"))
    dims = {0: torch.export.Dim("batch"), 2: height, 3: width}
    program = torch.export.export(
        OfAnImage(name), (torch.randn(2, 3, 9, 14),), dynamic_shapes=(dims,), strict=strict
    ).module()
    image = torch.randn(5, 3, 11, 8)
    torch.testing.assert_close(program(image), OF_AN_IMAGE[name](image))


CONVS = {
    "stem": pack_conv(torch.randn(8, 3, 3, 3), padding=1, num_bits=(8, 16)),
    "up": pack_conv(torch.randn(8, 4, 2, 2), stride=2, transposed=True),
    "head": pack_conv(torch.randn(5, 4, 1, 1), torch.randn(5)),
}


class Integers(torch.nn.Module):
    """Codes in, labels out: the operators of inference, with a width per sample."""

    def forward(self, codes, widths, offset):
        stem = quant_conv2d(codes, CONVS["stem"], ONE, num_bits=widths, stream=torch.float32,
                            relu=True, output_amax=ONE)
        up = quant_conv2d(stem.codes, CONVS["up"], ONE, output_amax=ONE)
        labels = label_head(up.codes, CONVS["head"], offset=offset, size=20, amax=ONE)
        return stem.stream, up.codes, labels


def integers():
    return encode(image(LAST).detach(), ONE, WIDTHS), WIDTHS, OFFSET


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_inference_compiled_in_one_graph(compiler):
    compiled = torch.compile(Integers(), fullgraph=True, backend=compiler)
    values = integers()
    for actual, wanted in zip(compiled(*values), Integers()(*values), strict=True):
        assert torch.equal(actual, wanted) and actual.stride() == wanted.stride()


@pytest.mark.parametrize("dynamic", [False, True])
def test_inference_exported(dynamic, tmp_path):
    batch = torch.export.Dim("batch") if dynamic else None
    shapes = {"codes": {1: batch}, "widths": {0: batch}, "offset": {0: batch}}
    codes, widths, offset = values = integers()
    program = torch.export.export(
        Integers(), values, dynamic_shapes=shapes if dynamic else None, strict=True
    )
    torch.export.save(program, tmp_path / "integers.pt2")
    loaded = torch.export.load(tmp_path / "integers.pt2").module()
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"meddanet.quant_conv2d.default", "meddanet.label_head.default"} <= called
    more = torch.cat([codes, codes], 1), torch.cat([widths, widths]), torch.cat([offset, offset])
    for batch in (values, more) if dynamic else (values,):
        for actual, wanted in zip(loaded(*batch), Integers()(*batch), strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_flops_of_inference_are_those_of_the_plain_convolution(transposed):
    input = image().detach()
    weight = torch.randn((3, 4, 2, 2) if transposed else (4, 3, 3, 3))
    stride = 2 if transposed else 1
    plain = F.conv_transpose2d if transposed else F.conv2d
    conv = pack_conv(weight, stride=stride, transposed=transposed)
    codes = encode(input, ONE)
    counts = []
    for convolve in (
        lambda: plain(input, weight, stride=stride),
        lambda: quant_conv2d(codes, conv, ONE, stream=torch.float16),
        lambda: quant_conv2d(codes, conv, ONE, output_amax=ONE),
    ):
        with FlopCounterMode(display=False) as counter:
            convolve()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0
    with FlopCounterMode(display=False) as counter:
        label_head(input, torch.randn(5, 3), offset=OFFSET, size=9)
    assert counter.get_total_flops() == 2 * 2 * 3 * 7 * 8 * 5


def test_flops_are_those_of_the_plain_convolution():
    input, weight, bias = image(), leaf(4, 3, 3, 3), leaf(4)
    counts = []
    for convolve in (F.conv2d, lambda *a, **k: fake_quant_conv2d(*a, **k, num_bits=WIDTHS)):
        with FlopCounterMode(display=False) as counter:
            convolve(input, weight, bias, stride=2, padding=1).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("op", [bilinear_crop, affine_paste])
def test_autocast_leaves_crop_and_paste_alone(op):
    source, offset = image(), leaf(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(source, offset, 5)
    assert torch.equal(out, op(source, offset, 5))


def head_of(x):
    return label_head(x, torch.linspace(-1, 1, 15).reshape(5, 3), offset=OFFSET, size=12)


def bits_of(x):
    weight, bias = torch.linspace(-1, 1, 3 * 9).reshape(3, 9), torch.zeros(3)
    return select_bits(x, x, weight, bias, torch.tensor([4, 8, 16]))


def stem_of(x):
    return shuffle_stem(x, pack_stem(torch.randn(4, 3, 3, 3), torch.randn(4)))


def pooled_of(x):
    head = pack_pooled_head((torch.randn(6, 3, 1, 1), torch.randn(6)), torch.randn(2, 6))
    return pooled_head(x, head)


def heat_of(x):
    layer, weight = (torch.randn(6, 3, 1, 1), torch.randn(6)), torch.randn(1, 6, 1, 1)
    return heat_head(x, pack_heat_head(layer, weight, torch.ones(2), 0.01), [0.5, 1])


def stage_of(x):
    def point():
        return torch.randn(3, 3, 1, 1), torch.randn(3)

    def depth():
        return torch.randn(3, 1, 3, 3), torch.randn(3)

    return shuffle_stage(x, pack_stage([pack_unit(point(), depth(), point(), (depth(), point()))]))


@pytest.mark.parametrize("op", [head_of, bits_of, stem_of, pooled_of, heat_of, stage_of])
def test_autocast_leaves_what_sums_in_float32_alone(op):
    x = torch.randn(2, 3, 7, 8)
    torch.manual_seed(1)
    expected = op(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x), expected)


def test_autocast_leaves_the_grid_alone():
    with torch.autocast("cpu", torch.bfloat16):
        out = fake_quantize(x := image(), 16, torch.tensor(1.0))
    assert torch.equal(out, fake_quantize(x, 16, torch.tensor(1.0)))
