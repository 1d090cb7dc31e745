"""Times both forwards of a training convolution and prints the table of `kernels/forward_way.py`.

    python benchmarks/forward_way.py RESULT.json

For every class of shapes, on U-Net-16's own sizes: the forward that autograd records, quantisation
of input and weights included, on codes and on values (PyTorch's convolution), in turns; beside
them PyTorch's `fake_quantize_per_tensor_affine` + convolution, and whole steps. Outputs are
compared first; the table has the ratios of steps. On a GPU classes are named by its architecture
and ratios are of wall time; on a CPU they are oneDNN's, and of processor time with one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from timing import DEVICE, DRY_RUN, Results, compare
from torch import Tensor

from meddanet.kernels import fake_quant_conv2d, forward_way
from meddanet.kernels.forward_way import SPEED_UP, ShapeClass

# kernel, stride, channels in and out, and by how much the side is halved
CONVOLUTIONS = (
    (3, 1, 4, 16, 0), (3, 1, 16, 16, 0), (3, 1, 32, 32, 1), (3, 1, 64, 64, 2), (3, 1, 128, 128, 3),
    (3, 2, 16, 32, 0), (3, 2, 32, 64, 1), (3, 2, 64, 128, 2),
    (1, 1, 32, 16, 0), (1, 1, 64, 32, 1), (1, 1, 128, 64, 2),
)
BATCH, SIDE = (16, 240) if DEVICE.type == "cuda" else (2, 16) if DRY_RUN else (8, 128)
ROUNDS, KIND = 3 if DRY_RUN else 15, "wall_ms" if DEVICE.type == "cuda" else "cpu_ms"


@contextmanager
def forced(found: ShapeClass, on_codes: bool) -> Iterator[None]:
    """Makes a class take one way."""
    before = dict(SPEED_UP)
    SPEED_UP[found] = 2.0 if on_codes else 0.5
    try:
        yield
    finally:
        SPEED_UP.clear()
        SPEED_UP.update(before)


def measure(kernel: int, stride: int, c_in: int, c_out: int, halved: int, bits: int) -> dict | None:
    """Returns a row of results; None where no integer kernel computes the class."""
    side = SIDE >> halved
    x = torch.randn(BATCH, c_in, side, side, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(c_out, c_in, kernel, kernel, device=DEVICE) / (kernel**2 * c_in) ** 0.5
    weight.requires_grad_()
    padding, amax = kernel // 2, x.detach().abs().amax()
    geometry = [stride, stride, padding, padding, 1, 1, 1]
    found = forward_way.shape_class(x, weight, geometry, 1 if bits <= 8 else 2)
    if found is None:
        return None

    def ours(on_codes: bool) -> Tensor:
        with forced(found, on_codes):
            return fake_quant_conv2d(x, weight, None, stride, padding, num_bits=bits,
                                     input_num_bits=bits, input_amax=amax)

    def eager() -> Tensor:
        ranges = weight.detach().abs().amax()
        quantised = peers.eager_fake_quantize(weight, ranges)
        return F.conv2d(peers.eager_fake_quantize(x, amax), quantised, None, stride, padding)

    providers = {"codes": lambda: ours(True), "values": lambda: ours(False)}
    if bits == 8:
        providers["fake_quantize operator + convolution"] = eager
    # TF32, which PyTorch's convolution takes by default, has ten bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        values, codes = (providers[name]().detach() for name in ("values", "codes"))
    difference = (codes - values).abs().max() / values.abs().max()
    assert difference < 1e-5, f"{found}: the two ways differ by {difference:.1e}"
    grad = torch.randn_like(values)
    steps = {
        name: (lambda run=run: torch.autograd.grad(run(), (x, weight), grad))
        for name, run in providers.items()
    }
    timed = {
        kind: compare("codes", functions, capture=False, rounds=ROUNDS)
        for kind, functions in (("forward", providers), ("step", steps))
    }
    return {
        "class": list(found), "shape": list(x.shape), "out_channels": c_out,
        "difference": float(difference), **timed,
    }


def main() -> None:
    """Measures, writes the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = Results(path)
    lines = []
    for bits in (8, 16):
        for convolution in CONVOLUTIONS:
            row = measure(*convolution, bits)
            if row is None:
                continue
            results.add(row)
            ratio = row["forward"]["ratios"]["values"][KIND]
            step = row["step"]["ratios"]["values"][KIND]
            lines.append(f"    {ShapeClass(*row['class'])!r}: {step:.2f},".replace("'", '"'))
            print(f"{ShapeClass(*row['class'])}: forward {ratio:.2f}, step {step:.2f}", flush=True)
    print("SPEED_UP of kernels/forward_way.py:", *(lines or ["no integer kernel runs"]), sep="\n")


if __name__ == "__main__":
    main()
