"""Training of Med-DANet V2 and V1 in phases, and of the static segmenter they are compared with."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batches
from .build import build_segmenter
from .cases import output_folder
from .checkpoint import checkpoint_files, load_checkpoint, load_part
from .dataset import Dataset, prepare_dataset
from .distributed import first_alone, process_group, rank, world
from .layers import quantized_layers, set_quantization
from .med_danet import MedDANet
from .med_danet_v2 import MedDANetV2
from .monitor import Monitor, Predict
from .networks.heatmap import HeatmapLocator
from .objectives import Objective
from .objectives_v1 import DecisionObjective
from .phase import run_phase
from .recipe import PhaseConfig, TrainConfig
from .routing import to_memory_format
from .run_checks import check_run, objectives_of, untrained_model, warn_of_emulation
from .run_folder import check_config, check_out, hold_run, keep_config
from .weights import part_of, save_model, take_weights

# quantised?, ranges still learnt?
_ARITHMETIC = {"float": (False, True), "learning": (True, True), "fixed": (True, False)}
_USUAL_ARITHMETIC = {
    "static": "float", "segmenter": "float", "decisions": "float", "quantised": "learning",
    "joint": "fixed", "bank": "float", "decision": "float",
}
_THREADS_PER_CPU = 16
# what cuBLAS wants for deterministic algorithms
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def train(config: TrainConfig) -> Path:
    """Runs the phases, then the static baseline; finished phases are loaded, not repeated.

    Under torchrun all its processes train as one.

    Returns:
        The path of the final weights, `<out>/model.safetensors`.

    Raises:
        VolumeError: If the data is bad.
        ValueError: If the configuration does not fit the data, or the run that is there. If
            another run is using `out`.
        FloatingPointError: If a loss is not finite.
        ConnectionError: If another process of the run stops.
    """
    with (
        _settings(config), process_group(config.device) as device,
        hold_run(output_folder(config.out)),
        # every step seeds PyTorch's own generators; the caller's go on as if nothing had been
        torch.random.fork_rng([device] if device.type == "cuda" else []), _made_on_the_cpu(),
    ):
        return _Run(config, device).run()


@contextmanager
def _settings(config: TrainConfig) -> Iterator[None]:
    """Sets what holds for the whole process, for as long as a run takes.

    Raises:
        ValueError: If so many threads are asked for that the process would end by them.
    """
    most = _THREADS_PER_CPU * (os.cpu_count() or 1)
    if config.threads > most:
        raise ValueError(
            f"threads is {config.threads}, expected at most {most} on this machine, or 0 for all"
        )
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic, workspace = torch.get_deterministic_debug_mode(), os.environ.get(_WORKSPACE)
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)


def _made_on_the_cpu() -> AbstractContextManager[object]:
    """Has what is made without a device lie on the CPU, where runs have it, whatever is default."""
    # a context at work, which every operation passes, is nothing to have without need
    usual = torch.get_default_device().type == "cpu"
    return nullcontext() if usual else torch.device("cpu")


class _Run:
    """One call of `train`: the data, the model and what its phases share."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.out = config, device, Path(config.out)
        objectives = (phase.objective for phase in config.phases)
        self.files, self.baseline = checkpoint_files(self.out, objectives)
        check_out(self.out, (*self.files, self.baseline))
        # once a checkpoint is there, all weights are in it
        starts = config.start is not None and not self.files[0].exists()
        check_run(config, starts)
        with first_alone() as first:
            if first:
                check_config(config)
                warn_of_emulation(config, device)
        self.data: Dataset = prepare_dataset(config)
        torch.manual_seed(config.seed)
        self.model = untrained_model(config, len(self.data.modalities), self.data.num_classes)
        if starts:
            self._start()
        self.model = self._place(self.model)
        stride, largest = self.model.stride, self.model.smallest_side
        # only what can be trained is kept: the next call has to ask for the same
        with first_alone() as first:
            if first:
                keep_config(config, self.data.split)
        self.canvas = self.data.canvas(stride, max(stride, largest))
        self.monitor = Monitor(
            self.out, self.data.held_out, every=config.validate_every,
            slices=config.validation_slices, num_classes=self.data.num_classes,
            canvas=self.canvas, tensorboard=config.tensorboard,
        )

    def run(self) -> Path:
        """Runs all phases and saves the weights."""
        phases = self.config.phases
        notes: dict[str, Any] = {**self.data.split, **self.data.facts}
        # the baseline goes on from the last of these
        common = list(takewhile(lambda phase: phase.objective == "static", phases))
        for number, (phase, file) in enumerate(zip(phases, self.files, strict=True)):
            if phase.objective == "segmenter" and not self._crops_trained(number):
                start_crop_stages(self.model)
            later = self.files[number + 1 :]
            if number < len(common):
                later = [*later, self.baseline]
            objective = self._phase(self.model, phase, number, file, later)
            if isinstance(objective, DecisionObjective):
                counts = objective.counts.tolist()
                notes["decision_labels"] = dict(zip(self.model.routes, counts, strict=True))
        path = self.out / "model.safetensors"
        if rank() == 0:
            notes |= self.data.placement()
            save_model(self.model.eval(), path, modalities=self.data.modalities, **notes)
            _warn_of_ranges(self.model, path)
        if self.config.baseline is not None:
            plain = build_segmenter(
                self.config.segmenter, len(self.data.modalities), self.data.num_classes
            )
            if common:
                load_part(self.files[len(common) - 1], "segmenter", plain)
            self._phase(self._place(plain), self.config.baseline, 100, self.baseline, [])
        return path

    def _crops_trained(self, number: int) -> bool:
        """Tells whether crops have last stages of their own before a phase."""
        before = [phase.objective for phase in self.config.phases[:number]]
        started = self.config.start is not None and "static" not in before
        return started or not {"static", "decisions"}.issuperset(before)

    def _start(self) -> None:
        """Takes over the weights that fit, and warns of what a score would not show."""
        weights, parts = self.config.start, self.config.start_parts
        assert weights is not None
        left, facts = take_weights(self.model, weights, parts)
        start_crop_stages(self.model, within=left)
        notes, theirs = [], tuple(facts["modalities"])
        misfits = [name for name in left if not parts or part_of(name) in parts]
        if misfits:
            notes.append(
                f"fits all but {len(misfits)} tensors, first {misfits[0]}, which start anew"
            )
        if theirs != self.data.modalities:
            here = ", ".join(self.data.modalities)
            notes.append(f"was trained on {', '.join(theirs)}; the channels here are {here}")
        own = json.loads(json.dumps(self.data.facts))  # as a file has them
        values = [its.get("label_values") for its in (facts, own)]
        if values[0] != values[1] and None not in values:
            notes.append(f"was trained on label values {values[0]}; here it is {values[1]}")
        kinds = [_intensities(its.get("window_hu")) for its in (facts, own)]
        if kinds[0] != kinds[1]:
            notes.append(f"was trained on {kinds[0]}; here it is {kinds[1]}")
        known = set(self.data.split["held_out"]).intersection(facts.get("trained_on", ()))
        if known:
            notes.append(
                f"was trained on {len(known)} cases that are held out here, such as {min(known)}: "
                "scores on them are not of unseen cases"
            )
        if rank() == 0:
            for note in notes:
                warnings.warn(f"{weights}: {note}", stacklevel=2)

    def _phase(
        self, model: nn.Module, phase: PhaseConfig, number: int, file: Path, later: list[Path]
    ) -> Objective:
        objective = objectives_of(model, self.config)[phase.objective]
        slices = sum(len(case.brain) for case in self.data.training)
        phase = phase.in_steps(max(round(slices / phase.batch), 1))
        if phase.cost_weight is None:
            phase = replace(phase, cost_weight=self.config.cost_weight)
        if isinstance(model, MedDANet) and not phase.parts:
            phase = replace(phase, parts=(phase.objective,))
        built_on = next((path for path in later if path.exists()), None)
        if built_on and not (
            file.exists() and load_checkpoint(file, model)[0].step >= phase.steps
        ):
            raise ValueError(
                f"{built_on}: was trained from fewer steps than the {phase.steps} of "
                f"{file.stem}; delete {built_on.name} and what follows it to train them again, or "
                "name another out"
            )
        arithmetic = phase.arithmetic or _USUAL_ARITHMETIC[phase.objective]
        quantize, update_range = _ARITHMETIC[arithmetic]
        set_quantization(model, quantize=quantize, update_range=update_range)
        batches = Batches(
            self.data.training, self.data.phantoms, (self.config.seed, number),
            self.config.bit_weight, self.config.augment, self.config.margin, self.config.window,
            self.config.lesion_share, self.canvas, self.device,
            z_scores=self.config.window_hu is None,
        )
        run_phase(
            model, objective, phase, batches, file, self.monitor,
            predict=_prediction(model, phase),
            minutes=self.config.checkpoint_minutes, every=self.config.checkpoint_steps,
        )
        return objective

    def _place(self, model: Any) -> Any:
        """Puts a model on the device, in the layout that convolutions prefer."""
        if world() > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = to_memory_format(model.to(self.device), torch.channels_last)
        if self.config.compile:
            compile_parts(model)
        return model


def _warn_of_ranges(model: MedDANet | MedDANetV2, path: Path) -> None:
    """Warns where weights lack what all executors but one need; a bank is loaded in float."""
    unset = [
        name for name, layer in quantized_layers(model).items()
        if not layer.exempt and not layer.input_amax > 0
    ]
    if unset and not isinstance(model, MedDANet):
        warnings.warn(
            f"{path}: {len(unset)} layers have no input range, first {unset[0]}; segment with "
            "--executor eager, or add a phase `quantised`, which learns them", stacklevel=2,
        )


def _intensities(window_hu: list[float] | None) -> str:
    """Says how images are normalised."""
    if window_hu is None:
        return "z-scores"
    return f"a window of {window_hu[0]:g} to {window_hu[1]:g} HU"


def _prediction(model: Any, phase: PhaseConfig) -> Predict:
    """Returns what a phase is judged by: a plain segmenter, or what the decisions make of it."""
    plain: Callable[[Tensor], Tensor] = getattr(model, "segmenter", model)
    if phase.objective == "bank":
        # the last member that trains to the end
        last = [index for index, share in enumerate(phase.stay) if share == 1]
        plain = model.bank[last[-1] if last else -1]

    def predict(slices: Tensor) -> Tensor:
        model.eval()
        if phase.objective in ("static", "segmenter", "bank"):
            return plain(slices).argmax(1)
        return model.segment(slices).labels

    return predict


def compile_parts(model: nn.Module) -> None:
    """Compiles every block that holds layers by itself, in place; names stay as they are."""
    for child in model.children():
        # what is called by other ways than its forward is compiled part by part
        if isinstance(child, (nn.ModuleList, HeatmapLocator)) or hasattr(child, "encoder"):
            compile_parts(child)
        else:
            child.compile()


def start_crop_stages(model: Any, within: list[str] | None = None) -> None:
    """Gives crops' last stages the weights of the whole slice's.

    Args:
        model: Of any kind; without such stages nothing is done.
        within: Only the stages that have a tensor of one of these names; None: all.
    """
    for number, stage in enumerate(getattr(model, "crop_last_stages", ())):
        own = f"crop_last_stages.{number}."
        if within is None or any(name.startswith(own) for name in within):
            stage.load_state_dict(model.segmenter.last_stage.state_dict())
