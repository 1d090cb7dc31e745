"""What follows the integer sum, in Triton: constants applied, codes made; see `conv_int.py`.

Where codes may have 16 bits a value is two float32, head + tail, with about 46 bits: products are
split by a fused multiply-add, sums by Knuth's two-sum. Elsewhere the tail is left out, and each
product and sum is rounded on its own: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

from .backend import tl, triton


@triton.jit
def step_of(amax_ptr, bits):
    """Returns (step, largest code) of a range and a width, NaN where one of them is none."""
    known = (bits >= 2) & (bits <= 16)
    bits = tl.where(known, bits, 2)
    largest = tl.where(bits == 16, 32639, (1 << (bits - 1)) - 1).to(tl.float32)
    largest = tl.where(known, largest, float("nan"))
    amax = tl.load(amax_ptr)
    amax = tl.where(tl.abs(amax) == float("inf"), float("nan"), amax)
    return tl.div_rn(amax, largest), largest


@triton.jit
def float_of(total, PRECISE: tl.constexpr):
    """Returns an integer as head + tail: exact if PRECISE, else rounded to the head."""
    head = total.to(tl.float32)
    if PRECISE:
        return head, (total - head.to(total.dtype)).to(tl.float32)
    else:
        return head, tl.zeros_like(head)


@triton.jit
def plus(head, tail, addend, PRECISE: tl.constexpr):
    """Returns head + tail + addend."""
    total = head + addend
    if PRECISE:
        shadow = total - head
        tail += (head - (total - shadow)) + (addend - shadow)
    return total, tail


@triton.jit
def times_plus(head, tail, scale, offset, PRECISE: tl.constexpr):
    """Returns (head + tail) * scale + offset for float64 rows of constants."""
    scale_head, offset_head = scale.to(tl.float32), offset.to(tl.float32)
    scale_row = scale_head[None, :]
    product = head * scale_row
    if PRECISE:
        scale_tail = (scale - scale_head.to(tl.float64)).to(tl.float32)[None, :]
        offset_tail = (offset - offset_head.to(tl.float64)).to(tl.float32)[None, :]
        lost = tl.fma(head, scale_row, -product)
        tail = lost + (head * scale_tail + tail * scale_row) + offset_tail
    return plus(product, tail, offset_head[None, :], PRECISE)


@triton.jit
def codes_of(value, step, largest):
    """Returns the int32 codes of float32 values: 0 for NaN, or where the step is 0."""
    quotient = tl.div_rn(value, tl.where(step == 0, float("inf"), step))
    quotient = tl.where(quotient > largest, largest, quotient)
    quotient = tl.where(quotient < -largest, -largest, quotient)
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    # half to even: beyond 2^23 a sum has no bits left for a fraction
    return ((quotient + 12582912.0) - 12582912.0).to(tl.int32)
