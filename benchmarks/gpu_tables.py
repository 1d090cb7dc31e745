"""The tables of GPUs: what is predicted for them, and what they were measured to take."""

from __future__ import annotations

from committed import Results, markdown, routes, short


def prediction(results: Results) -> str:
    """Least milliseconds per volume: least, middle and most work, and the static network."""
    ran = {name: sum(list(case["decisions"]["routes"].values())[1:])
           for name, case in results.accuracy.items()}
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


def simulation(results: Results) -> str:
    """Simulated microseconds of a volume's convolutions, by the channels that they store."""
    rows, sums = [], dict[str, float]()
    for card, found in results.read("simulation")["cards"].items():
        sums = {}
        for row in found["kernels"]:
            channels = row["kernel"].split(" channels")[0].rpartition(" ")[2]
            sums[channels] = sums.get(channels, 0) + row["times"] * row["microseconds"]
        times = found["microseconds"], *sums.values()
        rows.append((card, *(f"{time:.0f}" for time in times)))
    heads = [f"to {channels} channels" for channels in sums]
    return markdown(["**simulated**, us, 71 crops of 96", "all", *heads], rows)


def simulation_check(results: Results) -> str:
    """Launches as a GPU has measured them, and simulated by their own machine code."""
    rows = []
    for content in results.named("simulation_check_*").values():
        for row in content["kernels"]:
            rows.append((
                content["device"], content["commit"], row["kernel"], row["times"],
                row["measured_us"], row["simulated_us"], f"{row['simulated_of_measured']:.0%}",
            ))
    header = ["GPU", "commit", "convolution", "launches", "measured, us", "simulated, us", "share"]
    return markdown(header, rows)


def gpu_network(results: Results) -> str:
    """The network on GPUs: GPU time, a bound where launches outlast the queue, and wall time."""
    rows = []
    for content in results.named("gpu_network*").values():
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


def gpu_bench(results: Results) -> str:
    """What `meddanet bench` took on each GPU, a column for each of its contestants."""
    contents = results.named("gpu_bench_*").values()
    peers = dict.fromkeys(name for content in contents for name in content["times"]
                          if name not in ("engine", "predict"))
    rows = []
    for content in contents:
        ms = {name: 1e3 * found["seconds"] for name, found in content["times"].items()}
        others = [f"{ms[name]:.0f} ({ms[name] / ms['engine']:.0f}x)" if name in ms else "not run"
                  for name in peers]
        number = int(content["device"].partition(":")[2] or 0)
        plan = f"{1e3 * content['plan']['seconds']:.2f}" if content["plan"] else "not run"
        rows.append((content["machine"]["gpus"][number], short(content["case"]), plan,
                     f"**{ms['engine']:.1f}**", f"{ms['predict']:.0f}", *others))
    header = ["ms", "case", "the plan's GPU time", "**engine**", "`predict`", *peers]
    return markdown(header, rows)


def _bound(ours: dict, peer: dict) -> str:
    """Returns what a ratio of GPU times, peer over ours, is where waiting may be in either."""
    return {(True, True): "", (True, False): "≤ ", (False, True): "≥ ", (False, False): "~ "}[
        bool(ours.get("queued")), bool(peer.get("queued"))
    ]


def gpu_kernels(results: Results) -> str:
    """Every kernel on GPUs beside its peers, and its share of the card's roof, if known."""
    from predict import compare, known_card

    rows = []
    for content in results.named("gpu_kernels*").values():
        device = content["environment"]["device"]
        shares = {row["case"]: row for row in compare(content)} if known_card(device) else {}
        for case in content["cases"]:
            ours = case["providers"][case["ours"]]
            peers = [
                f"{name} {_bound(ours, case['providers'][name])}{ratios['cold_ms']:.2f}x"
                for name, ratios in case["ratios"].items()
            ]
            failed = [name for name, found in case["providers"].items() if "failed" in found]
            share, queued = shares.get(case["case"]), ours.get("queued")
            least = f"{'' if queued else '≥ '}{share['share_of_roof']:.0%}" if share else ""
            rows.append((
                device, case["case"],
                f"{'' if queued else '≤ '}{1e3 * ours['cold_ms']['median']:.1f}",
                f"{least} ({share['bound']})" if share else "",
                "; ".join([*peers, *(f"{name} did not run" for name in failed)]),
            ))
    return markdown(
        ["GPU", "case", "ours, GPU us", "share of the roof", "peers' GPU time over ours"], rows
    ) if rows else "None has been measured yet."


def gpu_launches(results: Results) -> str:
    """What a volume's GPU time is made of, case by case."""
    contents = results.named("gpu_launches*").values()
    parts = list(dict.fromkeys(part for content in contents for part in content["parts_us"]))
    rows = [
        (content["environment"]["device"], content["environment"]["commit"],
         short(content["case"]), routes(content["decisions"]),
         *(f"{content['parts_us'].get(part, 0):.0f}" for part in parts),
         f"{content['replay_us']:.0f}", f"{content['every_slice_whole_us']:.0f}")
        for content in contents
    ]
    return markdown(
        ["GPU", "commit", "case", "slices", *(f"{part}, us" for part in parts),
         "the graph, us", "every slice whole, us"], rows
    )


def gpu_bounds(results: Results) -> str:
    """What was measured of today's plan, part by part, beside its predicted lower bound."""
    from predict import bounds_of_launches

    variants, rows = results.read("kernels_compiled")["variants"], []
    for content in results.named("gpu_launches*").values():
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
        ]
    return markdown(
        ["GPU", "commit", "case", "", "measured, us", "predicted lower bound, us",
         "measured / bound"], rows
    )
