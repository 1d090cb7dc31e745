"""Which forward a training convolution takes: on the integer codes, or PyTorch's on their values.

Both give the same numbers, but for float rounding. The integer way runs where a table says that it
was measured to be the faster one for a class of shapes; elsewhere, on every GPU so far, PyTorch's
convolution runs on the values. `python benchmarks/forward_way.py RESULT.json` measures a device and
prints the lines to put in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import onednn_runs, triton_runs


class ShapeClass(NamedTuple):
    """What convolutions have in common that are measured together.

    Attributes:
        device: "cpu" (oneDNN's int8), or "sm_90" (Triton) for a GPU of that architecture.
        bytes: Of a code: 1 up to 8 bits, 2 above.
        kernel: 1 or 3, square.
        stride: 1 or 2.
        channels: Of the input, the power of two at or below, from 4 to 128.
    """

    device: str
    bytes: int
    kernel: int
    stride: int
    channels: int


# time of a step (forward and gradients) on values over that of one whose forward is on codes,
# weights quantised anew in both; a forward alone gains more
SPEED_UP: dict[ShapeClass, float] = {
    ShapeClass("cpu", 1, 3, 1, 4): 1.04,
    ShapeClass("cpu", 1, 3, 1, 16): 1.06,
    ShapeClass("cpu", 1, 3, 1, 32): 1.19,
    ShapeClass("cpu", 1, 3, 1, 64): 1.18,
    ShapeClass("cpu", 1, 3, 1, 128): 1.15,
    ShapeClass("cpu", 1, 3, 2, 16): 1.09,
    ShapeClass("cpu", 1, 3, 2, 32): 1.11,
    ShapeClass("cpu", 1, 3, 2, 64): 1.09,
    ShapeClass("cpu", 1, 1, 1, 32): 0.96,
    ShapeClass("cpu", 1, 1, 1, 64): 1.07,
    ShapeClass("cpu", 1, 1, 1, 128): 1.10,
    ShapeClass("cpu", 2, 3, 1, 4): 0.54,
    ShapeClass("cpu", 2, 3, 1, 16): 0.57,
    ShapeClass("cpu", 2, 3, 1, 32): 0.76,
    ShapeClass("cpu", 2, 3, 1, 64): 0.77,
    ShapeClass("cpu", 2, 3, 1, 128): 0.68,
    ShapeClass("cpu", 2, 3, 2, 16): 0.57,
    ShapeClass("cpu", 2, 3, 2, 32): 0.76,
    ShapeClass("cpu", 2, 3, 2, 64): 0.71,
    ShapeClass("cpu", 2, 1, 1, 32): 0.74,
    ShapeClass("cpu", 2, 1, 1, 64): 0.80,
    ShapeClass("cpu", 2, 1, 1, 128): 0.73,
}


def shape_class(
    input: Tensor, weight: Tensor, geometry: list[int], bytes: int
) -> ShapeClass | None:
    """Returns the class of a convolution; None where no integer kernel computes it.

    Args:
        input: [N, Cin, H, W].
        weight: [Cout, Cin / groups, kH, kW].
        geometry: Stride, padding, dilation (y, x each) and groups.
        bytes: Of a code.
    """
    *pairs, groups = geometry
    kernel, stride = weight.shape[2], pairs[0]
    square = weight.shape[2] == weight.shape[3] and pairs[::2] == pairs[1::2]
    if not square or groups != 1 or pairs[4] != 1 or kernel not in (1, 3) or stride not in (1, 2):
        return None
    if input.dtype == torch.float64 or input.numel() == 0:
        return None
    if triton_runs(input):
        major, minor = torch.cuda.get_device_capability(input.device) if input.is_cuda else (0, 0)
        device = f"sm_{major}{minor}"
    elif onednn_runs(input):
        device = "cpu"
    else:
        return None
    channels = 1 << (input.shape[1].bit_length() - 1)
    return ShapeClass(device, bytes, kernel, stride, max(4, min(channels, 128)))


def takes_integers(input: Tensor, weight: Tensor, geometry: list[int], bytes: int) -> bool:
    """Tells whether a convolution's forward runs on codes; arguments as of `shape_class`."""
    found = shape_class(input, weight, geometry, bytes)
    return found is not None and SPEED_UP.get(found, 0.0) > 1.0
