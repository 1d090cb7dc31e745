"""The tables of README and docs, in Markdown, made of `results/*.json` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

Content = dict[str, Any]
Cases = dict[str, Content]

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
FLOAT_ROWS = ("static", "whole", "S")
ROWS = ("static", "whole", "S", "Q", "S+Q", "8", "16", "random")
# rows: what README calls them
NAMES = {"S+Q": "Med-DANet V2", "whole": "whole", "static": "plain"}
COSTS = {"mac": "true MACs, G", "paper": "papers' count, G", "scaled_paper": "b/32, G"}


class Results:
    """The committed numbers.

    Args:
        folder: Holds the JSON files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Content:
        """Returns one file's content; the name without its ending."""
        return json.loads((self.folder / f"{name}.json").read_text())

    @cached_property
    def speed(self) -> Content:
        """The CPU suite's numbers: the file of the machine that was measured last."""
        contents = [json.loads(path.read_text()) for path in sorted(self.folder.glob("cpu_*.json"))]
        return max(contents, key=measured)

    @property
    def speed_machine(self) -> str:
        """Processor and threads of the CPU suite."""
        facts = self.networks[0]["machine"]
        return f"{facts['processor']}, {facts['threads']} threads"

    @cached_property
    def networks(self) -> list[Content]:
        """The network level, case by case, the one with all peers first."""
        found = [part for level, part in self.speed.items() if level.startswith("network ")]
        return sorted(found, key=lambda part: (-len(part["times"]), part["case"]))

    @cached_property
    def accuracy(self) -> Cases:
        """Scores and decisions of the shipped weights by held-out case."""
        return dict(sorted(self.read("brats2021")["cases"].items()))

    @cached_property
    def folds(self) -> Cases:
        """The same of the recipe, each fold's weights on the cases it held out."""
        return dict(sorted(self.read("brats2021_folds")["cases"].items()))

    @cached_property
    def predictions(self) -> dict[str, Content]:
        """What `predict.py` says of every card: computed, so never older than the results."""
        from predict import predictions

        return predictions(self.accuracy, self.read("kernels_compiled")["variants"])

    def ablations(self) -> dict[str, Content]:
        """The files that `ablations.py` wrote, by name."""
        files = {path.stem: json.loads(path.read_text()) for path in self.folder.glob("*.json")}
        return {name: content for name, content in sorted(files.items()) if "results" in content}


def measured(levels: Content) -> str:
    """When the newest level of a CPU file was measured; one that does not say is the oldest."""
    return max(level.get("environment", {}).get("date", "") for level in levels.values())


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table; cells as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def short(case: str) -> str:
    """BraTS2021_00024 -> 00024."""
    return case.rpartition("_")[2]


def routes(decisions: Sequence[int]) -> str:
    """What became of the slices, skip first."""
    skip, *crops, whole = decisions
    return f"{skip} skip, {sum(crops)} crop, {whole} whole"


def mean(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    values = list(values)
    return sum(values) / len(values)


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
    )  # fmt: skip


def cpu_kernels(results: Results) -> str:
    """Every kernel on the CPU beside its peers."""
    rows = []
    for level, part in results.speed.items():
        if not level.startswith("kernel "):
            continue
        ours = part["providers"][part["ours"]]["wall_ms"]["median"]
        peers = [f"{name} {ratios['wall_ms']:.1f}x" for name, ratios in part["ratios"].items()]
        peers += [f"{name} did not run" for name, found in part["providers"].items()
                  if "failed" in found]  # fmt: skip
        rows.append((level.removeprefix("kernel "), part["ours"], f"{ours:.2f}", "; ".join(peers)))
    header = ["eight slices", "ours", "ms", "peers' time over ours"]
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
    rows = []
    for row in present_rows(cases):
        found = scored(cases, row)
        dice = [f"{mean(c['dice'][r] for c in found):.3f}" for r in ("WT", "TC", "ET")]
        hd95 = [f"{mean(c['hd95_mm'][r] for c in found):.1f}" for r in ("WT", "TC", "ET")]
        cost = [f"{mean(c[kind] for c in found) / 1e9:.1f}" for kind in COSTS]
        rows.append((row, *dice, *hd95, *cost))
    return markdown(
        [f"mean of {len(cases)} held-out cases", "WT", "TC", "ET", "HD95 WT", "TC", "ET",
         *COSTS.values()], rows
    )  # fmt: skip


def headline(cases: Cases) -> str:
    """Med-DANet V2 and its static rivals, means over the held-out cases."""
    rows = []
    for row, name in NAMES.items():
        if row not in present_rows(cases):
            continue
        found = scored(cases, row)
        dice = [f"{mean(c['dice'][r] for c in found):.3f}" for r in ("WT", "TC", "ET")]
        cost = [f"{mean(c[kind] for c in found) / 1e9:.1f}" for kind in COSTS]
        rows.append((name, *dice, *cost))
    return markdown(
        [f"mean of {len(cases)} held-out cases", "WT", "TC", "ET", *COSTS.values()], rows
    )


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
    )  # fmt: skip


def hippocampus_v1(results: Results) -> str:
    """Med-DANet (V1) and its members on the tested hippocampus cases."""
    content = results.read("v1_hippocampus")
    means = content["test"][str(content["chosen_alpha"])]["mean"]
    names = {"M1": "M1 on every slice", "M2": "M2 on every slice", "Med-DANet": "**Med-DANet**",
             "skip or M2": "its skips, M2 elsewhere",
             "oracle": "oracle: Eq. 4 with the labels known"}
    rows = [
        (names.get(name, name), *(f"{row[r]:.4f}" for r in ("anterior", "posterior", "mean")),
         *(f"{row['macs'][kind] / 1e9:.3f}" for kind in ("mac", "paper")))
        for name, row in means.items()
    ]  # fmt: skip
    return markdown(
        ["", "Dice anterior", "Dice posterior", "mean", "true G MACs", "as the papers count, G"],
        rows,
    )


# machines -------------------------------------------------------------------------------------


def scaling(results: Results) -> str:
    """Time against the number of slices that are segmented."""
    part = results.speed["scaling with slices"]
    rows = [
        (count, f"{part['times'][str(count)]['seconds']:.3f}",
         f"{part['times'][str(count)]['cpu_seconds']:.3f}")
        for count in part["segmented"]
    ]  # fmt: skip
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
    )  # fmt: skip


def prediction(results: Results) -> str:
    """Least milliseconds per volume: least, middle and most work, and the static network."""
    ran = {name: sum(list(case["decisions"]["routes"].values())[1:])
           for name, case in results.accuracy.items()}  # fmt: skip
    ordered = sorted(ran, key=lambda name: ran[name])
    shown = dict.fromkeys([ordered[0], ordered[len(ordered) // 2], ordered[-1]])
    heads = [f"{short(name)}, {ran[name]} slices run" for name in shown]
    rows = []
    for name, card in results.predictions.items():
        cells = []
        for case in [*shown, "static, every slice whole"]:
            volume = card["volumes"][case]
            bound = next(iter(volume["milliseconds_by_bound"]))
            cells.append(f"{volume['milliseconds']:.2f} ({bound})")
        rows.append((name, *cells))
    header = ["**predicted lower bound**, ms, most of it by", *heads, "static, every slice whole"]
    return markdown(header, rows)


def gpu_network(results: Results) -> str:
    """The network on GPUs: GPU time, a bound where launches outlast the queue, and wall time."""
    rows = []
    for path in sorted(results.folder.glob("gpu_network*.json")):
        content = json.loads(path.read_text())
        device = content["environment"]["device"]
        for case in content["cases"]:
            ours = case["providers"][case["ours"]]
            absent = {name: {"failed": why} for name, why in case.get("not_run", {}).items()}
            for name, found in (case["providers"] | absent).items():
                label = f"**{name}**" if name == case["ours"] else name
                where = device, short(case["volume"]), case["case"], label
                if "failed" in found:
                    rows.append((*where, "", "", found["failed"]))
                    continue
                gpu, wall = (found[kind]["median"] for kind in ("cold_ms", "wall_ms"))
                # with gaps in it, or none that the file tells of, it is a bound
                most = "" if found.get("queued") else "≤ "
                ratio = wall / ours["wall_ms"]["median"]
                rows.append((*where, f"{most}{gpu:.2f}", f"{wall:.2f}", f"{ratio:.1f}x"))
    return markdown(
        ["GPU", "case", "from where to where", "", "GPU ms", "wall ms", "wall / ours"], rows
    )


def gpu_kernels(results: Results) -> str:
    """Every kernel on GPUs beside its peers, and its share of the card's roof, if known."""
    from predict import compare, known_card

    rows = []
    for path in sorted(results.folder.glob("gpu_kernels*.json")):
        content = json.loads(path.read_text())
        device = content["environment"]["device"]
        shares = {row["case"]: row for row in compare(content)} if known_card(device) else {}
        for case in content["cases"]:
            ours = case["providers"][case["ours"]]
            peers = [
                f"{name} {ratios['cold_ms']:.2f}x" for name, ratios in case["ratios"].items()
            ]
            failed = [name for name, found in case["providers"].items() if "failed" in found]
            share = shares.get(case["case"])
            rows.append((
                device, case["case"], f"{1e3 * ours['cold_ms']['median']:.1f}",
                f"{share['share_of_roof']:.0%} ({share['bound']})" if share else "",
                "; ".join([*peers, *(f"{name} did not run" for name in failed)]),
            ))
    return markdown(
        ["GPU", "case", "ours, GPU us", "share of the roof", "peers' GPU time over ours"], rows
    ) if rows else "None has been measured yet."  # fmt: skip


def gpu_launches(results: Results) -> str:
    """What a volume's GPU time is made of, case by case."""
    contents = [json.loads(path.read_text())
                for path in sorted(results.folder.glob("gpu_launches*.json"))]  # fmt: skip
    parts = list(dict.fromkeys(part for content in contents for part in content["parts_us"]))
    rows = [
        (content["environment"]["device"], content["environment"]["commit"],
         short(content["case"]), routes(content["decisions"]),
         *(f"{content['parts_us'].get(part, 0):.0f}" for part in parts),
         f"{content['replay_us']:.0f}", f"{content['every_slice_whole_us']:.0f}")
        for content in contents
    ]  # fmt: skip
    return markdown(
        ["GPU", "commit", "case", "slices", *(f"{part}, us" for part in parts),
         "the graph, us", "every slice whole, us"], rows
    )  # fmt: skip


def gpu_bounds(results: Results) -> str:
    """What was measured of today's plan, part by part, beside its predicted lower bound."""
    from predict import bounds_of_launches

    variants, rows = results.read("kernels_compiled")["variants"], []
    for path in sorted(results.folder.glob("gpu_launches*.json")):
        content = json.loads(path.read_text())
        bounds = bounds_of_launches(content, results.accuracy, variants)
        if bounds is None:
            continue
        times = {**content["parts_us"], "**the graph**": content["replay_us"]}
        least = {**bounds["milliseconds_by_part"], "**the graph**": bounds["milliseconds"]}
        facts = content["environment"]
        rows += [
            (facts["device"], facts["commit"], short(content["case"]), part, f"{time:.0f}",
             f"{1e3 * least[part]:.0f}", f"{time / least[part] / 1e3:.1f}x")
            for part, time in times.items()
        ]  # fmt: skip
    return markdown(
        ["GPU", "commit", "case", "", "measured, us", "predicted lower bound, us",
         "measured / bound"], rows
    )  # fmt: skip


def ablations(results: Results) -> str:
    """Every list of configurations that was trained."""
    parts = []
    for name, content in results.ablations().items():
        parts.append(f"`{name}.json`\n\n{_ablation(content['results'])}")
    return "\n\n".join(parts) or "None has been committed yet."


def _ablation(found: Content) -> str:
    rows = []
    for configuration, kinds in found.items():
        for row, folds in kinds.items():
            scores = [
                case for fold in folds.values() for case in fold.get("dice", {}).values()
            ]
            if not scores:
                continue
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
    )  # fmt: skip


TABLES: dict[str, Callable[[Results], str]] = {
    "speed": speed, "speed-cases": speed_cases, "files": files,
    "cpu-kernels": cpu_kernels,
    "headline": lambda results: headline(results.accuracy),
    "accuracy": lambda results: accuracy(results.accuracy),
    "accuracy-cases": lambda results: accuracy_cases(results.accuracy),
    "decisions": lambda results: decisions(results.accuracy),
    "folds-headline": lambda results: headline(results.folds),
    "folds": lambda results: accuracy(results.folds),
    "folds-cases": lambda results: accuracy_cases(results.folds),
    "folds-decisions": lambda results: decisions(results.folds),
    "hippocampus-v1": hippocampus_v1, "scaling": scaling, "memory": memory, "context": context,
    "prediction": prediction, "ablations": ablations, "gpu-network": gpu_network,
    "gpu-kernels": gpu_kernels, "gpu-launches": gpu_launches, "gpu-bounds": gpu_bounds,
}  # fmt: skip
