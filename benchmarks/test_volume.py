"""Wall and CPU time per volume against the static U-Net of the same weights in other runtimes.

    pytest benchmarks --benchmark-only

Two levels: `network` (normalised slices to label slices) and `end to end` (.nii.gz to .nii.gz). All
contestants of a level run in turns in one process, after their answers were compared; ratios stand
in `extra_info` and in `results/`. Real held-out cases where `../shared/data` is, else a phantom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import runtimes
import torch
from volumes import cases, folder_run, label_dice, lesion_dice, write_results

from meddanet.bench import ratios, slice_by_slice, static_network, time_interleaved, torch_peers
from meddanet.data import Case, from_classes, load_labels, load_volume, to_slices
from meddanet.heap import keep_freed_memory
from meddanet.layers import set_quantization
from meddanet.med_danet_v2 import MedDANetV2
from meddanet.predictor import VolumePredictor
from meddanet.weights import load_model

ROUNDS = 3
COPIES = 4  # cases of one folder run


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> list[Case]:
    """Cases that the shipped weights have not seen, or a phantom."""
    return cases(tmp_path_factory.mktemp("phantom"))


def float_model() -> MedDANetV2:
    """The shipped weights without any quantisation."""
    model = load_model()
    set_quantization(model, quantize=False, update_range=False)
    return model


def static_peers(
    slices: np.ndarray, folder: Path, everything: bool
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Returns runs over all slices by name, and why others cannot run."""
    model, tensor = load_model(), torch.from_numpy(slices)
    makers = {
        "OpenVINO int8": lambda: runtimes.openvino_static(model, slices, 8),
        "OpenVINO fp32": lambda: runtimes.openvino_static(model, slices, 32),
        "ONNX Runtime int8": lambda: runtimes.onnxruntime_static(model, slices, 8, folder),
        "ONNX Runtime fp32": lambda: runtimes.onnxruntime_static(model, slices, 32, folder),
    }
    if everything:
        runs, missing = torch_peers(model, tensor)
    else:
        plain = static_network(model).to(memory_format=torch.contiguous_format)
        runs, missing = {"eager slice by slice": lambda: slice_by_slice(plain, tensor)}, {}
        makers = {"OpenVINO int8": makers["OpenVINO int8"]}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except runtimes.Unavailable as reason:
            missing[name] = str(reason)
    return runs, missing


def least_agreement(name: str) -> float:
    """Returns the Dice with their reference that labels have to exceed; codes of 8 bit, less."""
    return 0.95 if "int8" in name else 0.98 if name.startswith(("engine", "meddanet")) else 0.99


def check_agreement(agreement: dict[str, float]) -> None:
    """Fails where labels are not those of their reference."""
    for name, value in agreement.items():
        least = least_agreement(name)
        assert value > least, f"{name}: Dice {value}, expected more than {least}"


def leave_out_saturated(runs: dict[str, Callable], agreement: dict[str, float]) -> dict[str, str]:
    """Takes ONNX Runtime's int8 out where its sums of bytes saturate: on CPUs without VNNI."""
    value = agreement.get(name := "ONNX Runtime int8", 1.0)
    if value > least_agreement(name):
        return {}
    del runs[name], agreement[name]
    return {name: f"its labels are others, Dice {value} with eager"}


def quality(case: Case, predictor: VolumePredictor) -> dict[str, float]:
    """Dice of the engine's lesion with the float32 model's, and of both with the truth."""
    volume = load_volume(case)
    engine = predictor.predict(volume).labels
    own = VolumePredictor(load_model(), "cpu", executor="eager").predict(volume).labels
    full = VolumePredictor(float_model(), "cpu", executor="eager").predict(volume).labels
    result = {
        "engine with the model's own layers": lesion_dice(engine, own),
        "engine with the float32 model": lesion_dice(engine, full),
    }
    if case.label:
        truth = load_labels(case.label, like=volume)
        result |= {
            "engine with the truth": lesion_dice(engine, truth),
            "float32 model with the truth": lesion_dice(full, truth),
        }
    return result


@pytest.mark.parametrize("index", range(3))
def test_network(benchmark, held_out, index, tmp_path):
    """Every runtime on the first case; the eager and the fastest static one on the others."""
    if index >= len(held_out):
        pytest.skip("only one case: no real volumes in ../shared/data")
    case = held_out[index]
    predictor = VolumePredictor(load_model(), "cpu")
    volume = load_volume(case)
    slices = to_slices(predictor.ordered(volume))
    fitting = predictor.fitted(torch.from_numpy(slices))
    runs, not_run = static_peers(fitting.numpy(), tmp_path, everything=index == 0)
    answers = {name: np.array(run()) for name, run in runs.items()}
    agreement = {
        name: label_dice(answer, answers["eager slice by slice"])
        for name, answer in answers.items()
    }
    not_run |= leave_out_saturated(runs, agreement)
    check_agreement(agreement)
    found = quality(case, predictor)
    check_agreement({"engine": found["engine with the model's own layers"]})
    runs["engine"] = lambda: predictor.engine.segment(fitting)
    runs["predict"] = lambda: predictor.predict(volume)
    # all have run once: for their answers, and ours for its quality
    times = time_interleaved(runs, ROUNDS, warm_up=False)
    prediction = benchmark.pedantic(lambda: predictor.predict(volume), rounds=ROUNDS)
    content = {
        "case": case.name, "shape": list(fitting.shape), "executor": predictor.engine.executor,
        "decisions": np.bincount(prediction.decisions, minlength=len(prediction.routes)).tolist(),
        "quality": found, "static_agreement": agreement, "not_run": not_run, "times": times,
        "ratios": {base: ratios(times, base) for base in ("engine", "predict")},
    }
    benchmark.extra_info.update(content)
    write_results(f"network {case.name}", content)
    for name, reason in not_run.items():
        print(f"{name}: not run, {reason}")


def written_agreement(case: Case, folders: dict[str, Path]) -> dict[str, float]:
    """Returns the least Dice of every contestant's files with PyTorch's layers on our own slices.

    Args:
        case: What was segmented.
        folders: Of label files, by contestant. Ours should hold what the model's own layers decide
            and segment, those of scripts what the static network says of every slice.
    """
    volume, own = load_volume(case), VolumePredictor(load_model(), "cpu", executor="eager")
    slices = own.fitted(torch.from_numpy(to_slices(own.ordered(volume))))
    plain = static_network(load_model()).to(memory_format=torch.contiguous_format)
    classes = np.asarray(slice_by_slice(plain, slices))
    static = from_classes(np.moveaxis(classes, 0, -1), "brats2021")
    decided = own.predict(volume).labels
    return {
        name: min(
            label_dice(nib.load(path).get_fdata(), decided if "meddanet" in name else static)
            for path in folder.glob("*.nii.gz")
        )
        for name, folder in folders.items()
    }


def test_end_to_end(benchmark, held_out, tmp_path):
    """Files to files: a case alone, a folder run, and scripts around static runtimes."""
    case = held_out[0]
    predictor = VolumePredictor(load_model(), "cpu")
    plain = static_network(load_model()).to(memory_format=torch.contiguous_format)
    copies = [replace(case, name=f"copy_{index}") for index in range(COPIES)]

    def script(network: Callable, out: Path) -> None:
        keep_freed_memory()  # a folder run has set other bounds
        runtimes.by_nibabel(case, network, out)

    contestants: dict[str, Callable[[Path], None]] = {
        "nibabel + eager slice by slice": partial(script, partial(slice_by_slice, plain)),
        "meddanet, one case": lambda out: folder_run(copies[:1], out, predictor),
        f"meddanet, {COPIES} cases": lambda out: folder_run(copies, out, predictor),
    }
    try:
        # made for the shape; what it segments is what the script has read
        shape = to_slices(load_volume(case)).shape
        static = runtimes.openvino_static(load_model(), np.empty(shape, np.float32), 8)
        contestants["nibabel + OpenVINO int8"] = partial(script, lambda x: static(x.numpy()))
    except runtimes.Unavailable as reason:
        print(f"OpenVINO int8: not run, {reason}")
    folders = {name: tmp_path / name for name in contestants}
    runs = {name: partial(run, folders[name]) for name, run in contestants.items()}
    for name, run in runs.items():
        folders[name].mkdir()
        run()
    agreement = written_agreement(case, folders)
    check_agreement(agreement)
    times = time_interleaved(runs, ROUNDS, warm_up=False)
    benchmark.pedantic(runs["meddanet, one case"], rounds=ROUNDS)
    labels = nib.load(folders["meddanet, one case"] / "copy_0.nii.gz").get_fdata()
    assert set(np.unique(labels)) <= {0, 1, 2, 4}
    shared = times[f"meddanet, {COPIES} cases"]
    times["meddanet, a case of a folder"] = {key: value / COPIES for key, value in shared.items()}
    content = {
        "case": case.name, "agreement": agreement, "times": times,
        "ratios": ratios(times, "meddanet, one case"),
    }
    benchmark.extra_info.update(content)
    write_results("end to end", content)
