"""The tables of README and docs, in Markdown, made of the committed results alone."""

from __future__ import annotations

from collections.abc import Callable
from statistics import stdev

from committed import Cases, Content, Results, markdown, mean, routes, short
from gpu_tables import (
    gpu_bench,
    gpu_bounds,
    gpu_kernels,
    gpu_launches,
    gpu_network,
    prediction,
    simulation,
    simulation_check,
)

# times of the suite: what README calls them
PEERS = {
    "engine": "**engine**, network",
    "predict": "**`VolumePredictor.predict`**, normalisation included",
    "OpenVINO int8": "static, OpenVINO int8 (this package's codes)",
    "ONNX Runtime int8": "static, ONNX Runtime int8",
    "OpenVINO fp32": "static, OpenVINO fp32",
    "ONNX Runtime fp32": "static, ONNX Runtime fp32",
    "torch.compile channels_last": "static, `torch.compile` channels_last",
    "eager channels_last": "static, eager channels_last, batches of 8",
    "eager slice by slice": "static, eager slice by slice, as the official code runs",
    "eager batched": "static, eager batches of 8",
}
FLOAT_ROWS = ("static", "whole", "whole+L", "S")
ROWS = ("static", "whole", "S", "Q", "S+Q", "8", "16", "random", "whole+L", "S+Q+L")
# rows: what README calls them
NAMES = {"S+Q": "Med-DANet V2", "whole": "whole", "static": "plain"}
COSTS = {"mac": "true MACs, G", "paper": "papers' count, G", "scaled_paper": "b/32, G"}


# speed ----------------------------------------------------------------------------------------


def speed(results: Results) -> str:
    """Every contestant on the case that all of them ran on."""
    part = results.networks[0]
    times = {name: found["seconds"] for name, found in part["times"].items()}
    ordered = sorted(times, key=lambda name: times[name])
    rows = [
        (PEERS.get(name, name), f"{times[name]:.2f}", f"{times[name] / times['engine']:.1f}")
        for name in ordered
    ]
    header = f"{short(part['case'])} ({routes(part['decisions'])})"
    return markdown([header, "seconds", "times the engine"], rows)


def speed_cases(results: Results) -> str:
    """Seconds of ours, and how many times as long the static network takes, case by case."""
    rows = []
    for part in results.networks:
        times = {name: found["seconds"] for name, found in part["times"].items()}
        eager, int8 = times["eager slice by slice"], times.get("OpenVINO int8")
        ratios = [f"{eager / times['engine']:.1f}", f"{eager / times['predict']:.1f}"]
        if int8 is None:
            ratios += ["not run", "not run"]
        else:
            ratios += [f"{int8 / times['engine']:.1f}", f"{int8 / times['predict']:.1f}"]
        agreement = part["quality"]["engine with the float32 model"]
        rows.append((
            short(part["case"]), routes(part["decisions"]), f"{times['engine']:.2f}",
            f"{times['predict']:.2f}", *ratios, f"{agreement:.3f}",
        ))
    return markdown(
        ["case", "slices", "engine, s", "`predict`, s", "eager / engine", "eager / `predict`",
         "OpenVINO int8 / engine", "int8 / `predict`", "Dice with float32"], rows
    )


def _levels(results: Results, prefix: str) -> list[tuple[str, Content]]:
    """Returns the measured levels of a kind, by what follows the prefix in their names."""
    return [
        (level.removeprefix(prefix), part)
        for level, part in results.speed.items() if level.startswith(prefix)
    ]


def cpu_kernels(results: Results) -> str:
    """Every kernel on the CPU beside its peers."""
    rows = []
    for kernel, part in _levels(results, "kernel "):
        ours = part["providers"][part["ours"]]["wall_ms"]["median"]
        peers = [f"{name} {ratios['wall_ms']:.1f}x" for name, ratios in part["ratios"].items()]
        peers += [f"{name} did not run" for name, found in part["providers"].items()
                  if "failed" in found]
        rows.append((kernel, part["ours"], f"{ours:.2f}", "; ".join(peers)))
    header = ["eight slices", "ours", "ms", "peers' time over ours"]
    return markdown(header, rows) if rows else "None has been measured yet."


def bank(results: Results) -> str:
    """V1's members in the engine."""
    rows = []
    for member, part in _levels(results, "bank "):
        slices = part["shape"][0]
        times = {name: 1e3 * found["seconds"] / slices for name, found in part["times"].items()}
        eager = times.pop("eager slice by slice")
        cells = [f"{ms:.1f} ({eager / ms:.1f}x)" for ms in times.values()]
        rows.append((member, f"{eager:.1f}", *cells))
    header = ["ms a slice", "eager, slice by slice", "engine, float32", "engine, 8 bit"]
    return markdown(header, rows) if rows else "None has been measured yet."


def files(results: Results) -> str:
    """Files to files."""
    part = results.speed["end to end"]
    rows = [
        (name, f"{found['seconds']:.2f}", f"{found['cpu_seconds']:.2f}")
        for name, found in part["times"].items()
    ]
    return markdown([f"{short(part['case'])}, .nii.gz to .nii.gz", "seconds", "CPU seconds"], rows)


# accuracy -------------------------------------------------------------------------------------


def present_rows(cases: Cases) -> list[str]:
    """The rows that every case has."""
    return [row for row in ROWS if all(row in case["rows"] for case in cases.values())]


def scored(cases: Cases, row: str) -> list[Content]:
    """One row's scores, case by case; what runs in float32 costs 32 / 32."""
    found = [case["rows"][row] for case in cases.values()]
    if row in FLOAT_ROWS:
        return [{**scores, "scaled_paper": scores["paper"]} for scores in found]
    return found


def accuracy(cases: Cases) -> str:
    """Means over the held-out cases, Med-DANet V2's Table 3a."""
    return _means(cases, {row: row for row in ROWS}, distances=True)


def headline(cases: Cases) -> str:
    """Med-DANet V2 and its static rivals, means over the held-out cases."""
    return _means(cases, NAMES, distances=False)


def _means(cases: Cases, names: dict[str, str], distances: bool) -> str:
    """Means of those rows that every case has, row -> what to call it."""
    rows, regions = [], ("WT", "TC", "ET")
    for row in [row for row in names if row in present_rows(cases)]:
        found = scored(cases, row)
        cells = [f"{mean(c['dice'][r] for c in found):.3f}" for r in regions]
        if distances:
            cells += [f"{mean(c['hd95_mm'][r] for c in found):.1f}" for r in regions]
        cells += [f"{mean(c[kind] for c in found) / 1e9:.1f}" for kind in COSTS]
        rows.append((names[row], *cells))
    hd95 = ("HD95 WT", "TC", "ET") if distances else ()
    header = [f"mean of {len(cases)} held-out cases", *regions, *hd95, *COSTS.values()]
    return markdown(header, rows)


def differences(cases: Cases) -> str:
    """Med-DANet V2 minus its static rivals, with standard errors over patients and over folds."""
    rows = []
    for rival in ("whole", "static"):
        for kind, name, unit in (("dice", "Dice, points", 100), ("hd95_mm", "HD95, mm", 1)):
            cells = []
            for region in ("WT", "TC", "ET"):
                found: dict[str, list[float]] = {}
                for case in cases.values():
                    ours, theirs = (case["rows"][row][kind][region] for row in ("S+Q", rival))
                    found.setdefault(case["run"], []).append(unit * (ours - theirs))
                patients = [difference for fold in found.values() for difference in fold]
                of_folds = [mean(fold) for fold in found.values()]
                # one fold alone has no error of its own
                errors = [stdev(x) / len(x) ** 0.5 for x in (patients, of_folds) if len(x) > 1]
                cells.append(f"{mean(patients):+.1f} ({', '.join(f'{e:.1f}' for e in errors)})")
            rows.append((NAMES[rival], name, *cells))
    return markdown(["S+Q minus", "", "WT", "TC", "ET"], rows)


def accuracy_cases(cases: Cases) -> str:
    """Dice case by case."""
    shown = [row for row in NAMES if row in present_rows(cases)]
    rows = []
    for name, case in cases.items():
        cells = [" / ".join(f"{x:.2f}" for x in case["rows"][r]["dice"].values()) for r in shown]
        cost = f"{case['rows']['S+Q']['mac'] / 1e9:.1f}"
        rows.append((
            short(name), case["run"], *cells, cost,
            routes(list(case["decisions"]["routes"].values())),
        ))
    dice = [f"{NAMES[row]}: WT / TC / ET" for row in shown]
    return markdown(["case", "run", *dice, "true MACs, G", "slices"], rows)


def decisions(cases: Cases) -> str:
    """What the decisions were worth, case by case."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    rows = []
    for name, case in cases.items():
        found = case["decisions"]
        tumour = sum(map(sum, found["confusion"][1:]))
        empty = sum(found["confusion"][0])
        widths = ", ".join(
            "/".join(f"{bits}: {n}" for bits, n in stage.items()) for stage in found["num_bits"]
        )
        coverage = found["crop_coverage"]
        rows.append((
            short(name), f"{found['missed_slices']} of {tumour}",
            percent(found["skipped"] / max(found["tumour_voxels"], 1)),
            f"{sum(found['confusion'][0][1:])} of {empty}",
            *(percent(coverage[place]) for place in ("model", "image centre", "brain centroid")),
            widths,
        ))
    return markdown(
        ["case", "tumour slices skipped", "tumour voxels in them", "empty slices run",
         "tumour inside the crop", "crop at the image's centre", "at the brain's centroid",
         "widths by stage"], rows
    )


def confusion(cases: Cases) -> str:
    """All cases' slices: the route that the labels call for against the one that was taken."""
    found = [case["decisions"] for case in cases.values()]
    names = list(found[0]["routes"])
    rows = [
        (f"**{wanted}**", *map(sum, zip(*(case["confusion"][row] for case in found), strict=True)))
        for row, wanted in enumerate(names)
    ]
    return markdown(["labels call for, policy takes", *names], rows)


# machines -------------------------------------------------------------------------------------


def scaling(results: Results) -> str:
    """Time against the number of slices that are segmented."""
    part = results.speed["scaling with slices"]
    rows = [
        (count, f"{part['times'][str(count)]['seconds']:.3f}",
         f"{part['times'][str(count)]['cpu_seconds']:.3f}")
        for count in part["segmented"]
    ]
    return markdown(["slices segmented, of 155", "seconds", "CPU seconds"], rows)


def memory(results: Results) -> str:
    """Peak memory of a folder run."""
    content = results.read("memory")
    peaks = [row["peak_mb"] for row in content["rows"]]
    shown = [n for n in (1, 3, 10, 20, 50, 100) if n <= len(peaks)]
    cells = [f"{max(peaks[:n]) / 1e3:.2f}" for n in shown]
    return markdown(["cases", *map(str, shown)], [("largest resident set so far, GB", *cells)])


def context(results: Results) -> str:
    """The papers' rivals on the same volume."""
    rows = []
    for name, row in results.read("context")["rows"].items():
        windows, timed = row.get("windows"), "seconds" in row
        ran = row.get("estimated_from_windows", windows if timed else 0)
        rows.append((
            name, row["network"], "" if windows is None else f"{ran} of {windows}",
            *(f"{row[key]:.1f}" if timed else "not timed" for key in ("seconds", "cpu_seconds")),
            f"{row['macs'] / 1e9:,.0f}", f"{row['peak_mb'] / 1e3:.2f}" if timed else "",
            "" if row["paper_g"] is None else f"{row['paper_g']:,.2f}",
        ))
    return markdown(
        ["", "run as", "windows run", "seconds", "CPU seconds", "G MACs of the volume",
         "peak memory, GB", "papers' G per 128^3 block"], rows
    )


def training_step(results: Results) -> str:
    """A training step against the straightforward way to write it."""
    rows = []
    for kind in ("joint", "quantised"):
        part = results.speed[f"training step, {kind}"]
        rows.extend(
            (kind, name, f"{times['seconds']:.2f}", f"{times['cpu_seconds']:.2f}",
             f"{part['ratio_to_ours'][name]:.2f}x")
            for name, times in part["times"].items()
        )
    return markdown(
        ["steps", "written", "seconds", "CPU seconds", "time over ours in float32"], rows
    )


def ablations(results: Results) -> str:
    """Every list of configurations that was trained."""
    parts = []
    for name, content in results.ablations().items():
        parts.append(f"`{name}.json`\n\n{ablation(content['results'])}")
    return "\n\n".join(parts) or "None has been committed yet."


def ablation(results: Content) -> str:
    """One list of configurations: means over all cases of all folds.

    Args:
        results: Configuration -> row -> fold -> scores, as `ablations.py` stores them.
    """
    rows, regions = [], list[str]()
    for configuration, kinds in results.items():
        for row, folds in kinds.items():
            if not folds or any("dice" not in fold for fold in folds.values()):
                continue
            scores = [case for fold in folds.values() for case in fold["dice"].values()]
            dice = [f"{mean(s[region] for s in scores):.4f}" for region in scores[0]]
            cost = [
                f"{mean(fold['slice_mega'][kind] for fold in folds.values()):.2f}"
                for kind in ("mac", "scaled_paper")
            ]
            rows.append((configuration, row, len(scores), len(folds), *dice, *cost))
            regions = list(scores[0])
    dice = [f"Dice {region}" for region in regions]
    return markdown(
        ["configuration", "row", "cases", "folds", *dice, "true M MACs per slice",
         "b/32, M per slice"], rows
    )


TABLES: dict[str, Callable[[Results], str]] = {
    "speed": speed, "speed-cases": speed_cases, "files": files,
    "speed-avx2": lambda results: speed(Results(results.folder, "avx2")),
    "speed-cases-avx2": lambda results: speed_cases(Results(results.folder, "avx2")),
    "cpu-kernels": cpu_kernels, "bank": bank,
    "headline": lambda results: headline(results.accuracy),
    "accuracy": lambda results: accuracy(results.accuracy),
    "accuracy-cases": lambda results: accuracy_cases(results.accuracy),
    "decisions": lambda results: decisions(results.accuracy),
    "folds-headline": lambda results: headline(results.folds),
    "folds": lambda results: accuracy(results.folds),
    "folds-differences": lambda results: differences(results.folds),
    "folds-cases": lambda results: accuracy_cases(results.folds),
    "folds-decisions": lambda results: decisions(results.folds),
    "folds-confusion": lambda results: confusion(results.folds),
    "hippocampus-v1": lambda results: ablation(
        results.read("ablation_hippocampus_v1_long")["results"]
    ),
    "scaling": scaling, "memory": memory, "context": context,
    "training-step": training_step,
    "prediction": prediction, "simulation": simulation, "simulation-check": simulation_check,
    "ablations": ablations, "gpu-bench": gpu_bench, "gpu-network": gpu_network,
    "gpu-kernels": gpu_kernels, "gpu-launches": gpu_launches, "gpu-bounds": gpu_bounds,
}
