"""Losses against closed forms computed by hand, and what must hold for every registered loss and its yaml."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import losses
from configuration import CONFIG_DIR, register_resolvers
from losses import LOSSES, Pair, Target, bind_loss, made_up_batch
from utils import ConfigError, DataError

YAMLS = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))


def bind(loss, **settings):
    values = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "loss" / f"{loss}.yaml"))
    return bind_loss(values | settings)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair(d_w=0.0, d_l=0.0, *, ref_w=-3.0, ref_l=-5.0, **more) -> Pair:
    """One pair with the given log-ratios, as leaves that take gradients."""
    fields = dict(policy_chosen_logps=ref_w + d_w, policy_rejected_logps=ref_l + d_l, reference_chosen_logps=ref_w, reference_rejected_logps=ref_l)
    return Pair(**{key: torch.tensor([float(value)], dtype=torch.float64, requires_grad=True) for key, value in (fields | more).items()})


def value(name, data, **settings) -> float:
    return bind(name, **settings)(data).losses.item()


# ------------------------------------------------------------------------------------------ values by hand
# d_w = 2, d_l = -1, so h = 3.


def test_dpo():
    assert value("dpo", pair(2, -1), beta=0.5) == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-12)


def test_dpo_with_label_smoothing():
    expected = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))
    assert value("dpo", pair(2, -1), beta=0.5, label_smoothing=0.1) == pytest.approx(expected, rel=1e-12)


def test_dpo_without_reference_sees_log_probs_alone():
    loss = bind("dpo", beta=0.5, reference_free=True)
    data = pair(2, -1)  # log-probs -1 and -6
    data.reference_chosen_logps = data.reference_rejected_logps = None
    output = loss(data)
    assert loss.reads == frozenset()
    assert output.losses.item() == pytest.approx(-math.log(sigmoid(0.5 * 5)), rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(-0.5)


def test_ipo():
    assert value("ipo", pair(2, -1), beta=0.1) == pytest.approx((3 - 5) ** 2)


def test_ipo_averaged_over_lengths_keeps_rewards_of_sums():
    output = bind("ipo", beta=0.1, average_log_prob=True)(pair(2, -1, chosen_lengths=4, rejected_lengths=2))
    assert output.losses.item() == pytest.approx((2 / 4 + 1 / 2 - 5) ** 2)
    assert output.chosen_rewards.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "settings, f",
    [
        ({}, math.log(1.6 - 0.4)),
        ({"offset": "ratio"}, math.log(1.6 / 0.4)),
        ({"ratio": True}, math.log(1.6 / 0.4)),
        ({"offset": "identity"}, 1.2),
        ({"offset": "log1p"}, math.log(2.2)),
        ({"offset": "none"}, 0.0),
    ],
)
def test_odpo(settings, f):
    data = pair(2, -1, chosen_scores=1.6, rejected_scores=0.4)
    assert value("odpo", data, beta=0.5, alpha=0.7, **settings) == pytest.approx(-math.log(sigmoid(1.5 - 0.7 * f)), rel=1e-12)


def test_soft_label():
    p = sigmoid(2 * (1.6 - 0.4))
    expected = -p * math.log(sigmoid(1.5)) - (1 - p) * math.log(sigmoid(-1.5))
    data = pair(2, -1, chosen_scores=1.6, rejected_scores=0.4)
    assert value("soft-label", data, beta=0.5, gamma=2.0) == pytest.approx(expected, rel=1e-12)
    sure = pair(2, -1, chosen_scores=100.0, rejected_scores=0.0)
    assert value("soft-label", sure, beta=0.5, gamma=2.0) == pytest.approx(value("dpo", sure, beta=0.5), rel=1e-12)


def test_cal_dpo_has_no_beta_in_the_sigmoid():
    expected = -math.log(sigmoid(3)) + 0.5 * ((2 - 5) ** 2 + (-1 + 5) ** 2)
    assert value("cal-dpo", pair(2, -1), beta=0.1, cal_weight=0.5) == pytest.approx(expected, rel=1e-12)


def test_tdpo():
    data = pair(2, -1, chosen_kl=0.3, rejected_kl=0.8)
    one = -math.log(sigmoid(0.5 * (3 - (0.8 - 0.3))))
    two = -math.log(sigmoid(0.5 * (3 - 0.7 * (0.8 - 0.3))))
    assert value("tdpo1", data, beta=0.5) == pytest.approx(one, rel=1e-12)
    assert value("tdpo", data, beta=0.5, if_tdpo2=False) == pytest.approx(one, rel=1e-12)
    assert value("tdpo2", data, beta=0.5, alpha=0.7) == pytest.approx(two, rel=1e-12)
    assert value("tdpo", data, beta=0.5, alpha=0.7) == pytest.approx(two, rel=1e-12)


def test_sft():
    target = Target(torch.tensor([-6.0, -9.0]), torch.tensor([2.0, 3.0]))
    assert bind("sft")(target).losses.tolist() == [6.0, 9.0]
    assert bind("sft", reduction="mean")(target).losses.tolist() == [3.0, 3.0]


def test_bradley_terry_subtracts_the_margin_column():
    data = Pair(chosen_values=torch.tensor([1.5]), rejected_values=torch.tensor([0.25]), columns={"magnitude": torch.tensor([0.5])})
    assert value("bradley_terry", data) == pytest.approx(-math.log(sigmoid(1.25)), rel=1e-6)
    loss = bind("bradley_terry", margin="magnitude")
    assert loss.columns == {"magnitude"}
    assert loss(data).losses.item() == pytest.approx(-math.log(sigmoid(0.75)), rel=1e-6)


def test_sft_weight_adds_the_mean_token_loss_of_the_chosen_response():
    data = pair(2, -1, chosen_lengths=4, rejected_lengths=2)  # log-prob of chosen: -1
    assert value("dpo", data, beta=0.5, sft_weight=0.3) == pytest.approx(-math.log(sigmoid(1.5)) + 0.3 * 1 / 4, rel=1e-12)


# ------------------------------------------------------------------------------------------ at policy = reference


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("dpo", {}, math.log(2)),
        ("tdpo1", {}, math.log(2)),
        ("tdpo2", {}, math.log(2)),
        ("ipo", {"beta": 0.1}, 25.0),
        ("cal-dpo", {"beta": 0.1, "cal_weight": 1.0}, math.log(2) + 50.0),
        ("odpo", {"alpha": 0.5}, -math.log(sigmoid(-0.5 * math.log(1.2)))),
        ("soft-label", {"gamma": 3.0}, math.log(2)),
        ("bradley_terry", {}, math.log(2)),
    ],
)
def test_value_at_policy_equals_reference(name, settings, expected):
    data = pair(chosen_kl=0, rejected_kl=0, chosen_scores=1.6, rejected_scores=0.4, chosen_values=0.7, rejected_values=0.7)
    assert value(name, data, **settings) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------ gradients


def gradients(name, data, **settings):
    output = bind(name, **settings)(data)
    leaves = {key: getattr(data, key) for key in ("policy_chosen_logps", "policy_rejected_logps", "chosen_kl", "rejected_kl")}
    leaves = {key: leaf for key, leaf in leaves.items() if leaf is not None}
    found = torch.autograd.grad(output.losses.sum(), list(leaves.values()), allow_unused=True)
    return {key: None if g is None else g.item() for key, g in zip(leaves, found)}


def test_tdpo2_sends_no_gradient_through_the_chosen_kl_and_tdpo1_does():
    data = pair(2, -1, chosen_kl=0.3, rejected_kl=0.8)
    two, one = gradients("tdpo2", data, alpha=1.0), gradients("tdpo1", data)
    assert two["chosen_kl"] is None and two["rejected_kl"] > 0
    assert one["chosen_kl"] < 0 and one["rejected_kl"] == pytest.approx(two["rejected_kl"])
    assert value("tdpo2", data, alpha=1.0) == pytest.approx(value("tdpo1", data), rel=1e-12)


def test_odpo_gradient_grows_with_the_score_gap():
    pulls = [-gradients("odpo", pair(chosen_scores=1 + gap, rejected_scores=1))["policy_chosen_logps"] for gap in (0.1, 0.5, 0.9)]
    assert pulls[0] < pulls[1] < pulls[2]


def test_cal_dpo_calibration_pulls_each_log_ratio_to_its_own_target():
    for d_w, d_l, up, down in ((4, -4, 1, 1), (6, -6, -1, -1)):
        found = gradients("cal-dpo", pair(d_w, d_l), beta=0.1, cal_weight=1.0)  # targets +5 and -5
        assert math.copysign(1, -found["policy_chosen_logps"]) == up
        assert math.copysign(1, found["policy_rejected_logps"]) == down


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("name, settings", [("odpo", {"alpha": 0.0}), ("tdpo2", {"alpha": 0.0}), ("dpo", {"label_smoothing": 0.0})])
def test_equals_dpo(name, settings):
    data = pair(2, -1, chosen_scores=1.6, rejected_scores=0.4, chosen_kl=0.3, rejected_kl=0.8)
    assert value(name, data, beta=0.3, **settings) == pytest.approx(value("dpo", data, beta=0.3), rel=1e-12)
    assert value("odpo", data, beta=0.3, alpha=1.0) != pytest.approx(value("dpo", data, beta=0.3), rel=1e-3)


# ------------------------------------------------------------------------------------------ every loss


def test_every_registered_loss_has_a_yaml_of_its_name_and_every_yaml_a_loss():
    own = {name for name, spec in LOSSES.items() if spec.function.__module__ == "losses"}
    assert own == set(YAMLS)


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_composes_binds_and_comments_every_key(name):
    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"loss={name}"])
    loss = bind_loss(OmegaConf.to_container(config.loss, resolve=True))
    assert loss.name == name
    lines = (CONFIG_DIR / "loss" / f"{name}.yaml").read_text().splitlines()
    for above, line in zip(["", *lines], lines):
        assert line.startswith("#") or above.startswith("#"), f"{name}.yaml: {line!r} has no comment above"


@pytest.mark.parametrize("name", YAMLS)
def test_docstring_says_where_it_comes_from(name):
    text = LOSSES[name].function.__doc__
    assert text and (name == "sft" or "arXiv:" in text)


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("gap", [0.0, 100.0, -100.0, 1e4, -1e4])
def test_loss_and_gradient_are_finite_and_inputs_untouched(name, gap):
    loss = bind(name)
    data = made_up_batch(loss)
    policy_fields = [f for f in ("policy_chosen_logps", "chosen_values", "policy_logps") if getattr(data, f, None) is not None]
    if "reference" in loss.reads:
        data.policy_chosen_logps = data.reference_chosen_logps + gap
        data.policy_rejected_logps = data.reference_rejected_logps.clone()
    elif gap and hasattr(data, "chosen_values") and data.chosen_values is not None:
        data.chosen_values = data.chosen_values + gap
    tensors = {key: t for key, t in vars(data).items() if isinstance(t, torch.Tensor)}
    for t in tensors.values():
        t.requires_grad_(True)
    before = {key: t.detach().clone() for key, t in tensors.items()}
    output = loss(data)
    output.losses.sum().backward()
    assert output.losses.shape == (3,)
    assert torch.isfinite(output.losses).all()
    for field in policy_fields:
        assert torch.isfinite(tensors[field].grad).all() and (gap != 0 or tensors[field].grad.abs().sum() > 0)
    for key, t in tensors.items():
        assert torch.equal(t, before[key]), f"{name} wrote to {key}"


@pytest.mark.parametrize("name", [n for n in YAMLS if "beta" in LOSSES[n].settings])
def test_logged_rewards_are_beta_times_log_ratios_whatever_is_optimised(name):
    loss = bind(name, beta=0.25)
    if "reference" not in loss.reads:
        pytest.skip("without a reference there is no log-ratio")
    output = loss(pair(2, -1, chosen_scores=1.6, rejected_scores=0.4, chosen_kl=0.3, rejected_kl=0.8, chosen_lengths=4, rejected_lengths=2))
    assert (output.chosen_rewards.item(), output.rejected_rewards.item()) == pytest.approx((0.5, -0.25))


# ------------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    "name, settings, told",
    [
        ("dpo", {"alpha": 1.0}, "no setting alpha; accepted: beta, label_smoothing, reference_free"),
        ("dpo", {"beta": None}, "needs loss.beta"),
        ("dpo", {"beta": 0.0}, "greater than 0"),
        ("dpo", {"beta": "high"}, "finite number"),
        ("dpo", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("odpo", {"offset": "lgo"}, "accepted: log, ratio, identity"),
        ("odpo", {"offset": "identity", "ratio": True}, "contradict"),
        ("odpo", {"alpha": -1.0}, "must not be negative"),
        ("sft", {"reduction": "max"}, "accepted: sum, mean"),
        ("sft", {"sft_weight": 0.1}, "set it to 0"),
        ("dpo", {"name": "dop"}, "did you mean dpo"),
    ],
)
def test_bad_settings_are_refused(name, settings, told):
    with pytest.raises(ConfigError, match=told):
        bind(name, **settings)


@pytest.mark.parametrize("offset, scores", [("log", (1.0, 1.0)), ("log", (0.5, 1.0)), ("ratio", (1.0, 0.0)), ("ratio", (1.0, -2.0))])
def test_odpo_names_the_example_with_unusable_scores(offset, scores):
    data = pair(chosen_scores=scores[0], rejected_scores=scores[1])
    data.names = ["imdb.jsonl:12"]
    with pytest.raises(DataError, match="imdb.jsonl:12"):
        bind("odpo", offset=offset)(data)


def test_odpo_tells_the_offsets_of_the_data():
    line = bind("odpo", alpha=1.0).inspect_scores(torch.tensor([2.0, 1.5, 4.0]), torch.tensor([1.0, 1.0, 1.0]), [])
    assert "median 0" in line and "33% are negative" in line


def test_a_loss_that_reads_more_than_it_declares_is_refused_before_it_trains():
    @losses.register_loss("careless", reads={"reference"})
    def careless(pair, *, beta: float):
        return losses.LossOutput(pair.chosen_logratio * pair.chosen_scores)

    try:
        with pytest.raises(ConfigError, match="declares to read .reference."):
            bind_loss({"name": "careless", "beta": 0.1})
    finally:
        del LOSSES["careless"]


def test_a_loss_in_a_users_own_file(tmp_path):
    (tmp_path / "my_losses.py").write_text(
        "from losses import LossOutput, register_loss\n"
        "@register_loss('mine', reads={'reference'})\n"
        "def mine(pair, *, beta: float):\n"
        "    '''Squared gap.'''\n"
        "    return LossOutput((beta * (pair.chosen_logratio - pair.rejected_logratio)) ** 2)\n"
    )
    config = {"name": "mine", "module": str(tmp_path / "my_losses.py"), "beta": 2.0}
    try:
        assert bind_loss(config)(pair(2, -1)).losses.item() == pytest.approx(36.0)
        assert bind_loss(config).name == "mine"  # a second run in the same process imports it again
    finally:
        LOSSES.pop("mine", None)
    with pytest.raises(ConfigError, match="no such file"):
        bind_loss(config | {"module": "nowhere/my_losses.py"})
