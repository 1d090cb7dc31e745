"""What one forward pass computes: multiply-adds, seen at PyTorch's dispatcher, part by part.

Products are counted and not computed: zeros of the right shape stand for them. On the device "meta"
nothing would be computed at all, but its first use imports half of PyTorch's compiler, more than a
second of a command that segments a case in one.

Two conventions. "mac" counts true multiply-adds: convolutions, transposed convolutions on their
input positions, matrix products (a functional attention's included). "paper" counts as both papers
did, with fvcore <= 0.1.5: transposed convolutions on their *output* positions, norms as 5 per
element. Activations, pooling, additions and biases are 0 in both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

CONVENTIONS = ("mac", "paper")
FLOAT_BITS = 32
NORMS = ("batch_norm", "layer_norm", "group_norm")

# how attention runs is the process's: threads that count take turns; a forward may count, too
_COUNTING = RLock()


@dataclass
class Work:
    """What one part computes.

    Attributes:
        macs: Multiply-adds.
        quantisable: Those of them inside quantisable layers.
        bit_operations: Multiply-adds times weight bits times input bits, float layers with 32.
    """

    macs: int = 0
    quantisable: int = 0
    bit_operations: int = 0


# convention -> run -> part -> work
Counted = dict[str, dict[str, dict[str, Work]]]


def _new_work() -> dict[str, dict[str, Work]]:
    """Returns convention -> part -> work, nothing yet."""
    return {convention: defaultdict(Work) for convention in CONVENTIONS}


class _Counter(TorchDispatchMode):
    """Adds up what passes the dispatcher under the name in `part`, convention by convention.

    `layer_bits` is weight bits x input bits of the quantisable layer that runs, None outside one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "rest"
        self.layer_bits: int | None = None
        self.work = _new_work()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keeps PyTorch from importing its compiler to say that it must not compile this."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        product = name in _FACTORS or name == "convolution"
        output = _product(name, args) if product else func(*args, **(kwargs or {}))
        for convention, parts in self.work.items():
            if macs := _macs(convention, name, args, output):
                work = parts[self.part]
                work.macs += macs
                work.quantisable += 0 if self.layer_bits is None else macs
                work.bit_operations += macs * (self.layer_bits or FLOAT_BITS**2)
        return output


def _macs(convention: str, name: str, args: tuple, output: Any) -> int:
    """Returns what an operation counts."""
    if name == "convolution":
        input, weight, transposed = args[0], args[1], args[6]
        counted = input if transposed and convention == "mac" else output
        return counted.numel() * weight[0].numel()
    if name in _FACTORS:
        left, right = args[_FACTORS[name]]
        return left.numel() * math.prod(right.shape[1:][-1:])
    if convention == "paper" and any(norm in name for norm in NORMS):
        return 5 * args[0].numel()
    return 0


# where the two factors of a product stand among its arguments
_FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), slice(0, 2)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), slice(1, 3)),
}


def _product(name: str, args: tuple) -> Tensor:
    """Returns zeros in place of what a product, or a convolution, gives."""
    if name != "convolution":
        left, right = args[_FACTORS[name]]
        rows, columns = right.shape[-2:-1] or right.shape, right.shape[1:][-1:]
        _check_fit("a matrix of {} rows", rows[0], left.shape[-1])
        return left.new_zeros((*left.shape[:-1], *columns))
    input, weight, _, strides, paddings, dilations, transposed, output_paddings, groups = args
    taps, sides = weight.shape[2:], input.shape[2:]
    takes = len(weight) if transposed else weight.shape[1] * groups
    _check_fit("a convolution of {} channels", takes, input.shape[1])
    along = zip(sides, taps, strides, paddings, dilations, output_paddings, strict=True)
    if transposed:
        channels = weight.shape[1] * groups
        sides = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, d, o in along]
    else:
        channels = weight.shape[0]
        sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in along]
    return input.new_zeros(len(input), channels, *sides)


def _check_fit(what: str, takes: int, given: int) -> None:
    # PyTorch, which computes nothing here, would refuse it
    if takes != given:
        raise ValueError(f"input_shape does not fit: {what.format(takes)} is given {given}")


@contextmanager
def _in_single_operations() -> Iterator[None]:
    """Has attention and transformer layers run as the products they are made of."""
    with _COUNTING:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


# in inference mode composite operations reach the dispatcher whole and would count as nothing
@torch.inference_mode(False)
@torch.no_grad()
def count_work(
    model: nn.Module,
    runs: dict[str, Callable[[Any, Tensor], object]],
    input_shape: tuple[int, ...],
    parts: dict[str, str] | None = None,
) -> Counted:
    """Counts one or several ways of running a model in `eval()`: convention -> run -> part -> work.

    Runs a copy on the CPU, in float: fake quantisation is no work. Models on "meta" are run there,
    and recurrent ones, whose products a CPU's layers hide.

    Args:
        model: Any module.
        runs: Name -> function, called with the copy and its input.
        input_shape: Shape of the input.
        parts: Submodule's name -> part; work outside all of them is the part "rest".

    Raises:
        ValueError: If the input does not fit a convolution or a product of matrices.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    on_meta = recurrent or any(weight.is_meta for weight in model.parameters())
    place = "meta" if on_meta else "cpu"
    copy = deepcopy(model).to(place).float().eval()
    counter = _Counter()

    def label(module: nn.Module, attribute: str, inside: object, outside: object) -> None:
        module.register_forward_pre_hook(lambda *_: setattr(counter, attribute, inside))
        module.register_forward_hook(lambda *_: setattr(counter, attribute, outside))

    layers: list[Any] = [module for module in copy.modules() if hasattr(module, "quantize")]
    for layer in layers:
        bits = layer.num_bits * layer.input_num_bits if layer.quantize else FLOAT_BITS**2
        label(layer, "layer_bits", bits, None)
        layer.quantize = False
    for name, part in (parts or {}).items():
        label(copy.get_submodule(name), "part", part, "rest")
    counted: Counted = {c: {} for c in CONVENTIONS}
    for name, run in runs.items():
        counter.work = _new_work()
        with _in_single_operations(), counter:
            run(copy, torch.zeros(input_shape, dtype=torch.float32, device=place))
        for convention, work in counter.work.items():
            counted[convention][name] = dict(work)
    return counted
