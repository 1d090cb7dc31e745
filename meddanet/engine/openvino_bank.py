"""Med-DANet's decision network and the members of its bank as OpenVINO graphs."""

from __future__ import annotations

from ..med_danet import MedDANet
from .openvino_graphs import Graphs, Part, to_labels
from .operations import Node
from .opset import record
from .slices import DECISIONS, Array

# sizes of slices whose graphs are kept; one of the largest member holds 137 MB of weights
SIZES = 3


class OpenVINOBank(Graphs):
    """Implements `bank.BankNetworks`.

    Args:
        model: In `eval()`, every quantised layer with a range.
        threads: How many calls run at a time; others wait.

    Raises:
        ValueError: If a network has no translation.
    """

    def __init__(self, model: MedDANet, threads: int) -> None:
        super().__init__(threads, SIZES * (1 + len(model.bank)))
        self._decision = record(model.decision)
        self._members = [record(member) for member in model.bank]
        # built for small images, so that what cannot be translated says so now
        image = model.in_channels, 4 * model.stride, 4 * model.stride
        self.graph(("decide",), (DECISIONS, *image))
        for index in range(len(model.bank)):
            self.graph(("member", index), (1, *image))

    def decide(self, images: Array) -> Array:
        """Returns route logits [8, 1 + n]."""
        return self._run(("decide",), images)[0]

    def member(self, index: int, image: Array) -> Array:
        """Returns labels [H, W]."""
        return self._run(("member", index), image)[0][0]

    def _outputs(self, part: Part, inputs: list[Node]) -> list[Node]:
        name, *rest = part
        if name == "decide":
            return self.translated(self._decision, inputs)
        (logits,) = self.translated(self._members[rest[0]], inputs)
        return [to_labels(logits)]
