"""Intervals hold the truth as often as they say; choosing is apart from reporting."""

import math

import numpy as np
import pytest

from preflab.reports.distributions import power_to_differ, power_to_equal, t_cdf, t_quantile
from preflab.reports.selection import (
    DEV,
    TEST,
    Evaluation,
    best_within,
    chosen_mixture,
    of_mixture,
    part_of,
)
from preflab.reports.statistics import (
    components,
    crossed,
    difference,
    over_seeds,
    over_seeds_and_prompts,
    p_value,
    share_interval,
    variance_df,
    wilson,
)

# Standard deviations of seeds, of prompts, and of what is left.
SIZES = [(1, 0, 0.3), (0, 1, 1), (0, 0, 1), (0.1, 1, 1), (0.3, 1, 1), (0.5, 1, 0.5)]


def test_t_quantiles_of_the_tables():
    # Abramowitz and Stegun, table 26.10.
    for df, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)):
        assert float(t_quantile(0.975, df)) == pytest.approx(value, abs=6e-4)
        assert float(t_cdf(float(t_quantile(0.975, df)), df)) == pytest.approx(0.975, abs=1e-12)
    assert float(t_quantile(0.025, 3.5)) == -float(t_quantile(0.975, 3.5))
    # With two degrees of freedom there is a closed form.
    assert float(t_cdf(1.7, 2)) == pytest.approx(0.5 + 1.7 / (2 * math.sqrt(2 + 1.7**2)), abs=1e-13)
    assert float(t_cdf(1e3, 1e5)) == pytest.approx(1.0, abs=1e-9)


def test_power_is_the_share_of_simulated_tests():
    rng = np.random.default_rng(0)
    n, shift, margin = 6, 1.2, 1.5
    drawn = rng.normal(size=(40_000, n))
    error = drawn.std(1, ddof=1) / math.sqrt(n)
    found = np.abs(drawn.mean(1) + shift) > float(t_quantile(0.975, n - 1)) * error
    power = power_to_differ(shift, 1 / math.sqrt(n), n - 1)
    assert found.mean() == pytest.approx(power, abs=0.01)
    equal = np.abs(drawn.mean(1)) + float(t_quantile(0.95, n - 1)) * error < margin
    assert equal.mean() == pytest.approx(power_to_equal(margin, 1 / math.sqrt(n), n - 1), abs=0.01)


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_intervals_hold_the_truth_in_95_percent(n_seeds):
    rng = np.random.default_rng(n_seeds)
    n = 2500
    seeds = rng.normal(size=(n, n_seeds))
    error = seeds.std(1, ddof=1) / math.sqrt(n_seeds)
    half = float(t_quantile(0.975, n_seeds - 1)) * error
    assert abs((np.abs(seeds.mean(1)) <= half).mean() - 0.95) <= 0.02
    one = over_seeds(seeds[0])
    assert (one.low, one.high) == pytest.approx((one.mean - half[0], one.mean + half[0]))
    for of_seed, of_prompt, rest in SIZES:
        table = of_seed * rng.normal(size=(n, n_seeds, 1)) + rest * rng.normal(
            size=(n, n_seeds, 40)
        )
        table += of_prompt * rng.normal(size=(n, 1, 40))
        mean, se, df = crossed(table)
        held = np.abs(mean) <= t_quantile(0.975, df) * se
        assert abs(held.mean() - 0.95) <= 0.02, (of_seed, of_prompt, rest)


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_intervals_of_win_rates_over_seeds_hold_the_truth(n_seeds):
    """Four samples for each of 60 prompts, whose win rates differ, as those of the seeds do."""
    rng = np.random.default_rng(n_seeds)
    n, prompts, samples, of_seed, of_prompt = 2000, 60, 4, 0.3, 1.5
    for middle, least in ((0.0, 0.93), (1.0, 0.93), (2.6, 0.915)):  # on the logit scale

        def chances(seeds, prompts, middle=middle):
            return 1 / (1 + np.exp(-middle - of_seed * seeds - of_prompt * prompts))

        rate = chances(*rng.normal(size=(2, 400_000))).mean()
        seeds = rng.normal(size=(n, n_seeds, 1))
        shared = rng.binomial(samples, chances(seeds, rng.normal(size=(n, 1, prompts)))) / samples
        mean, se, df = crossed(shared)
        over_both = np.abs(mean - rate) <= t_quantile(0.975, df) * se
        own = rng.binomial(samples, chances(seeds, rng.normal(size=(n, n_seeds, prompts))))
        means = own.mean(2) / samples
        half = float(t_quantile(0.975, n_seeds - 1)) * means.std(1, ddof=1) / math.sqrt(n_seeds)
        over_seeds_alone = np.abs(means.mean(1) - rate) <= half
        for held in (over_both, over_seeds_alone):
            assert least <= held.mean() <= 0.97, rate
    assert 0.85 < rate < 0.9


def test_the_percentile_bootstrap_and_a_t_interval_over_seeds_alone_would_not():
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(1000, 3))
    picks = rng.integers(0, 3, (500, 3))
    low, high = np.quantile(seeds[:, picks].mean(-1), (0.025, 0.975), axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.80
    table = rng.normal(size=(1000, 5, 40)) + rng.normal(size=(1000, 1, 40))
    means = table.mean(-1)
    half = float(t_quantile(0.975, 4)) * means.std(1, ddof=1) / math.sqrt(5)
    assert (np.abs(means.mean(1)) <= half).mean() < 0.80


def test_components_are_those_of_an_analysis_of_variance():
    table = np.array([[1.0, 2.0, 6.0], [2.0, 5.0, 8.0]])
    of_seeds, of_prompts, rest = components(table)
    # Means: 4; seeds 3 and 5; prompts 1.5, 3.5, 7.
    assert of_seeds == pytest.approx(3 * (1 + 1))
    assert of_prompts == pytest.approx(2 * (2.5**2 + 0.5**2 + 3**2) / 2)
    residuals = [1 - 0.5, 2 - 2.5, 6 - 6, 2 - 2.5, 5 - 4.5, 8 - 8]
    assert rest == pytest.approx(sum(r * r for r in residuals) / 2)


def test_two_seeds_have_a_range_and_one_an_interval_over_prompts():
    two = over_seeds([1.0, 3.0])
    assert (two.low, two.high, p_value(two)) == (None, None, None)
    assert (two.least, two.greatest, two.over) == (1.0, 3.0, "seeds")
    two = over_seeds_and_prompts([[1.0, 2.0, 4.0], [2.0, 2.0, 8.0]])
    assert two.low is None and two.over == "seeds and prompts"
    one = over_seeds_and_prompts([[1.0, 2.0, 4.0, 5.0]])
    half = 3.182446 * np.std([1, 2, 4, 5], ddof=1) / 2
    assert one.over == "prompts" and one.high == pytest.approx(3 + half, rel=1e-5)
    assert over_seeds([]) is None
    three = over_seeds([0.5, 1.0, 2.0])
    at_the_end = p_value(three, three.low)
    assert at_the_end == pytest.approx(0.05)


def test_differences_are_paired_by_seed_and_by_shared_prompts():
    ours = {"0": {"a": 1.0, "b": 5.0}, "1": {"a": 2.0, "b": 4.0}, "2": {"a": 1.0, "b": 3.0}}
    theirs = {s: {p: v - 1 - 0.1 * int(s) for p, v in of.items()} for s, of in ours.items()}
    both = difference(ours, theirs | {"9": {"a": 0.0, "b": 0.0}})
    assert both.mean == pytest.approx(1.1) and (both.seeds, both.prompts) == (3, 2)
    assert both.se == pytest.approx(0.1 / math.sqrt(3))  # the prompts' own sizes cancel
    theirs["2"] = {"a": 0.0, "c": 1.0}
    alone = difference(ours, theirs)
    assert alone.prompts == 0 and alone.mean == pytest.approx((1 + 1.1 + 1.5) / 3)


def test_shares_over_prompts_with_several_samples():
    assert share_interval([[1.0]] * 8 + [[0.0]] * 2) == wilson(0.8, 10)
    assert share_interval([[1.0, 1.0]] * 5) == wilson(1.0, 5)  # not 10 trials
    # Copies of a sample add nothing; ties make a share more certain.
    rng = np.random.default_rng(0)
    results = rng.integers(0, 2, 60).astype(float)
    alone, copied = share_interval(results[:, None]), share_interval(np.repeat(results, 4)[:, None])
    once = share_interval(np.repeat(results[:, None], 4, axis=1))
    assert np.diff(once) == pytest.approx(np.diff(alone), rel=0.05)
    assert np.diff(copied) < 0.6 * np.diff(alone)
    tied = np.where(np.arange(60) % 2, 0.5, results)
    assert np.diff(share_interval(tied[:, None])) < 0.8 * np.diff(alone)


@pytest.mark.parametrize("concentration", [1.0, 1e4])
def test_the_interval_of_a_win_rate_holds_the_truth_where_prompts_differ(concentration):
    rng = np.random.default_rng(1)
    chances = rng.beta(0.7 * concentration, 0.3 * concentration, size=(800, 60, 1))
    results = (rng.random((800, 60, 4)) < chances).astype(float)
    bounds = np.array([share_interval(list(of)) for of in results])
    held = ((bounds[:, 0] <= 0.7) & (bounds[:, 1] >= 0.7)).mean()
    assert abs(held - 0.95) <= 0.025
    naive = np.array([wilson(float(of.mean()), 240) for of in results])
    held_naive = ((naive[:, 0] <= 0.7) & (naive[:, 1] >= 0.7)).mean()
    assert (held_naive < 0.85) == (concentration == 1.0)


@pytest.mark.parametrize("rate, n_samples", [(0.5, 3), (0.8, 10), (0.9, 3)])
def test_the_interval_of_a_win_rate_holds_the_truth_of_50_prompts(rate, n_samples):
    """Half of the prompts, and more at 0.9, are nearly always won or nearly always lost."""
    rng = np.random.default_rng(4)
    chances = rng.beta(rate, 1 - rate, size=(1500, 50, 1))
    results = (rng.random((1500, 50, n_samples)) < chances).astype(float)
    held = [low <= rate <= high for low, high in map(share_interval, results)]
    assert abs(np.mean(held) - 0.95) <= 0.02


def test_the_interval_of_a_win_rate_holds_at_extreme_rates_too():
    """Few prompts with most of the wins: P - 1 degrees of freedom take their variance as known."""
    rng = np.random.default_rng(2)
    for rate in (0.05, 0.95):
        chances = rng.beta(rate / 2, (1 - rate) / 2, size=(500, 20, 1))
        results = (rng.random((500, 20, 10)) < chances).astype(float)
        held = [low <= rate <= high for low, high in map(share_interval, results)]
        assert 0.935 <= np.mean(held) <= 0.99
        plain = []
        for of in results:
            residuals = of.sum(1) - 10 * of.mean()
            variance = (residuals**2).sum() / 200**2 * 20 / 19
            trials = of.mean() * (1 - of.mean()) / variance if variance else 20
            low, high = wilson(of.mean(), trials, 2.093)
            plain.append(low <= rate <= high)
        assert np.mean(plain) < 0.92


def test_the_degrees_of_freedom_of_a_variance():
    rng = np.random.default_rng(3)
    assert variance_df(rng.normal(size=2000)) == pytest.approx(1999, rel=0.2)
    # The fourth moment of Laplace's distribution is 6 s^4, so Var(s^2) is 5 s^4 / n.
    assert variance_df(rng.laplace(size=40_000)) == pytest.approx(0.4 * 40_000, rel=0.1)
    assert variance_df(np.array([5.0, *[0.0] * 30])) == pytest.approx(2.0, abs=0.3)
    assert variance_df(np.array([1.0, -1.0] * 10)) == 19.0


# ---------------------------------------------------------------------------------------- selection


def evaluation(kl, reward, prompts):
    """An evaluation with these values on dev and on test: (dev, test) or one for both."""
    both = [value if isinstance(value, tuple) else (value, value) for value in (kl, reward)]
    values = {
        name: {p: of[part_of(p) == TEST] for p in prompts}
        for name, of in zip(("kl", "policy_reward"), both, strict=True)
    }
    return Evaluation({}, values)


PROMPTS = [f"prompt {i}" for i in range(200)]


def test_a_prompt_is_dev_or_test_by_its_text_alone():
    share = sum(part_of(p) == DEV for p in PROMPTS) / len(PROMPTS)
    assert 0.4 < share < 0.6
    assert {part_of(p, 1.0) for p in PROMPTS} == {DEV} and part_of("x", 0.0) == TEST
    assert part_of("prompt 0") == part_of("prompt" + " 0")


def test_dev_chooses_and_test_reports():
    weak = evaluation(0.0, 1.0, PROMPTS)
    lucky = evaluation(0.5, (3.0, 1.2), PROMPTS)  # better on dev only
    strong = evaluation((2.0, 2.2), (2.0, 2.5), PROMPTS)
    [(chosen, weight)] = chosen_mixture([weak, lucky, strong], 1.0)
    assert chosen is lucky and weight == 1.0  # the running maximum on dev
    values = of_mixture([(chosen, weight)], "policy_reward")
    assert set(values) == {p for p in PROMPTS if part_of(p) == TEST}
    assert set(values.values()) == {1.2}
    mixture = chosen_mixture([weak, strong], 0.5)
    assert [(e, pytest.approx(w)) for e, w in mixture] == [(weak, 0.75), (strong, 0.25)]
    assert list(of_mixture(mixture, "kl").values()) == pytest.approx(len(values) * [0.25 * 2.2])
    assert chosen_mixture([weak, strong], 2.1) is None  # beyond dev's KL
    assert best_within([weak, lucky, strong], 1.0) is lucky
    assert best_within([weak, lucky, strong], part=TEST) is strong
    assert best_within([strong], 1.0) is None


def test_choosing_and_reporting_on_the_same_prompts_is_biased_upwards():
    rng = np.random.default_rng(0)
    gains = {DEV: [], TEST: []}
    for _ in range(60):
        noisy = [
            Evaluation(
                {},
                {"kl": dict.fromkeys(PROMPTS, float(i)), "policy_reward": noise},
            )
            for i in range(8)
            for noise in [dict(zip(PROMPTS, rng.normal(size=200).tolist(), strict=True))]
        ]
        best = best_within(noisy)
        for part, values in gains.items():
            values.append(best.mean("policy_reward", part))
    assert np.mean(gains[DEV]) > 0.1 and abs(np.mean(gains[TEST])) < 0.04
