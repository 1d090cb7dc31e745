"""Whether an earlier run left what a run asks for: nothing else of its name is taken for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .cases import image_digests
from .data import Case, VolumeError, canonical_modality
from .data.labels import result_convention
from .data.results import check_kept, digest, is_unfinished, report_of, result_paths
from .data.sources import unnamed_channels
from .weight_files import locate, read_facts


class Request(NamedTuple):
    """What a run asks for that tells in its results.

    Attributes:
        weights: Their name or file.
        weights_sha256: Of the file.
        facts: What it says of the model.
        window: Side of the windows, None for whole slices.
        labels: Label convention, None for the input's.
        modalities: What unnamed channels are, in file order.
        preview: Whether a picture is wanted.
    """

    weights: str
    weights_sha256: str
    facts: Mapping[str, Any]
    window: int | None = None
    labels: str | None = None
    modalities: tuple[str, ...] | None = None
    preview: bool = False


def request(weights: str, **others: Any) -> Request:
    """Returns a request for what weights find.

    Raises:
        ValueError: If there are no such weights, or their file is not one of ours.
    """
    path = locate(weights)
    return Request(weights, digest(path), read_facts(path), **others)


def is_finished(case: Case, out: Path, asked: Request) -> bool:
    """Tells whether an earlier run left everything that is asked for.

    What a report does not tell, as older ones do not, is no difference.

    Args:
        case: From `gather_cases`.
        out: Folder of the results.
        asked: From `request`.

    Raises:
        VolumeError: If there is a report of something else, whose results a run would replace, the
            labels were changed since, or an image cannot be read.
    """
    labels, path, picture = results = result_paths(case.name, out)
    report = report_of(labels)
    if not report:
        return False
    check_kept(results)
    try:
        differences = " and ".join(_differences(case, report, asked))
    except (AttributeError, LookupError, TypeError):
        differences = "not as meddanet wrote it"
    if differences:
        raise VolumeError(
            f"{case.name}: {path} is {differences}; name another folder with -o, or replace it "
            "with --overwrite"
        )
    there = labels.is_file() and (picture.is_file() or not asked.preview)
    return there and not is_unfinished(labels)


def _differences(case: Case, report: dict[str, Any], asked: Request) -> Iterator[str]:
    """Yields what a report is of that is not asked for."""
    run = report.get("run", {})
    if not _same_weights(run, asked):
        name = run["weights"]
        yield f"of weights {name}, not " + (
            "those that have this name now" if name == asked.weights else asked.weights
        )
    convention, wanted = report.get("label_convention"), _conventions(case, report, asked)
    if convention not in (None, *wanted):
        yield f"of labels in {convention}, not in {wanted[0]}"
    # older ones tell of their windows, but not how large these were
    window = run.get("window", asked.window or True if report.get("windows") else None)
    if window != asked.window:
        yield f"of {_extent(window)}, not of {_extent(asked.window)}"
    channels = tuple(map(canonical_modality, unnamed_channels(case, asked.modalities) or ()))
    if channels not in ((), tuple(report.get("modalities", channels))):
        yield f"of channels {', '.join(report['modalities'])}, not {', '.join(channels)}"
    known = report.get("images_sha256", {})
    # images that were not there then had no part in it
    found = image_digests(case) if known else {}
    if others := [kind for kind in known if known[kind] != found.get(kind)]:
        yield f"of other images ({', '.join(others)})"


def _same_weights(run: Mapping[str, Any], asked: Request) -> bool:
    if known := run.get("weights_sha256"):
        return known == asked.weights_sha256
    named = run.get("weights", asked.weights)
    return Path(named).resolve() == Path(asked.weights).resolve()


def _conventions(case: Case, report: Mapping[str, Any], asked: Request) -> tuple[str, ...]:
    """Returns what a report may say of its labels' convention, first what it would say now."""
    trained = asked.facts.get("label_convention", "brats2021")
    if "label_values" in asked.facts:
        # older reports repeat what the weights say beside the values
        return "values", trained
    modalities = case.modalities or report.get("modalities", ())
    return (result_convention(asked.labels, case.convention, modalities, trained),)


def _extent(window: int | None) -> str:
    if window is None:
        return "whole slices"
    return "windows" if window is True else f"windows of {window}"
