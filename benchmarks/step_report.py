"""The table, the page and the picture of benchmarks/step.py."""

from pathlib import Path

from benchmarks.cases import CASES, MODELS, OURS, VOCABULARY, reads

COLUMNS = (
    "one step",
    "seconds",
    "times as fast as the classic step",
    "the same, reference run in the step",
    "as TRL at its best",
    "as TRL's defaults",
    "memory against classic",
    "times the FLOP floor",
)


def table(case: str, result: dict) -> str:
    """All variants of a case, for the terminal."""
    titles = f"{'seconds':>9}{'times':>8}{'memory':>8}{'extra':>8}{'floors':>8}{'gradient':>10}"
    lines = [f"{case} ({result['pairs']} pairs)".ljust(44) + titles]
    extra = {
        variant: values["peak_memory"] - held_bytes(case, variant)
        for variant, values in result["variants"].items()
    }
    for variant, values in result["variants"].items():
        error = values["gradient_error"]
        cells = [
            f"{values['seconds']:>9.2f}",
            f"{values['times_as_fast']:>8.2f}",
            f"{values['memory_ratio']:>8.3f}",
            f"{extra[variant] / extra['classic']:>8.3f}",
            f"{values['seconds'] / result['floor_seconds']:>8.2f}",
            f"{'' if error is None else f'{error:.1e}':>10}",
        ]
        lines.append(f"  {variant:<42}" + "".join(cells))
    return "\n".join(lines)


def markdown(results: dict) -> str:
    """Our default step in every case: seconds, how many times as fast as the others, peak memory
    and share of the floor."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [_row(name, result) for name, result in results["cases"].items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, result: dict) -> list[str]:
    case, variants = CASES[name], result["variants"]
    ours = variants["prefix_shared"]
    with_reference = variants.get("prefix_shared, reference run")

    def against(variant: str) -> str:
        if variant not in variants:
            return ""
        return f"{ours['times_as_fast'] / variants[variant]['times_as_fast']:.1f}"

    title = f"{case.loss}, {case.model}, {case.lengths} lengths, {case.pairs} pairs"
    return [
        title + (" of one prompt" if case.prompts == 1 else ""),
        f"{ours['seconds']:.2f}",
        f"{ours['times_as_fast']:.1f}",
        f"{with_reference['times_as_fast']:.1f}" if with_reference else "",
        against("TRL, best"),
        against("TRL, defaults"),
        f"{ours['memory_ratio']:.2f}",
        f"{ours['seconds'] / result['floor_seconds']:.2f}",
    ]


def held_bytes(name: str, variant: str) -> int:
    """Bytes in float32 of weights, gradients, AdamW's state, and of the reference's weights where
    the variant holds them."""
    case = CASES[name]
    width, layers, positions = (
        MODELS[case.model][key] for key in ("n_embd", "n_layer", "n_positions")
    )
    # Of a GPT-2 with a tied head.
    embeddings = (VOCABULARY + positions + 2) * width
    parameters = embeddings + layers * (12 * width * width + 13 * width)
    cached = OURS.get(variant, ("", "false"))[1] == "auto" and "token_kl" not in reads(case.loss)
    return 4 * parameters * (4 if cached or variant == "TRL, best" else 5)


def draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = results.get("curves", {})
    heights = [3.8, 3.2] if curves else [3.8]
    figure = plt.figure(figsize=(12, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    machine = results["machine"]
    device = ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['processor']}"
    _draw_cases(parts[0].subplots(), results["cases"], device)
    if curves:
        axes = parts[1].subplots(1, len(curves), squeeze=False)[0]
        for one, (quantity, points) in zip(axes, curves.items(), strict=True):
            _draw_curve(one, quantity, points)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_cases(axes, cases: dict, device: str) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(variant for case in cases.values() for variant in case["variants"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    place, centers = 0.0, []
    for case in cases.values():
        centers.append(place + (len(case["variants"]) - 1) / 2)
        for variant, values in case["variants"].items():
            height = values["times_as_fast"]
            bar = axes.bar(place, height, 0.9, color=colours[variant], label=variant)
            axes.bar_label(bar, fmt="%.1f", fontsize=7)
            place += 1
        place += 1
    axes.set_xticks(centers, list(cases), fontsize=8)
    axes.set(ylabel="times as fast as the classic step", yscale="log")
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"], minor=False)
    axes.yaxis.set_minor_locator(NullLocator())
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique, fontsize=7, frameon=False, ncols=2)
    axes.set_title(f"One training step on {device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes, quantity: str, points: list[dict]) -> None:
    from matplotlib.ticker import NullLocator

    values = [point["value"] for point in points]
    for name in ("prefix_shared", "classic"):
        axes.plot(values, [point[name] for point in points], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel=quantity, ylabel="pairs per second")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
