"""The operators keep PyTorch's rules for them, whatever executes them: opcheck."""

import os

import pytest
import torch

from meddanet.kernels import (
    encode,
    pack_conv,
    pack_heat_head,
    pack_pooled_head,
    pack_stage,
    pack_stem,
    pack_unit,
)
from meddanet.kernels.conv_call import checked_call
from meddanet.kernels.conv_int import flat

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
OPS = torch.ops.meddanet


def leaf(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()


def image(layout=torch.contiguous_format, dtype=torch.float32):
    return leaf(2, 3, 7, 8, layout=layout, dtype=dtype)


LAST = torch.channels_last
WIDTHS = torch.tensor([8, 16])
CONV = ([1, 2, 1, 0, 1, 1, 1], True)


def learnt():
    return torch.tensor([4.0, 16.0], requires_grad=True)


ONE = torch.ones(1)
OFFSET = torch.tensor([[1, 2], [0, 0]], dtype=torch.int32)


def integer(input, stream=None, transposed=False, **epilogue):
    """Arguments of the integer convolution's operator."""
    shape = (3, 4, 2, 2) if transposed else (4, 3, 3, 3)
    stride, padding = (2, 0) if transposed else (1, 1)
    conv = pack_conv(torch.randn(shape), torch.randn(4), stride, padding, num_bits=(8, 16),
                     transposed=transposed)
    arguments = {"num_bits": 8, "residual": None, "affine": None, "relu": False, "slots": None,
                 "output_amax": None, "output_num_bits": 8, "count": None, **epilogue}
    return *flat(checked_call(input, conv, ONE, stream=stream, **arguments)), stream


def training(input, num_bits, input_num_bits, amax, keep=False, mask=False, train=True):
    """Arguments of the training convolution's operator."""
    weight, bias = leaf(4, 3, 3, 3), leaf(4)
    weight, bias = (weight, bias) if train else (weight.detach(), bias.detach())

    def width(bits):
        return (bits, 0) if isinstance(bits, torch.Tensor) else (None, bits or 0)

    return (input, weight, bias, *width(num_bits), *width(input_num_bits), amax, input.dtype, *CONV,
            keep, mask)


def codes_of(num_bits):
    return encode(image(LAST).detach(), ONE, num_bits)


def point(*shape):
    return torch.randn(shape), torch.randn(shape[0])


def packed_stage(side=(), more=0):
    """Arguments of the stage's operator, for a branch of three channels, then of five."""
    units = [pack_unit(point(5, 3, 1, 1), point(5, 1, 3, 3), point(7, 5, 1, 1), side)]
    for _ in range(more):
        units.append(pack_unit(point(5, 5, 1, 1), point(5, 1, 3, 3), point(5, 5, 1, 1)))
    stage = pack_stage(units)
    return list(stage.first), list(stage.rest), list(stage.mid_channels), stage.out_channels


def packed_pooled(*bias):
    """Arguments of the operator of ShuffleNetV2's head, for two answers."""
    head = pack_pooled_head(point(5, 3, 1, 1), torch.randn(2, 5), *bias)
    return *head[:4], head.outputs


def packed_heat():
    """Arguments of the operator of a heat map's head."""
    head = pack_heat_head(point(5, 3, 1, 1), torch.randn(1, 5, 1, 1), torch.ones(2), 0.01)
    return *head[:4], [0.5, 0.75], head.edge


SLOTS = torch.tensor([1, 0], dtype=torch.int32)
SAMPLES = {
    "encode": lambda: (
        OPS.encode, (image().detach(), ONE, 7, 8, None, 8, None, None, False, None, None, None)
    ),
    "encode, everything": lambda: (
        OPS.encode,
        (image(LAST).detach(), ONE, 4, 5, WIDTHS.int(), 0, torch.ones(2, 3), torch.zeros(2, 3),
         True, OFFSET, SLOTS, SLOTS[:1]),
    ),
    "selector": lambda: (
        OPS.select_bits,
        (image().detach(), image(LAST).detach(), torch.ones(2, 9), ONE.expand(2).contiguous(),
         WIDTHS.int(), 7, 8, None, None, None),
    ),
    "selector, routed": lambda: (
        OPS.select_bits,
        (image().detach(), image(LAST).detach(), torch.ones(2, 9), torch.zeros(2), WIDTHS.int(),
         4, 5, OFFSET, SLOTS, SLOTS[:1]),
    ),
    "integer convolution, stream": lambda: (
        OPS.quant_conv2d, integer(codes_of(8), torch.float16)
    ),
    "integer convolution, codes": lambda: (
        OPS.quant_conv2d, integer(codes_of(8), output_amax=ONE, relu=True)
    ),
    "integer convolution, everything": lambda: (
        OPS.quant_conv2d,
        integer(codes_of(WIDTHS), torch.float32, num_bits=WIDTHS, output_num_bits=WIDTHS,
                residual=torch.randn(2, 4, 7, 8), output_amax=ONE, slots=torch.tensor([1, 0]),
                affine=(torch.ones(4), torch.ones(4)), count=torch.tensor([1])),
    ),
    "integer convolution, transposed": lambda: (
        OPS.quant_conv2d, integer(codes_of(8), torch.float32, True, output_amax=ONE)
    ),
    "head, codes": lambda: (
        OPS.label_head,
        (codes_of(8), torch.ones(4, 32, dtype=torch.int8), torch.ones(2, 4), torch.zeros(4), ONE, 8,
         OFFSET, None, None, 2, 9, 9),
    ),
    "head, floats": lambda: (
        OPS.label_head,
        (image(LAST).detach(), torch.randn(4, 3), None, torch.randn(4), None, 8, OFFSET,
         torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1], dtype=torch.int32), 3, 9, 9),
    ),
    "stem": lambda: (
        OPS.shuffle_stem,
        (image(LAST).detach(), *pack_stem(torch.randn(5, 3, 3, 3), torch.randn(5))[:2], 5, None),
    ),
    # what is not seen may differ from call to call
    "stem, all seen": lambda: (
        OPS.shuffle_stem,
        (image(LAST).detach(), *pack_stem(torch.randn(5, 3, 3, 3), torch.randn(5))[:2], 5,
         torch.ones(2, dtype=torch.int32)),
    ),
    "stage of one unit": lambda: (
        OPS.shuffle_stage, (torch.randn(2, 6, 7, 8), *packed_stage(), None)
    ),
    "stage": lambda: (
        OPS.shuffle_stage,
        (image(LAST).detach(), *packed_stage([point(3, 1, 3, 3), point(3, 3, 1, 1)], 2),
         torch.ones(2, dtype=torch.int32)),
    ),
    "pooled head": lambda: (
        OPS.pooled_head, (image(LAST).detach(), *packed_pooled(), torch.ones(2, dtype=torch.int32))
    ),
    "pooled head with a bias": lambda: (
        OPS.pooled_head, (image().detach(), *packed_pooled(torch.randn(2)), None)
    ),
    "heat head": lambda: (OPS.heat_head, (image(LAST).detach(), *packed_heat(), None)),
    "heat head, seen": lambda: (
        OPS.heat_head, (image().detach(), *packed_heat(), torch.ones(2, dtype=torch.int32))
    ),
    "crop": lambda: (OPS.bilinear_shift, (image(), leaf(2, 2), 4, 5, False)),
    "crop, channels last": lambda: (OPS.bilinear_shift, (image(LAST), leaf(2, 2), 4, 5, False)),
    "paste": lambda: (OPS.bilinear_shift, (image(), leaf(2, 2), 9, 9, True)),
    "crop, bfloat16": lambda: (
        OPS.bilinear_shift, (image(dtype=torch.bfloat16), leaf(2, 2), 4, 5, False)
    ),
    "offset gradient": lambda: (
        OPS.bilinear_offset_gradient,
        (image().detach(), torch.randn(2, 3, 4, 5), torch.randn(2, 2)),
    ),
    "quantise": lambda: (OPS.fake_quantize, (image(), None, 8, torch.ones(1), False)),
    "quantise, masked": lambda: (OPS.fake_quantize, (image(LAST), None, 8, torch.ones(1), True)),
    "quantise, per sample": lambda: (
        OPS.fake_quantize, (image(), WIDTHS, 0, torch.ones(2), True)
    ),
    "quantise, learnt": lambda: (
        OPS.fake_quantize, (image(LAST), learnt(), 0, torch.ones(2), False)
    ),
    "masked gradient": lambda: (
        OPS.fake_quantize_masked_gradient,
        (torch.randn(2, 3, 7, 8), torch.zeros(2, 21, dtype=torch.uint8), True),
    ),
    "width gradient": lambda: (
        OPS.fake_quantize_width_gradient,
        (torch.randn(2, 3, 7, 8), image(LAST).detach(), learnt().detach(), torch.ones(2)),
    ),
    "convolution of floats": lambda: (
        OPS.fake_quant_conv2d, training(image(LAST), WIDTHS, None, None)
    ),
    "convolution, learnt": lambda: (
        OPS.fake_quant_conv2d, training(image(), bits := learnt(), bits, torch.ones(2))
    ),
    "convolution, weights learnt": lambda: (
        OPS.fake_quant_conv2d, training(image(), learnt(), 8, torch.ones(1), True, True)
    ),
    "convolution, 8 bit": lambda: (
        OPS.fake_quant_conv2d, training(image(LAST), 8, 8, torch.ones(2), True, True)
    ),
    "convolution, per sample": lambda: (
        OPS.fake_quant_conv2d, training(image(), WIDTHS, WIDTHS, torch.ones(2), True, False)
    ),
    "convolution, nothing kept": lambda: (
        OPS.fake_quant_conv2d, training(image(LAST).detach(), 8, 16, torch.ones(1), train=False)
    ),
    "convolution backward": lambda: (
        OPS.fake_quant_conv2d_backward,
        (torch.randn(2, 4, 7, 3), image(LAST).detach(), torch.randn(4, 3, 3, 3), WIDTHS, 0, *CONV,
         [True, True, False]),
    ),
    "codes read back": lambda: (
        OPS.decode_input,
        (torch.ones(2, 2, 7, 8, 3, dtype=torch.int8).permute(0, 1, 4, 2, 3), WIDTHS, 0,
         torch.ones(2), torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    operator, arguments = SAMPLES[name]()
    # how it is differentiated and traced is the same whatever computes it
    some = {"test_utils": ("test_schema", "test_faketensor")} if INTERPRETING else {}
    torch.library.opcheck(operator.default, arguments, **some)
