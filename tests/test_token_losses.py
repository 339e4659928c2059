"""Losses that weigh tokens, against published code and plain loops; the draw of sampo; weights of
tokens in data, in every layout; and the script that writes them."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, save_model, write_jsonl
from test_losses import bind

import token_losses
from preflab.batching import packed_models
from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.packing import LAYOUTS, Layout
from preflab.batching.token_store import prepare
from preflab.checks import check_config
from preflab.modeling.logprobs import Scorer
from preflab.objective.types import Pair, Side
from preflab.readers.records import Record
from preflab.readers.registry import open_dataset
from preflab.settings.compose import compose
from preflab.training.compute_loss import compute_loss
from scripts import token_weights
from utils import ConfigError, DataError

# Probabilities of the tokens of two pairs, under the policy and the reference, and their weights.
POLICY = {
    "chosen": [[0.9, 0.2, 0.5, 0.7], [0.35, 0.6]],
    "rejected": [[0.4, 0.8], [0.1, 0.55, 0.3, 0.95, 0.65]],
}
REFERENCE = {
    "chosen": [[0.7, 0.3, 0.4, 0.6], [0.5, 0.45]],
    "rejected": [[0.5, 0.6], [0.2, 0.5, 0.35, 0.9, 0.8]],
}
WEIGHTS = {
    "chosen": [[1.2, 0.8, 1.0, 0.7], [0.9, 1.3]],
    "rejected": [[1.1, 0.75], [1.0, 0.8, 1.25, 0.7, 0.95]],
}
SELECTED = {"chosen": [[1, 0, 1, 0], [0, 1]], "rejected": [[0, 1], [1, 0, 1, 0, 1]]}


def padded(rows, longest=6):
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.float64)


def some_pairs(weights=WEIGHTS, longest=6) -> Pair:
    """The two pairs, with leaves for the policy's token log-probs."""

    def side(name):
        policy, reference = (
            padded([[math.log(p) for p in row] for row in table[name]], longest)
            for table in (POLICY, REFERENCE)
        )
        numbers = padded([range(1, 1 + len(row)) for row in POLICY[name]], longest)
        return Side(
            policy_logps=policy.sum(1),
            reference_logps=reference.sum(1),
            lengths=torch.tensor([len(row) for row in POLICY[name]], dtype=torch.float64),
            token_logps=policy.requires_grad_(),
            reference_token_logps=reference,
            tokens=(numbers + 10 * (name == "rejected")).long(),
            token_weights=padded(weights[name], longest),
        )

    return Pair(side("chosen"), side("rejected"))


# ------------------------------------------------------------------------------------- the formulas

# Numbers of LuJunru/SamPO 25e9631, hee-suk-yoon/ConfPO 044b366, SteveKGYang/SePO 82fab6c,
# exlaw/TIS-DPO cbad7c1 and huggingface/trl f2cd577 (ld_alpha) on these probabilities. Those of
# SamPO are for tokens 1 and 3 of the first chosen and 0 and 4 of the second rejected response.
PUBLISHED = [
    ("ld-dpo", {"beta": 0.3, "alpha": 0.3}, WEIGHTS, [0.709097532601125, 0.6043074788136167]),
    ("sampo", {"beta": 0.3}, WEIGHTS, [0.7416470380591067, 0.576141675866221]),
    ("confpo", {"beta": 1.5, "gamma": 1.6}, WEIGHTS, [2.085212415863621, 1.0022074590150074]),
    ("tis-dpo", {"beta": 0.3}, WEIGHTS, [0.6437389090194873, 0.5515548163141375]),
    ("sepo", {"beta": 1.0}, SELECTED, [0.7850741838710793, 0.3705982983119427]),
]
DRAWN = {4: {1, 3}, 5: {0, 4}}  # by length; the other responses are the shorter ones


def as_published(side, n, key):
    places = [DRAWN.get(int(length), {0, 1}) for length in side.lengths]
    longest = side.token_logps.shape[1]
    return padded([[float(t in of_row) for t in range(longest)] for of_row in places], longest)


@pytest.mark.parametrize("name, settings, weights, expected", PUBLISHED)
def test_numbers_of_published_code(name, settings, weights, expected, monkeypatch):
    loss = bind(name, **settings)
    monkeypatch.setattr(token_losses, "_drawn", as_published)
    output = loss(some_pairs(weights))
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-12)


def log_s(x):
    return torch.log(1 / (1 + torch.exp(-x)))


def plain_ld(chosen, rejected, alpha, beta, **_):
    def gap(tokens, other):
        return sum((1 if t < other else alpha) * d for t, (_, d, _) in enumerate(tokens))

    return -log_s(beta * (gap(chosen, len(rejected)) - gap(rejected, len(chosen))))


def plain_sampo(chosen, rejected, beta, **_):
    def kept(tokens):
        return sum(d for t, (_, d, _) in enumerate(tokens) if t in DRAWN.get(len(tokens), {0, 1}))

    return -log_s(beta * (kept(chosen) - kept(rejected)))


def plain_confpo(chosen, rejected, beta, gamma, **_):
    def mean(tokens):
        average = sum(p.detach().exp() for p, _, _ in tokens) / len(tokens)
        used = [p for p, _, _ in tokens if p.exp() < average]
        return sum(used) / len(used)

    return -log_s(beta * (mean(chosen) - mean(rejected)) - gamma)


def plain_tis(chosen, rejected, beta, **_):
    return -log_s(beta * (sum(d * v for _, d, v in chosen) - sum(d * v for _, d, v in rejected)))


def plain_sepo(chosen, rejected, beta, gamma=0, **_):
    def mean(tokens):
        return sum(p * v for p, _, v in tokens) / sum(v for *_, v in tokens)

    return -log_s(beta * (mean(chosen) - mean(rejected)) - gamma)


PLAIN = {
    "ld-dpo": plain_ld,
    "sampo": plain_sampo,
    "confpo": plain_confpo,
    "tis-dpo": plain_tis,
    "sepo": plain_sepo,
}


@pytest.mark.parametrize("name, settings, weights, _", PUBLISHED)
def test_value_and_gradient_are_those_of_the_formula_in_plain_loops(
    name, settings, weights, _, monkeypatch
):
    loss = bind(name, **settings)
    monkeypatch.setattr(token_losses, "_drawn", as_published)
    data, plain = some_pairs(weights), some_pairs(weights)
    losses = loss(data).losses
    losses.sum().backward()
    for i in range(2):
        tokens = []
        for side in (plain.chosen, plain.rejected):
            d = side.token_logps - side.reference_token_logps
            columns = (side.token_logps[i], d[i], side.token_weights[i])
            tokens.append([*zip(*columns, strict=True)][: int(side.lengths[i])])
        expected = PLAIN[name](*tokens, **settings)
        assert losses[i].item() == pytest.approx(expected.item(), rel=1e-12)
        expected.backward()
    for side, of_plain in ((data.chosen, plain.chosen), (data.rejected, plain.rejected)):
        torch.testing.assert_close(
            side.token_logps.grad, of_plain.token_logps.grad, rtol=1e-11, atol=1e-13
        )
        assert not (side.token_logps.grad * (padded(POLICY["chosen"]) < 0)).any()


def test_dpo_again_and_what_is_not():
    data = some_pairs({name: [[1] * len(row) for row in rows] for name, rows in WEIGHTS.items()})
    expected = bind("dpo", beta=0.3)(data)
    for loss in (bind("ld-dpo", beta=0.3, alpha=1.0), bind("tis-dpo", beta=0.3)):
        torch.testing.assert_close(loss(data).losses, expected.losses, rtol=1e-12, atol=0)
        assert torch.equal(loss(data).chosen_rewards, expected.chosen_rewards)
    # All tokens selected: SimPO without a margin.
    simpo = bind("simpo", beta=1.0, gamma=0.0)(data).losses
    torch.testing.assert_close(bind("sepo", beta=1.0)(data).losses, simpo, rtol=1e-12, atol=0)
    for name in ("sampo", "confpo"):
        assert (bind(name, beta=0.3)(data).losses - expected.losses).abs().max() > 1e-3
    assert (bind("tis-dpo", beta=0.3)(some_pairs()).losses - expected.losses).abs().min() > 1e-3


def test_confpo_learns_nothing_where_all_tokens_of_a_response_are_equally_sure():
    data = some_pairs()
    even = data.chosen.token_logps.detach().clone()
    even[1, :2] = math.log(0.25)
    data = replace(data, chosen=replace(data.chosen, token_logps=even))
    output = bind("confpo")(data)
    assert output.losses[1] == 0 < output.losses[0] and output.chosen_rewards[1] == 0
    assert bind("sepo")(some_pairs({n: [[0.0]] * 2 for n in WEIGHTS})).losses.tolist() == (
        pytest.approx([math.log(2)] * 2)
    )  # no token is selected


# ------------------------------------------------------------------------------- the draw of sampo


def two_sides(n_pairs: int, n_chosen: int, n_rejected: int, seed=0) -> Pair:
    generator = torch.Generator().manual_seed(seed)

    def side(n, other):
        values = torch.randn(n_pairs, n, generator=generator, dtype=torch.float64)
        return Side(
            policy_logps=values.sum(1),
            reference_logps=torch.zeros(n_pairs, dtype=torch.float64),
            lengths=torch.full((n_pairs,), float(n), dtype=torch.float64),
            token_logps=values,
            reference_token_logps=torch.zeros_like(values),
            tokens=torch.randint(0, 50_000, (n_pairs, n), generator=generator),
        )

    return Pair(side(n_chosen, n_rejected), side(n_rejected, n_chosen))


def kept_tokens(data: Pair, seed=0) -> torch.Tensor:
    """Which tokens of the chosen responses take part, (pairs, longest)."""
    chosen = replace(data.chosen, token_logps=data.chosen.token_logps.clone().requires_grad_())
    bind("sampo", beta=1.0, seed=seed)(replace(data, chosen=chosen)).losses.sum().backward()
    return chosen.token_logps.grad != 0


def test_sampo_draws_as_many_tokens_as_the_shorter_response_has_and_all_equally_often():
    data = two_sides(4000, 10, 4)
    kept = kept_tokens(data)
    assert (kept.sum(1) == 4).all()
    shares = kept.double().mean(0)
    error = math.sqrt(0.4 * 0.6 / 4000)
    assert (shares - 0.4).abs().max() < 4.5 * error
    # Pairs of places are drawn independently of where they are, too.
    both = (kept[:, 0] & kept[:, 1]).double().mean().item()
    expected = 4 * 3 / (10 * 9)
    assert abs(both - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 4000)
    assert kept_tokens(two_sides(5, 4, 9)).all()  # the shorter response keeps all


def test_the_draw_follows_seed_and_tokens_and_neither_order_nor_padding():
    data = two_sides(50, 12, 5)
    kept = kept_tokens(data)
    assert torch.equal(kept, kept_tokens(data)) and not torch.equal(kept, kept_tokens(data, seed=1))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))

    def changed(side, padding):
        fields = {
            n: getattr(side, n)[order] for n in ("policy_logps", "reference_logps", "lengths")
        }
        for name in ("token_logps", "reference_token_logps", "tokens"):
            values = getattr(side, name)[order]
            fields[name] = torch.cat([values, values.new_zeros(50, padding)], dim=1)
        return Side(**fields)

    moved = Pair(changed(data.chosen, 3), changed(data.rejected, 1))
    assert torch.equal(kept_tokens(moved)[:, :12], kept[order])
    alone = [bind("sampo")(pick(data, i)).losses.item() for i in range(50)]
    assert bind("sampo")(data).losses.tolist() == pytest.approx(alone, rel=1e-12)
    swapped = replace(data.chosen, tokens=data.chosen.tokens.flip(1))
    assert not torch.equal(kept_tokens(replace(data, chosen=swapped)), kept)


def pick(data: Pair, i: int) -> Pair:
    def side(one):
        return Side(**{n: v[i : i + 1] for n, v in vars(one).items() if v is not None})

    return Pair(side(data.chosen), side(data.rejected))


# ---------------------------------------------------------------------------- weights in the data


def row(prompt, chosen, rejected, **more):
    """A pair whose weights tell its tokens apart; a byte is a token of the test tokenizer."""
    weights = {
        f"{side}_token_weights": [1 + t / 8 + place for t in range(len(text) + 1)]
        for side, text, place in (("chosen", chosen, 0), ("rejected", rejected, 4))
    }
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | weights | more


ROWS = [
    row("one", " ab", " cde"),
    row("one", " cde", " f"),  # cde again, now with other weights
    row("two", " gh", " i"),
    row("three", " jklm", " n"),
]


def opened(tmp_path, rows=ROWS, name="data", **options):
    for split in ("train", "test"):
        write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    return open_dataset(str(tmp_path / name), "train", **options)


def stored(source, tmp_path, max_length=64):
    limits = {"max_length": max_length, "max_prompt_length": 8, "cache_dir": tmp_path / "cache"}
    return prepare(source, make_tokenizer(), **limits)


@pytest.fixture
def data(tmp_path):
    source = opened(tmp_path, token_weights=True)
    return PreferenceData([stored(source, tmp_path)], "pairs", "data")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_reach_the_loss_in_every_layout(data, layout):
    batch = collate(data, np.array([2, 0, 1]), Layout(layout, 257))
    by_response = batch.token_weights.split(batch.lengths.tolist())
    for i, example in enumerate([2, 0, 1]):
        for side, responses in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            expected = ROWS[example][f"{side}_token_weights"]
            assert by_response[responses[i]].tolist() == expected


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_layouts_and_parts_of_a_batch_agree(data, name):
    policy, reference = (Scorer(make_model("llama", seed=s, dtype=torch.float64)) for s in (0, 1))
    for scorer in (policy, reference):
        packed_models.enable(scorer.model)
    weight = policy.model.lm_head.weight
    loss = bind(name)

    def result(examples, layout):
        batch = collate(data, np.array(examples), Layout(layout, 257))
        output, metrics = compute_loss(loss, policy, reference, batch, data, "train")
        [gradient] = torch.autograd.grad(output.losses.sum(), weight)
        return output.losses.detach(), gradient, metrics

    whole = result([0, 1, 2, 3], "prefix_shared")
    assert whole[1].any()
    for layout in ("packed", "padded"):
        other = result([0, 1, 2, 3], layout)
        torch.testing.assert_close(other[0], whole[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(other[1], whole[1], rtol=1e-4, atol=1e-6)
    parts = [result(part, "prefix_shared") for part in ([3, 1], [0], [2])]
    losses = torch.cat([part[0] for part in parts])
    torch.testing.assert_close(losses, whole[0][[3, 1, 0, 2]], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(p[1] for p in parts), whole[1], rtol=1e-4, atol=1e-6)
    if "token_weights" in loss.reads:  # the control: with other weights it is another loss
        data.stores[0] = replace(data.stores[0], token_weights=data.stores[0].token_weights[::-1])
        data._numbers = {id(data.stores[0]): 0}
        assert not torch.allclose(result([0, 1, 2, 3], "padded")[0], whole[0], rtol=1e-4)


def test_weights_are_cut_with_their_response_and_belong_to_what_is_stored(tmp_path):
    long = stored(opened(tmp_path, token_weights=True), tmp_path)
    short = stored(opened(tmp_path, token_weights=True), tmp_path, max_length=8)
    begin, end = short.responses[-2]
    assert end - begin < 5 and short.cut[-2]  # of " jklm" and its end
    expected = ROWS[3]["chosen_token_weights"]
    assert short.token_weights[begin:end].tolist() == expected[: end - begin]
    # Those of the tokens that fit are enough.
    fitted = [*ROWS[:3], ROWS[3] | {"chosen_token_weights": expected[: end - begin]}]
    again = stored(opened(tmp_path, fitted, "fitted", token_weights=True), tmp_path, max_length=8)
    assert again.token_weights.tolist() == short.token_weights.tolist()
    # A run on other weights is not the same run.
    other = [*ROWS[:3], ROWS[3] | {"chosen_token_weights": [2.0] * 6}]
    changed = stored(opened(tmp_path, other, "other", token_weights=True), tmp_path)
    assert changed.counts["content"] != long.counts["content"]
    plain = stored(opened(tmp_path), tmp_path)  # no loss reads them
    assert plain.token_weights is None and len(plain.responses) < len(long.responses)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"chosen_token_weights": [1.0] * 9},
            "9 token weights for a response of 6 tokens, its end",
        ),
        ({"chosen_token_weights": [1, 1, "1", 1]}, r"weight 3: 'chosen_token_weights' is str '1'"),
        ({"rejected_token_weights": [1, -0.5, 1]}, r"weight 2: .* is -0.5, expected at least 0"),
        (
            {"rejected_token_weights": 1.0},
            "'rejected_token_weights' is float '1.0', expected a list",
        ),
        ({"rejected_token_weights": None}, "no 'rejected_token_weights'"),
    ],
)
def test_wrong_weights_are_refused_with_their_line(change, message, tmp_path):
    source = opened(tmp_path, [*ROWS[:3], ROWS[3] | change], token_weights=True)
    with pytest.raises(DataError, match=message) as error:
        stored(source, tmp_path)
    assert "train.jsonl:4" in str(error.value)


def test_data_without_weights_are_refused_before_a_model_loads(tmp_path):
    plain = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]
    opened(tmp_path, plain)
    for loss in ("tis-dpo", "sepo"):
        with pytest.raises(
            ConfigError, match=rf"{loss} needs token_weights.*scripts/token_weights"
        ):
            check_config(compose([f"loss={loss}", "model=tiny", f"datasets=[{tmp_path / 'data'}]"]))
    with pytest.raises(ConfigError, match="weights of tokens, which rollouts do not have"):
        check_config(
            compose(
                ["loss=sepo", "function=online", "model=tiny", "datasets=[imdb]", "reward=length"]
            )
        )
    data = PreferenceData([stored(opened(tmp_path, plain), tmp_path)], "pairs", "data")
    with pytest.raises(
        DataError, match=r"loss=sepo reads weights of tokens, which .* does not have"
    ):
        data.check_for(bind("sepo"))
    renamed = [{k.replace("_token_weights", "_weight"): v for k, v in r.items()} for r in ROWS]
    opened(tmp_path, renamed, "renamed")
    names = {f"{s}_token_weights": f"{s}_weight" for s in ("chosen", "rejected")}
    source = open_dataset(str(tmp_path / "renamed"), "train", token_weights=True, columns=names)
    assert stored(source, tmp_path).token_weights.any()


# --------------------------------------------------------------------------------------- the script


def test_the_methods_are_those_of_published_code():
    rewards = np.array([0.3, -1.2, 0.8, 0.05, -0.4, 2.0, 0.1])
    rank = token_weights.weights_of(rewards, "rank")
    assert rank.tolist() == pytest.approx([1.1, 0.7, 1.2, 0.9, 0.8, 1.3, 1.0])
    scale = token_weights.weights_of(rewards, "scale")
    assert scale.tolist() == pytest.approx([1.06, 0.76, 1.16, 1.01, 0.92, 1.3, 1.02])
    for share, best, worst in ((0.3, {5, 2}, {1, 4}), (0.5, {5, 2, 0}, {1, 4, 3})):
        for r, expected in ((rewards, best), (-rewards, worst)):
            assert set(np.flatnonzero(token_weights.weights_of(r, "top", share))) == expected
    assert [token_weights.weights_of(np.ones(1), m).tolist() for m in ("rank", "top")] == [[1], [1]]


@pytest.fixture(scope="module")
def weighing(tmp_path_factory):
    """Two models, data of pairs, and a call of the script."""
    folder = tmp_path_factory.mktemp("weighing")
    base = save_model(folder / "base")
    models = {"negative": make_model("llama", seed=0), "positive": make_model("llama", seed=5)}
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pt")
    plain = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in ROWS]
    for split in ("train", "test"):
        write_jsonl(folder / "data" / f"{split}.jsonl", plain)

    def call(monkeypatch, output, *more):
        arguments = [folder / "data", "--model", base, "--positive", folder / "positive.pt"]
        arguments += ["--output", output, "max_length=64", "max_prompt_length=32"]
        arguments += [f"cache_dir={folder / 'cache'}", *more]
        monkeypatch.setattr(sys, "argv", ["token_weights.py", *map(str, arguments)])
        token_weights.main()

    return call, models


def test_the_script_weighs_tokens_by_the_ratio_of_two_models(
    weighing, tmp_path, monkeypatch, capsys
):
    call, models = weighing
    output = tmp_path / "weighted"
    call(monkeypatch, output, "--method", "scale")
    assert f"{output}: 4 train pairs\n{output}: 4 test pairs\n" in capsys.readouterr().out
    lines = (output / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    assert [r["chosen"] for r in rows] == [r["chosen"] for r in ROWS]
    ids_of = make_tokenizer().encode
    prompt = [256, *ids_of("three")]  # behind BOS
    for side, sign in (("chosen", 1), ("rejected", -1)):
        response = [*ids_of(ROWS[3][side]), 256]
        ids = torch.tensor([prompt + response])
        of_models = [
            models[name](input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            for name in ("positive", "negative")
        ]
        ratio = (of_models[0] - of_models[1]).gather(1, torch.tensor(response)[:, None])[:, 0]
        expected = 0.7 + 0.6 * (sign * ratio.clamp(-1.5, 1.5) + 1.5) / 3
        assert rows[3][f"{side}_token_weights"] == pytest.approx(expected.tolist(), abs=2e-4)
    # The file is what a loss of tokens trains on.
    source = open_dataset(str(output), "train", token_weights=True)
    assert stored(source, tmp_path).token_weights.max() > 1
    with pytest.raises(SystemExit):
        call(monkeypatch, output, "--method", "rank")
    assert "exists; take another name" in capsys.readouterr().err


def test_pairs_with_an_empty_response_are_no_rows():
    record = Record("p", [" a", " ", " b"], [(0, 1), (0, 2)], 0, [2.0, 0.0, 1.0], {"n": [5, 6]}, "")
    rewards = [np.array([0.5, -0.5]), np.array([1.0]), np.array([0.25, 1.0])]
    [row] = token_weights.weighted_rows(record, rewards, "top", 0.5)
    assert row == {
        "prompt": "p",
        "chosen": " a",
        "chosen_token_weights": [1, 0],
        "score_chosen": 2.0,
        "rejected": " b",
        "rejected_token_weights": [1, 0],
        "score_rejected": 1.0,
        "n": 6,
    }


def test_the_script_writes_nothing_where_it_cannot_weigh(weighing, tmp_path, monkeypatch, capsys):
    call, _ = weighing
    for more, message in (
        (["--method", "top", "--share", "0"], "--share 0.0 must be above 0"),
        (["--method", "top", "--negative", tmp_path / "no.pt"], "no such file or folder"),
    ):
        with pytest.raises(SystemExit):
            call(monkeypatch, tmp_path / "out", *more)
        assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_no_loss_of_tokens_is_left_out():
    listed = {name for name, *_ in PUBLISHED}
    registered = {
        n
        for n, s in token_losses.register_loss.__globals__["LOSSES"].items()
        if s.function.__module__ == "token_losses"
    }
    assert listed == registered == set(PLAIN)
