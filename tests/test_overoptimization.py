"""Fits of over-optimisation against planted coefficients, and what tables say of them."""

import json
import math

import numpy as np
import pytest
from conftest import write_jsonl
from omegaconf import OmegaConf

from preflab.reports.overoptimization import BEST_OF_N, TRAINED, Points, fit
from preflab.reports.overoptimization_table import fits_of, overoptimization_table, peak_text
from preflab.reports.runs import Group, Run
from preflab.reports.sweep_plots import frontier_figure

KLS = np.geomspace(0.05, 4.0, 12)
PROMPTS = tuple(f"prompt {i}" for i in range(30))


def planted(rng, seeds: int, a: float, b: float, *, of_seed=0.1, of_prompt=0.3, noise=0.5):
    """Points of seeds and prompts whose coefficients vary around a and b, with noise."""
    d = np.sqrt(KLS)[:, None]
    prompts = rng.normal(0, of_prompt, (2, 1, len(PROMPTS)))
    points = []
    for _ in range(seeds):
        a_s, b_s = prompts + rng.normal(0, of_seed, (2, 1, 1)) + np.array([a, b])[:, None, None]
        gains = d * (a_s - b_s * np.log(d)) + rng.normal(0, noise, (len(KLS), len(PROMPTS)))
        points.append(Points(KLS, gains, PROMPTS))
    return points


def test_exact_points_give_the_coefficients_and_the_peak_of_both_forms():
    d = np.sqrt(KLS)
    for form, gains, peak in (
        (TRAINED, d * (1.1 - 0.9 * np.log(d)), math.exp(1.1 / 0.9 - 1) ** 2),
        (BEST_OF_N, d * (1.1 - 0.9 * d), (1.1 / 1.8) ** 2),
    ):
        of_means = Points(np.append(0.0, KLS), np.append(0.0, gains)[:, None])  # with the start
        fitted = fit(form, [of_means] * 3)
        assert [table.mean() for table in (fitted.a, fitted.b)] == pytest.approx([1.1, 0.9])
        assert fitted.peak == pytest.approx(peak) and fitted.error < 1e-12
        around = fitted.gain(peak * np.array([0.9, 1.0, 1.1]))
        assert around[1] == max(around)  # where the formula has its peak
        assert fitted.slope(peak).mean == pytest.approx(0, abs=1e-9)
        low, high = fitted.peak_interval()
        assert low == pytest.approx(peak, rel=1e-3) and high == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_the_interval_of_the_peak_holds_it_in_95_percent(seeds):
    a, b = 0.8, 0.9  # a peak at KL 0.80
    peak = math.exp(2 * (a / b - 1))
    rng, n = np.random.default_rng(seeds), 600
    misses = np.zeros(2)
    for _ in range(n):
        # The interval of a single seed is over prompts, and about this policy alone.
        low, high = fit(
            TRAINED, planted(rng, seeds, a, b, of_seed=0.1 * (seeds > 1))
        ).peak_interval()
        misses += [low is not None and low > peak, high is not None and high < peak]
    assert 0.93 <= 1 - misses.sum() / n <= 0.97
    assert misses.min() > 0.005 * n  # both ends are at work


def test_a_peak_is_not_claimed_where_the_data_do_not_show_one():
    rng = np.random.default_rng(0)
    unclear = fit(TRAINED, planted(rng, 5, 1.0, 0.4))  # its peak is at KL 20
    assert unclear.peak_interval()[1] is None and peak_text(unclear).endswith(", beyond 4.00]")
    beyond = fit(TRAINED, planted(rng, 5, 1.5, 0.4))
    assert beyond.peak_interval() == (4.0, None) and beyond.slope(4.0).low > 0
    assert peak_text(beyond) == "beyond 4.00 (95%)"
    rising = fit(TRAINED, planted(rng, 5, 0.5, -0.3))
    assert rising.peak_interval() is None and peak_text(rising) == "none: b is not above 0"
    assert fit(TRAINED, planted(rng, 2, 0.8, 0.9)).peak_interval() is None  # two seeds
    few = planted(rng, 3, 0.8, 0.9)[0]
    assert fit(TRAINED, [Points(few.kls[:2], few.gains[:2], few.prompts)]) is None


def test_seeds_with_other_prompts_are_fitted_by_their_means():
    points = planted(np.random.default_rng(3), 4, 0.8, 0.9)
    shared = fit(TRAINED, points)
    points[0] = Points(points[0].kls, points[0].gains, tuple(reversed(PROMPTS)))
    by_means = fit(TRAINED, points)
    assert shared.estimates()[0].over == "seeds and prompts"
    assert by_means.a.shape == (4, 1) and by_means.estimates()[0].over == "seeds"
    assert by_means.a[:, 0] == pytest.approx(shared.a.mean(1))


def write_run(folder, seed: int, gains: dict[str, tuple[float, float]], kls=KLS):
    """A finished run whose rewards follow the planted forms exactly. gains: (a, b) by reward."""
    rows, samples = [], []
    for examples, kl in enumerate((0.0, *kls)):
        d = math.sqrt(kl)
        of = {name: d * (a - b * math.log(d)) if d else 0.0 for name, (a, b) in gains.items()}
        first = next(iter(of.values()))
        rows.append(
            {"split": "eval", "examples": examples, "samples_eval/kl": kl}
            | {"samples_eval/policy_reward": 1 + first}
        )
        samples += [
            {
                "prompt": prompt,
                "examples": examples,
                "kl": kl,
                "policy_reward": {name: 1 + value for name, value in of.items()},
                "reference_reward": dict.fromkeys(of, 1.0),
            }
            for prompt in PROMPTS
        ]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", samples)
    config = {"loss": {"name": "dpo"}, "seed": seed, "temperature": 1, "topp": 1}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    summary = {"finished": True, "reference_reward": 1.0, "policy_reward": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return Run(folder)


def test_the_table_has_gold_and_proxy_and_the_frontier_the_curve(tmp_path):
    rewards = {"gold": (0.8, 0.9), "proxy": (1.0, 0.2)}  # the proxy has its peak at KL 2981
    runs = [write_run(tmp_path / str(seed), seed, rewards) for seed in (1, 2, 3)]
    table = overoptimization_table([Group({"loss.name": "dpo"}, runs)])
    gold, proxy = (dict(zip(table.head, row, strict=True)) for row in table.rows)
    assert gold["reward"] == "gold" and proxy["reward"] == "proxy"
    assert gold["a"] == "0.80 [0.80, 0.80]" and gold["peak at KL"] == "0.80 [0.80, 0.80]"
    assert gold["gain there"] == f"{0.9 * math.exp(0.8 / 0.9 - 1):.3f}"
    assert (proxy["peak at KL"], proxy["gain there"]) == ("beyond 4.00 (95%)", "-")
    assert table.notes[-1] == "Intervals are over seeds and prompts."
    [ax] = frontier_figure([Group({"loss.name": "dpo"}, runs)]).axes
    [dotted] = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert max(dotted.get_ydata()) == pytest.approx(1 + 0.9 * math.exp(0.8 / 0.9 - 1), rel=1e-3)


def test_rounds_of_an_online_run_are_measured_by_gold_and_by_labels(tmp_path):
    run = write_run(tmp_path / "run", 1, {"gold": (1.0, 0.5)})
    rows = [
        {"split": "online", "online/kl": kl, "online/gold_reward": 2 + g, "online/label_score": s}
        for kl, g, s in ((0.0, 0.0, 5.0), (0.5, 0.4, 6.0), (1.0, 0.5, 7.0), (2.0, 0.3, 9.0))
    ]
    write_jsonl(run.folder / "metrics.jsonl", rows)
    points = fits_of([Run(run.folder)])
    [gold], [labels] = points["gold, by rounds"], points["labels, by rounds"]
    assert gold.gains[:, 0] == pytest.approx([0, 0.4, 0.5, 0.3])
    assert labels.gains[:, 0].tolist() == [0, 1, 2, 4]
    same = [row | {"online/label_score": row["online/gold_reward"]} for row in rows]
    write_jsonl(run.folder / "metrics.jsonl", same)
    assert "labels, by rounds" not in fits_of([Run(run.folder)])  # the gold itself labels
