"""Triton kernels of the crop and the paste; `crop_paste.py` has the equations.

One kernel with a signed shift serves both operations and, as each is the other's transpose, both
of their gradients by the tensor. A second one sums the gradient by the offset block by block; the
few partial sums are added by PyTorch. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backend import tl, triton

# elements per program; other sizes were not tried on a GPU
BLOCK = 1024


@triton.jit
def _split(offset_ptr, image_length, patch_length):
    """Splits one offset into a whole base and a fraction, as the reference does."""
    offset = tl.load(offset_ptr)
    # comparisons keep a NaN, which the fraction carries into every pixel
    offset = tl.where(offset < -patch_length - 1, -patch_length - 1, offset)
    offset = tl.where(offset > image_length, image_length, offset)
    base = tl.floor(offset)
    base = tl.where(offset == image_length - patch_length, base - 1, base)
    fraction = offset - base
    return tl.where(fraction == fraction, base, 0).to(tl.int32), fraction


@triton.jit
def _pixel(index, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Returns (channel, row, column) of elements numbered in the order of memory."""
    if CHANNELS_LAST:
        pixel = index // channels
        return index % channels, pixel // width, pixel % width
    else:
        line = index // width
        return line // height, line % height, index % width


@triton.jit
def _tap(ptr, row, column, height, width, stride_h, stride_w, mask):
    """Loads one pixel per element, 0 outside of the tensor."""
    inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.load(ptr + row * stride_h + column * stride_w, mask=inside, other=0.0)


# sizes of image and patch change nothing in the machine code but its number of variants
@triton.jit(do_not_specialize=["height_in", "width_in", "height", "width", "blocks"])
def shift_kernel(
    in_ptr, offset_ptr, out_ptr,
    channels, height_in, width_in, height, width, elements, blocks,
    stride_n, stride_c, stride_h, stride_w,
    PASTE: tl.constexpr, CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes BLOCK neighbouring elements of one sample's output."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    channel, row, column = _pixel(index, channels, height, width, CHANNELS_LAST)

    if PASTE:
        base_y, fraction_y = _split(offset_ptr + 2 * n, height, height_in)
        base_x, fraction_x = _split(offset_ptr + 2 * n + 1, width, width_in)
        row, column, step = row - base_y, column - base_x, -1
    else:
        base_y, fraction_y = _split(offset_ptr + 2 * n, height_in, height)
        base_x, fraction_x = _split(offset_ptr + 2 * n + 1, width_in, width)
        row, column, step = row + base_y, column + base_x, 1

    ptr = in_ptr + n * stride_n + channel * stride_c
    total = tl.zeros([BLOCK], COMPUTE)
    for tap in tl.static_range(4):
        share_y = fraction_y if tap // 2 else 1 - fraction_y
        share_x = fraction_x if tap % 2 else 1 - fraction_x
        share = share_y * share_x
        # a tap of weight 0 is not read: it may hold an infinity
        rows = tl.where(share != 0, height_in, 0)
        value = _tap(
            ptr, row + step * (tap // 2), column + step * (tap % 2),
            rows, width_in, stride_h, stride_w, mask,
        )
        total += share * value.to(COMPUTE)

    tl.store(out_ptr + n * elements + index, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height_image", "width_image", "height", "width", "blocks"])
def offset_gradient_kernel(
    image_ptr, patch_ptr, offset_ptr, sum_ptr,
    channels, height_image, width_image, height, width, elements, blocks,
    stride_in, stride_ic, stride_ih, stride_iw, stride_pn, stride_pc, stride_ph, stride_pw,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Sums the gradient by (y, x) over BLOCK neighbouring elements of one sample's patch."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    index = (tl.program_id(0) % blocks).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    mask = index < elements
    channel, row, column = _pixel(index, channels, height, width, CHANNELS_LAST)

    patch = tl.load(
        patch_ptr + n * stride_pn + channel * stride_pc + row * stride_ph + column * stride_pw,
        mask=mask, other=0.0,
    ).to(COMPUTE)
    base_y, fraction_y = _split(offset_ptr + 2 * n, height_image, height)
    base_x, fraction_x = _split(offset_ptr + 2 * n + 1, width_image, width)
    row, column = row + base_y, column + base_x
    ptr = image_ptr + n * stride_in + channel * stride_ic
    h, w, sh, sw = height_image, width_image, stride_ih, stride_iw
    tap00 = _tap(ptr, row, column, h, w, sh, sw, mask).to(COMPUTE)
    tap01 = _tap(ptr, row, column + 1, h, w, sh, sw, mask).to(COMPUTE)
    tap10 = _tap(ptr, row + 1, column, h, w, sh, sw, mask).to(COMPUTE)
    tap11 = _tap(ptr, row + 1, column + 1, h, w, sh, sw, mask).to(COMPUTE)

    slope_y = (1 - fraction_x) * (tap10 - tap00) + fraction_x * (tap11 - tap01)
    slope_x = (1 - fraction_y) * (tap01 - tap00) + fraction_y * (tap11 - tap10)

    sum_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(sum_ptr, tl.sum(patch * slope_y))
    tl.store(sum_ptr + 1, tl.sum(patch * slope_x))


def _constants(offset: Tensor, *tensors: Tensor) -> dict:
    """Returns the widths of index and arithmetic that these tensors need."""
    reach = max(
        sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
        for t in tensors
    )
    return {
        "INDEX": tl.int64 if reach >= 2**31 - 2 * BLOCK else tl.int32,
        "COMPUTE": tl.float64 if offset.dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
        # every executor rounds each product and sum alike
        "enable_fp_fusion": False,
    }


def shift(input: Tensor, offset: Tensor, output: Tensor, paste: bool) -> Tensor:
    """Launches the crop or the paste of [N, C, H, W] into a dense output [N, C, height, width]."""
    elements = output[0].numel() if len(output) else 0
    blocks = triton.cdiv(elements, BLOCK)
    if elements:
        with torch.cuda.device_of(input):
            shift_kernel[(len(input) * blocks,)](
                input, offset.contiguous(), output,
                *input.shape[1:], *output.shape[2:], elements, blocks, *input.stride(),
                PASTE=paste,
                CHANNELS_LAST=output.stride(1) == 1,
                **_constants(offset, input, output),
            )
    return output


def offset_gradient(image: Tensor, patch: Tensor, offset: Tensor) -> Tensor:
    """Launches the gradient by the offset of <crop(image, offset), patch>, [N, 2]."""
    elements = patch[0].numel() if len(patch) else 0
    blocks = triton.cdiv(elements, BLOCK)
    sums = offset.new_empty(len(image), blocks, 2)
    if elements:
        with torch.cuda.device_of(image):
            offset_gradient_kernel[(len(image) * blocks,)](
                image, patch, offset.contiguous(), sums,
                *image.shape[1:], *patch.shape[2:], elements, blocks,
                *image.stride(), *patch.stride(),
                CHANNELS_LAST=patch.stride(1) == 1,
                **_constants(offset, image, patch),
            )
    return sums.sum(1)


def shape_classes() -> dict[str, Callable[[], object]]:
    """Returns, by name, the launches of the shipped models; called with meta tensors by `aot.py`.

    Channels lie last; their number is a multiple of 16 (wide loads) or not, such as the image's 4.
    """

    def classes(channels: int, name: str) -> dict[str, Callable[[], object]]:
        image, patch = (
            torch.empty((2, channels, side, side), device="meta", memory_format=torch.channels_last)
            for side in (240, 96)
        )
        offset = torch.empty(2, 2, device="meta")
        return {
            f"crop, {name}": lambda: shift(image, offset, patch, paste=False),
            f"paste, {name}": lambda: shift(patch, offset, image, paste=True),
            f"gradient by the offset, {name}": lambda: offset_gradient(image, patch, offset),
        }

    return classes(16, "channels a multiple of 16") | classes(4, "any channels")
