"""The tables of benchmarks/gpu.py."""

# Operations per second of dense bfloat16 products, from the data sheets of the cards, by the whole
# name that torch gives them. A card that is not here, or a part of one, has no MFU.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}
GOALS = "Goals: twice as fast as TRL at its best on TL;DR, and 45% MFU at 1B."
STEP_COLUMNS = (
    "one step, TL;DR lengths",
    "pairs",
    "seconds",
    "pairs/s",
    "distinct tokens/s",
    "MFU",
    "peak GiB",
    "GiB planned",
    "TRL's best takes, times",
)
CHECKS = ("what", "result")


def markdown(results: dict) -> str:
    """All that was measured, and what was not and why."""
    here = results["machine"]
    card = ", ".join(here["gpus"]) or f"a dry run on {here['processor']}"
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    sections = [
        f"## {card}\n\n{packages}. {GOALS}\n",
        _table(STEP_COLUMNS, [_step_row(results, name) for name in _steps(results)]),
        _table(CHECKS, _checks(results["parts"])),
        _table(("not measured", "reason"), _missing(results["parts"])),
    ]
    return "\n".join(section for section in sections if section)


def mfu(part: dict, gpus: list[str]) -> float | None:
    """Share of the peak of the card that the operations of `flop_floor` take in the measured time:
    each distinct token counts once. None for a card whose peak is not known."""
    peak = PEAKS.get(gpus[0]) if gpus else None
    return None if peak is None else part["floor"] / part["result"]["seconds"] / peak


def best_of_trl(parts: dict, size: str) -> float | None:
    """Seconds of the fastest step of TRL with a model of this size; None without one."""
    seconds = [
        part["result"]["seconds"]
        for name, part in parts.items()
        if name.startswith(f"{size}, TRL") and "result" in part
    ]
    return min(seconds, default=None)


def _steps(results: dict) -> list[str]:
    return [name for name, part in results["parts"].items() if "floor" in part and "result" in part]


def _step_row(results: dict, name: str) -> list[str]:
    part = results["parts"][name]
    seconds, trl = part["result"]["seconds"], best_of_trl(results["parts"], name.partition(",")[0])
    share = mfu(part, results["machine"]["gpus"])
    planned = part.get("planned")
    is_ours = ", TRL" not in name
    return [
        name,
        str(part["pairs"]),
        f"{seconds:.3f}",
        f"{part['pairs'] / seconds:.1f}",
        f"{part['tokens'] / seconds:,.0f}",
        "" if share is None else f"{share:.1%}",
        f"{part['result']['peak_memory'] / 2**30:.1f}",
        f"{planned / 2**30:.1f}" if isinstance(planned, int) else "",
        f"{trl / seconds:.2f}" if trl and is_ours else "",
    ]


def _checks(parts: dict) -> list[list[str]]:
    """The results of the parts that are no steps."""
    lines = {"flex": _flex, "log-ratios": _log_ratios, "tests": _tests, "sampling": _sampling}
    rows = []
    for name, describe in lines.items():
        if "result" in parts.get(name, {}):
            rows += describe(parts[name]["result"])
    return rows


def _flex(result: dict) -> list[list[str]]:
    rows = []
    for name, one in result["attention"].items():
        value = one.get("reason") or f"{one['largest_difference']:.1e}"
        rows.append([f"FlexAttention against segments, {name}", value])
    used = f"{result['gradient_difference']:.1e}"
    model = used if result["uses_flex"] else f"not used: {result['reason'] or 'no GPU'}"
    rows.append(["the same, gradients of the 124M model, float32", model])
    graphs = ", ".join(str(one["graphs"]) for one in result["lengths"])
    rows.append([f"graphs compiled by then, {len(result['lengths'])} lengths", graphs])
    return rows


def _log_ratios(result: dict) -> list[list[str]]:
    return [
        [
            f"bfloat16, policy = reference, {name}",
            f"{one['token']:.2g} nats of a token, {one['response']:.2g} of a response",
        ]
        for name, one in result.items()
    ]


def _tests(result: dict) -> list[list[str]]:
    counts = ", ".join(f"{n} {outcome}" for outcome, n in result["counts"].items())
    return [["tests/test_gpu.py", counts], *(["failed", name] for name in result["failed"])]


def _sampling(result: dict) -> list[list[str]]:
    return [
        [
            "sampling, 124M, batch 32",
            f"{result['ours']:,.0f} tokens/s, generate {result['generate']:,.0f},"
            f" {result['times_as_fast']:.2f} times as fast",
        ]
    ]


def _missing(parts: dict) -> list[list[str]]:
    return [
        [name, part.get("error") or part["skipped"]]
        for name, part in parts.items()
        if "error" in part or "skipped" in part
    ]


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
