"""What follows the integer sum, in Triton: constants applied, codes made; see `conv_int.py`.

Constants come as pairs of float32 (`pairs.py`): there is no float64 instruction here. Where a
slot's codes have 16 bits a value is such a pair, too, head + tail, with about 46 bits: products are
split by a fused multiply-add, sums by Knuth's two-sum. Elsewhere the tail is left out, and each
product and sum is rounded on its own: launch with enable_fp_fusion=False.
"""

from __future__ import annotations

from .backend import tl, triton


@triton.jit
def not_negative(value):
    """Returns 0 for what is negative; keeps a NaN."""
    return tl.where(value < 0, 0.0, value)


@triton.jit
def as_range(amax):
    """Returns ranges as they are meant: NaN for an infinity, 0 for a negative one."""
    return not_negative(tl.where(tl.abs(amax) == float("inf"), float("nan"), amax))


@triton.jit
def step_of(amax_ptr, bits):
    """Returns (step, largest code) of a range and a width, NaN where one of them is none.

    A negative range has a negative step, with which `codes_of` gives zeros.
    """
    known = (bits >= 2) & (bits <= 16)
    bits = tl.where(known, bits, 2)
    largest = tl.where(bits == 16, 32639, (1 << (bits - 1)) - 1).to(tl.float32)
    largest = tl.where(known, largest, float("nan"))
    amax = tl.load(amax_ptr)
    amax = tl.where(tl.abs(amax) == float("inf"), float("nan"), amax)
    return tl.div_rn(amax, largest), largest


@triton.jit
def float_of(total, precise, PRECISE: tl.constexpr):
    """Returns an integer as head + tail: exact if precise, else rounded to the head."""
    head = total.to(tl.float32)
    tail = tl.zeros_like(head)
    if PRECISE and precise:
        tail = (total - head.to(total.dtype)).to(tl.float32)
    return head, tail


@triton.jit
def float_of_bytes(low, mixed, high):
    """Returns high * 65536 + mixed * 256 + low as head + tail, exactly, for sums below 2^47."""
    # carried up to the top, so that 24 bits are left below; no 64-bit conversion, slow on most GPUs
    mixed += low >> 8
    high += mixed >> 8
    below = ((high & 255) << 16) | ((mixed & 255) << 8) | (low & 255)
    above = (high >> 8).to(tl.float32) * 16777216.0
    rest = below.to(tl.float32)
    head = above + rest
    return head, rest - (head - above)


@triton.jit
def plus(head, tail, addend, PRECISE: tl.constexpr):
    """Returns head + tail + addend."""
    total = head + addend
    if PRECISE:
        shadow = total - head
        tail += (head - (total - shadow)) + (addend - shadow)
    return total, tail


@triton.jit
def joined(head, tail):
    """Returns head + tail; of an infinity, whose tail is NaN, the head."""
    total = head + tail
    return tl.where(total == total, total, head)


@triton.jit
def pair_at(ptr, index, PITCH: tl.constexpr):
    """Loads pairs of float32: heads, and their tails PITCH further on."""
    return tl.load(ptr + index), tl.load(ptr + PITCH + index)


@triton.jit
def times_step(scale, scale_tail, step, PRECISE: tl.constexpr):
    """Returns a pair times a float32; the product's tail is 0 unless precise."""
    low = scale_tail * step
    head = tl.fma(scale, step, low)
    tail = tl.fma(scale, step, -head) + low if PRECISE else tl.zeros_like(head)
    return head, tail


@triton.jit
def times_plus(head, tail, scale, scale_tail, offset, offset_tail, PRECISE: tl.constexpr):
    """Returns (head + tail) * scale + offset for pairs of rows of constants."""
    product = head * scale[None, :]
    if PRECISE:
        lost = tl.fma(head, scale[None, :], -product)
        tail = lost + (head * scale_tail[None, :] + tail * scale[None, :]) + offset_tail[None, :]
    return plus(product, tail, offset[None, :], PRECISE)


@triton.jit
def codes_within(value, step, inverse, bound, RELU: tl.constexpr):
    """Returns the int32 codes of float32 values, those of NaN being any.

    A product with the step's reciprocal, mended once by what it leaves of the value, rounds to the
    code that the quotient has, at half the instructions of a division (Markstein 1990; tried for
    every mantissa of a step at every tie).
    """
    # the maximum of zero and a NaN is zero
    inside = tl.minimum(tl.maximum(value, 0.0 if RELU else -bound), bound)
    quotient = inside * inverse
    quotient = tl.fma(tl.fma(-quotient, step, inside), inverse, quotient)
    # half to even: beyond 2^23 a sum has no bits left for a fraction; they hold the whole number
    bits = (quotient + 12582912.0).to(tl.int32, bitcast=True)
    return bits - 0x4B400000


@triton.jit
def codes_of(value, step, largest, RELU: tl.constexpr, MILD: tl.constexpr = False):
    """Returns the int32 codes of float32 values: 0 for NaN, or where the step is 0 or NaN.

    With RELU values below zero have code 0, too. MILD: as in `conv_call.ConvCall`.
    """
    known = step > 0
    step = tl.where(known, step, 0.0)
    if not MILD:
        # with tiny steps the reciprocal would overflow and rests underflow, with huge ones the
        # bound overflow
        factor = tl.where(step < 1e-30, 79228162514264337593543950336.0, 1.0)
        factor = tl.where(step > 1e30, 5.960464477539063e-08, factor)
        step *= factor
        # as a branch it would be issued, predicated, all the same
        value *= factor
    inverse = tl.where(known, tl.div_rn(1.0, tl.where(known, step, 1.0)), 0.0)
    # the quotient of this bound rounds to the largest code
    bound = tl.where(known, largest, 0.0) * step
    codes = codes_within(value, step, inverse, bound, RELU)
    return codes if RELU or MILD else tl.where(value == value, codes, 0)
