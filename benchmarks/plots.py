"""The figures of README and docs, made of `results/*.json` alone. Needs the extra `plots`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from committed import Results, mean, short
from tables import PEERS, present_rows, scored

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

# Okabe and Ito's palette, which colour-blind readers tell apart
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7f7f7f"
)
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8, "figure.constrained_layout.use": True,
    "svg.hashsalt": "meddanet", "svg.fonttype": "none", "savefig.facecolor": "white",
}
# row: what it is, colour, marker
MARKS = {
    "static": ("plain U-Net, every slice whole", GREY, "s"),
    "whole": ("whole: own weights, every slice whole", BLUE, "o"),
    "S": ("S: decisions, float32", SKY, "^"),
    "Q": ("Q: 8 / 16 bit, every slice whole", PURPLE, "D"),
    "S+Q": ("S+Q: decisions, 8 / 16 bit", RED, "*"),
    "8": ("S with 8 bit throughout", GREEN, "v"),
    "16": ("S with 16 bit throughout", ORANGE, "P"),
    "random": ("S with random widths", "black", "x"),
}


def plain_numbers(axis: Any) -> None:
    """Writes 0.5, 1, 20 on a logarithmic axis instead of powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# speed ----------------------------------------------------------------------------------------


def time_per_volume(results: Results) -> Figure:
    """Seconds per volume of all contestants on one case; ratios to the static network on each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1.1, 1))
    full = results.networks[0]
    times = {name: found["seconds"] for name, found in full["times"].items()}
    names = sorted(times, key=lambda name: -times[name])
    left.barh(
        [_plain_name(name) for name in names], [times[name] for name in names], height=0.7,
        color=[RED if name in ("engine", "predict") else GREY for name in names],
    )
    for row, name in enumerate(names):
        left.text(times[name], row, f" {times[name]:.2f}", va="center", fontsize=8)
    left.set(xlabel="seconds per volume, slices in memory to labels",
             xlim=(0, 1.12 * max(times.values())),
             title=f"case {short(full['case'])}, {results.speed_machine}")
    left.grid(axis="y", visible=False)
    pairs = {
        "static eager slice by slice / engine": ("eager slice by slice", "engine", GREY),
        "static eager slice by slice / predict": ("eager slice by slice", "predict", "#c4c4c4"),
        "static OpenVINO int8 / engine": ("OpenVINO int8", "engine", BLUE),
        "static OpenVINO int8 / predict": ("OpenVINO int8", "predict", SKY),
    }
    places = np.arange(len(results.networks))
    for index, (label, (peer, ours, colour)) in enumerate(pairs.items()):
        ratios = [
            part["times"].get(peer, {}).get("seconds", np.nan) / part["times"][ours]["seconds"]
            for part in results.networks
        ]
        bars = right.bar(places + 0.21 * (index - 1.5), ratios, 0.19, color=colour, label=label)
        right.bar_label(bars, fmt="%.1f", fontsize=7)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(places, [
        f"{short(part['case'])}\n{sum(part['decisions'][1:])} of {sum(part['decisions'])} slices"
        for part in results.networks
    ], fontsize=8)
    right.set(ylabel="times as long", title="each timed case, and its slices that run")
    right.set_ylim(top=1.75 * right.get_ylim()[1])
    right.grid(axis="x", visible=False)
    right.legend(loc="upper left", ncols=1)
    return figure


def _plain_name(name: str) -> str:
    """A contestant's name in README without Markdown and remarks."""
    return re.split(r", as | \(|, normal", re.sub(r"[*`]", "", PEERS.get(name, name)))[0]


def scaling(results: Results) -> Figure | None:
    """Time against slices segmented, slices in a call, base channels and cases of a folder."""
    panels: list[tuple[str, str, dict[float, float], str]] = []
    speed = results.speed
    if part := speed.get("scaling with slices"):
        points = {n: part["times"][str(n)]["cpu_seconds"] for n in part["segmented"]}
        panels.append(("segmented slices, of 155", "CPU seconds per volume", points, "line"))
    for level, xlabel, ylabel in (
        ("scaling with batch", "slices in one call, all cropped", "CPU ms per slice"),
        ("scaling with channels", "base channels of the U-Net", "CPU ms per slice"),
        ("scaling with cohort", "cases in a folder run", "seconds per case"),
    ):
        if part := speed.get(level):
            points = {float(x): y for x, y in part["points"].items()}
            panels.append((xlabel, ylabel, points, "square" if "channels" in level else "flat"))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(2.9 * len(panels) + 0.4, 3), squeeze=False)
    for axis, (xlabel, ylabel, points, kind) in zip(axes[0], panels, strict=True):
        x, y = np.array(list(points)), np.array(list(points.values()))
        axis.plot(x, y, "o", color=BLUE)
        if kind == "line":
            slope, start = np.polyfit(x, y, 1)
            axis.plot(x, start + slope * x, "-", color=GREY, linewidth=1, zorder=0)
            axis.set_title(f"{1e3 * start:.0f} ms + {1e3 * slope:.1f} ms per slice")
        elif kind == "flat":
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.15 * y.max()))
        axis.xaxis.set_minor_formatter(NullFormatter())
    return figure


# accuracy -------------------------------------------------------------------------------------


def accuracy_against_cost(results: Results) -> Figure:
    """Dice by region against the cost of a case, in both ways of counting."""
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 5.6), sharex="row", sharey="col")
    kinds = {"mac": "true multiply-adds of a case, G", "scaled_paper": "papers' count, b / 32, G"}
    for line, (kind, xlabel) in zip(axes, kinds.items(), strict=True):
        for axis, region in zip(line, ("WT", "TC", "ET"), strict=True):
            for row in [row for row in present_rows(results.folds) if row in MARKS]:
                cases = scored(results.folds, row)
                label, colour, marker = MARKS[row]
                star = marker == "*"
                axis.plot(
                    mean(c[kind] for c in cases) / 1e9, mean(c["dice"][region] for c in cases),
                    marker, color=colour, markersize=13 if star else 7, linestyle="none",
                    markerfacecolor=colour if star or marker == "x" else "none",
                    markeredgewidth=1.5, label=label, zorder=2 if star else 3,
                )
            axis.set(xscale="log", xlabel=xlabel, xlim=(25, 900))
            axis.set_xticks([30, 100, 300])
            plain_numbers(axis.xaxis)
            if kind == "mac":
                axis.set_title(f"Dice {region}, mean of {len(results.folds)} held-out cases")
            axis.margins(y=0.15)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def hippocampus(results: Results) -> Figure:
    """Dice of V1 and its members on hippocampus against cost, in both ways of counting."""
    (rows,) = results.read("ablation_hippocampus_v1_long")["results"].values()
    marks = {
        "M1": ("M1 on every slice", GREY, "s"), "M2": ("M2 on every slice", BLUE, "o"),
        "decided": ("Med-DANet", RED, "*"), "oracle": ("oracle: labels known", GREEN, "^"),
    }
    cases = len(next(iter(rows["M2"].values()))["dice"])
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True)
    counts = {"mac": "true multiply-adds of a slice, M", "scaled_paper": "as the papers count, M"}
    for axis, (kind, xlabel) in zip(axes, counts.items(), strict=True):
        for name, (label, colour, marker) in marks.items():
            (fold,) = rows[name].values()
            dice = np.mean([list(case.values()) for case in fold["dice"].values()])
            axis.plot(fold["slice_mega"][kind], dice, marker, color=colour,
                      markersize=12 if marker == "*" else 8, linestyle="none", label=label)
        axis.set(xlabel=xlabel, xlim=(0, None))
    axes[0].set_ylabel("mean Dice, both structures")
    axes[0].legend(loc="lower right")
    figure.suptitle(f"Med-DANet (V1) on hippocampus, {cases} unseen cases", fontsize=10)
    return figure


def training_curves(results: Results) -> Figure | None:
    """Loss of every phase, a line per run, and Dice on held-out slices where it was looked at."""
    path = results.folder / "curves.json"
    if not path.exists():
        return None
    runs = json.loads(path.read_text())
    # numbered in the order of training; the baseline comes last
    phases = sorted({phase for run in runs.values() for phase in run})
    looked = any("dice" in phase for run in runs.values() for phase in run.values())
    figure, axes = plt.subplots(
        1 + looked, len(phases), figsize=(2.4 * len(phases) + 0.4, 2.6 * (1 + looked)),
        squeeze=False,
    )
    colours = [BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "black", GREY]
    styles = ["-", "--", ":"]
    for number, (run, found) in enumerate(runs.items()):
        look = {"color": colours[number % 8], "linestyle": styles[number // 8 % 3], "label": run}
        for column, phase in enumerate(phases):
            if phase not in found:
                continue
            axes[0, column].plot(found[phase]["step"], found[phase]["loss"], linewidth=1.2, **look)
            if looked and "dice" in found[phase]:
                axes[1, column].plot(*zip(*found[phase]["dice"], strict=True), marker=".", **look)
    for column, phase in enumerate(phases):
        axes[0, column].set_title(phase)
        axes[-1, column].set_xlabel("step")
        axes[0, column].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("loss")
    if looked:
        axes[1, 0].set_ylabel("Dice, held-out slices")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


# predictions ----------------------------------------------------------------------------------


def roofline(results: Results) -> Figure | None:
    """Each kernel under the published roofs of four cards: predicted, and measured where it is."""
    cards = results.predictions
    shown = [name for name in ("RTX 3090", "RTX 4090", "RTX 5090", "H200") if name in cards]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey=True)
    for axis, name in zip(axes.flat, shown, strict=False):
        peaks = cards[name]["peaks"]
        x = np.geomspace(5, 6000, 200)
        memory = x * peaks["gigabytes_per_second"] / 1e3
        axis.plot(x, np.minimum(memory, peaks["tera_ops"]), color="black", linewidth=1.2)
        axis.text(6, 1.1 * peaks["tera_ops"], f"{peaks['tera_ops']:g} int8 TOPS", fontsize=8)
        axis.axhline(peaks["tera_ops"], color="black", linewidth=0.6, linestyle=":")
        bounds = {"memory": BLUE, "operations": RED, "shared memory": ORANGE,
                  "instructions": GREEN, "launch": GREY}
        for row in cards[name]["kernels"]:
            wide = row["kernel"].endswith("16 bit")
            tera = row["operations"] / row["microseconds"] / 1e6
            axis.plot(row["operations"] / row["bytes"], tera, "D" if wide else "o", markersize=5,
                      color=bounds[row["bound"]], markerfacecolor="none")
        for row in measured_kernels(results, name):
            tera = row["operations"] / row["measured_microseconds"] / 1e6
            axis.plot(row["operations"] / row["bytes"], tera, "k*", markersize=8)
        axis.set(xscale="log", yscale="log", ylim=(4, 4000), xlim=(5, 6000),
                 title=f"{name}, {peaks['gigabytes_per_second']:g} GB/s")
        plain_numbers(axis.xaxis)
        plain_numbers(axis.yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("int8 operations per byte of memory traffic")
    for axis in axes[:, 0]:
        axis.set_ylabel("tera-operations per second")
    stars = any(measured_kernels(results, name) for name in shown)
    legend = [
        plt.Line2D([], [], color=colour, marker="s", linestyle="none", label=f"bound by {bound}")
        for bound, colour in bounds.items()
    ]
    legend += [
        plt.Line2D([], [], color="black", marker=marker, linestyle="none", label=label,
                   markerfacecolor="black" if marker == "*" else "none")
        for marker, label in (("o", "8 bit"), ("D", "16 bit"), ("*", "measured"))
        if marker != "*" or stars
    ]
    # all in one row would be wider than the figure
    figure.legend(handles=legend, loc="outside lower center", ncols=-(-len(legend) // 2))
    title = "Prediction from published peaks, 16 slices of 240 x 240 per launch"
    measured = "stars: measured" if stars else "none of these measured yet"
    figure.suptitle(f"{title}; {measured}", fontsize=10)
    return figure


def measured_kernels(results: Results, card: str) -> list[dict[str, Any]]:
    """Returns the measured kernels of a card, from whatever GPU files are committed."""
    from predict import CARDS, compare

    rows = []
    for content in results.named("gpu_kernels*").values():
        if content["environment"]["device"] in CARDS[card].devices:
            rows += [row for row in compare(content) if row["operations"]]
    return rows


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "time_per_volume": time_per_volume, "accuracy_against_cost": accuracy_against_cost,
    "hippocampus_v1": hippocampus, "scaling": scaling, "roofline": roofline,
    "training_curves": training_curves,
}


def draw(results: Results, folder: Path, kind: str = "svg") -> list[Path]:
    """Draws every figure whose numbers are there; returns the files.

    Args:
        results: The numbers.
        folder: Where the pictures go.
        kind: "svg" or "png".
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with plt.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make(results)
            if figure is None:
                continue
            paths.append(folder / f"{name}.{kind}")
            # no date: equal numbers, equal files
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(paths[-1], dpi=130, metadata=metadata)
            plt.close(figure)
    return paths
