"""Samples are the policy's, whatever its folder says beside its weights, and where they end."""

import copy
import itertools
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer, save_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from preflab.batching.chat import response_text
from preflab.batching.examples import PromptToSample
from preflab.distributed.process_group import ALONE, World
from preflab.evaluation import samples
from preflab.modeling import decoding, generation, kv_cache
from preflab.modeling.generation import InverseCDF, sample
from preflab.modeling.logprobs import Scorer
from preflab.modeling.response_ends import ResponseEnds, response_ends
from preflab.online.measures import RoundMeasures
from utils import ConfigError

PROMPT, N = [256, *b"abab"], 12
EVEN = list(range(0, 256, 2))

IGNORED = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": EVEN},
    "begin_suppress_tokens": {"begin_suppress_tokens": EVEN},
    "bad_words": {"bad_words_ids": [[token] for token in EVEN]},
    "sequence_bias": {"sequence_bias": [[[98], 100.0]]},
    "forced_eos": {"forced_eos_token_id": 256},
    "decay": {"exponential_decay_length_penalty": [0, 100.0]},
    "beams": {"num_beams": 3},
    "beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "sequences": {"num_beams": 3, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "high"},
    "guidance": {"guidance_scale": 3.0},
    "stop_strings": {"stop_strings": ["a"]},
    "max_time": {"max_time": 1e-9},
    "dict": {"return_dict_in_generate": True, "output_scores": True},
    "use_cache": {"use_cache": False},
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_values(source, folder, values, file="generation_config.json"):
    """A copy of a model folder with further values in one of its JSON files."""
    shutil.copytree(source, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def draw(model, **options):
    prompts = [PROMPT, [256], [256, *b"another prompt"]]
    return sample(
        Scorer(model), make_tokenizer(), prompts, keys=range(3), max_new_tokens=N, **options
    )


def drawn_by_transformers(model):
    """A greedy response by `generate` with the model's own generation config."""
    ids = torch.tensor([PROMPT])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N,
        do_sample=False,
        past_key_values=DynamicCache(config=model.config),
        pad_token_id=257,
    )[0].tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain") / "model", "llama")


@pytest.fixture(scope="module")
def plain_samples(plain):
    model = load(plain)
    return draw(model), draw(model, temperature=0), drawn_by_transformers(model)


@pytest.mark.parametrize("name", IGNORED)
def test_a_generation_config_changes_no_sample(plain, plain_samples, tmp_path, name):
    model = load(with_values(plain, tmp_path / "model", IGNORED[name]))
    own = model.generation_config
    assert (draw(model), draw(model, temperature=0)) == plain_samples[:2]
    assert model.generation_config is own  # exported folders keep it
    try:
        theirs = drawn_by_transformers(model)
    except ValueError:
        assert name in ("beam_groups", "contrastive", "dola", "stop_strings")  # refused
        return
    assert theirs != plain_samples[2]


@pytest.mark.parametrize("values", [{"min_new_tokens": N}, {"min_length": N + len(PROMPT)}])
def test_a_response_may_end_before_the_minimum_of_the_model(plain, tmp_path, values):
    free, held = load(plain), load(with_values(plain, tmp_path / "model", values))
    for model in (free, held):
        with torch.no_grad():
            model.lm_head.weight[256] = model.lm_head.weight[:256].mean(0)
            model.lm_head.weight.mul_(0.05)  # every token, and the end, about equally likely
    prompts = [PROMPT] * 200
    options = {"keys": range(200), "max_new_tokens": N, "batch_size": 200}
    ours, theirs = (sample(Scorer(m), make_tokenizer(), prompts, **options) for m in (free, held))
    assert ours == theirs and any(len(response) < N for response in ours)
    [generated] = {
        held.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT)),
            max_new_tokens=N,
            do_sample=False,
            pad_token_id=257,
            logits_processor=LogitsProcessorList([_EndNow()]),
        ).shape[1]
    }
    assert generated == N + len(PROMPT)


class _EndNow:
    """Makes the end by far the likeliest token."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([256]), 1e4).where(scores > -torch.inf, scores)


def test_use_cache_false_in_the_model_config_changes_no_sample(plain, plain_samples, tmp_path):
    folder = with_values(plain, tmp_path / "model", {"use_cache": False}, "config.json")
    for keeps_generation_config in (True, False):
        if not keeps_generation_config:
            (folder / "generation_config.json").unlink()
        assert draw(load(folder)) == plain_samples[0]


def test_ignored_values_are_logged_once(plain, tmp_path, caplog):
    caplog.set_level(logging.INFO, "preflab")
    generation._log_ignored.cache_clear()
    draw(load(plain))
    assert not caplog.messages
    values = {"repetition_penalty": 1.1, "do_sample": True, "use_cache": False, "num_beams": 1}
    model = load(with_values(plain, tmp_path / "model", values))
    for _ in range(2):
        draw(model)
    [message] = caplog.messages
    assert message.endswith("{'do_sample': True, 'repetition_penalty': 1.1, 'use_cache': False}")
    draw(load(with_values(plain, tmp_path / "greedy", {"temperature": 0.0})))
    assert caplog.messages[-1].endswith("{'temperature': 0.0}")


# ------------------------------------------------------------------------------------------- ends


def ends_of(model, ids):
    model.generation_config.eos_token_id = ids
    return response_ends(make_tokenizer(), model).tokens


def test_end_tokens_are_those_of_tokenizer_and_model(plain):
    model = load(plain)
    assert ends_of(model, None) == ends_of(model, 256) == ends_of(model, [256]) == (256,)
    assert ends_of(model, 7) == ends_of(model, [7, 256, 7]) == (256, 7)


@pytest.mark.parametrize("ids", ["256", [256, "7"], [True], 2.5])
def test_an_end_token_that_is_no_id_is_refused(plain, ids):
    with pytest.raises(ConfigError, match="expected the id of a token, or a list of ids"):
        ends_of(load(plain), ids)


def test_end_tokens_of_a_config_count_where_a_generation_config_has_none(plain):
    tokenizer, model = make_tokenizer(), load(plain)
    model.generation_config.eos_token_id, model.config.eos_token_id = None, [65, 256]
    assert set(response_ends(tokenizer, model).tokens) == {65, 256}
    model.config.eos_token_id = 2  # a default of the class
    assert response_ends(tokenizer, model).tokens == (256,)
    model.generation_config.eos_token_id, model.config.eos_token_id = 66, [65, 256]
    assert set(response_ends(tokenizer, model).tokens) == {66, 256}


def test_ended():
    ends = ResponseEnds((256, 2))
    assert ends.ended([1, 2]) and ends.ended([256])
    assert not ends.ended([2, 1]) and not ends.ended([])


def test_a_response_ends_at_the_first_of_several_end_tokens(plain, tmp_path):
    """It is the response of a model with one end token, cut."""
    prompts, keys = [[256, a] for a in range(97, 117)], range(20)
    options = {"keys": keys, "max_new_tokens": 40, "batch_size": 7}
    free = sample(Scorer(load(plain)), make_tokenizer(), prompts, **options)
    ends = (256, *range(40, 50))
    folder = with_values(plain, tmp_path / "model", {"eos_token_id": [*range(40, 50)]})
    cut = sample(Scorer(load(folder)), make_tokenizer(), prompts, **options)
    for whole, response in zip(free, cut, strict=True):
        assert whole[: len(response)] == response
        assert not any(token in ends for token in response[:-1])
        assert response[-1] in ends or len(response) == 40
    last = {response[-1] for response in cut if response[-1] in ends}
    assert len(last - {256}) > 1
    assert any(len(response) < len(whole) for whole, response in zip(free, cut, strict=True))


def test_a_response_ends_at_an_end_of_turn_that_is_text(plain):
    """It is the response without such an end, cut where the text is complete; the text is left out
    of what rewards read."""
    prompts, keys = [[256, a] for a in range(97, 117)], range(20)
    options = {"keys": keys, "max_new_tokens": 40, "batch_size": 7}
    free = sample(Scorer(load(plain)), make_tokenizer(), prompts, **options)
    seen = make_tokenizer().decode([token for response in free for token in response[:20]])
    end = next(a for a in seen if a.isalpha() and a.isascii())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}: {{ m['content'] }}" + end + "\n{% endfor %}"
    cut = sample(Scorer(load(plain)), tokenizer, prompts, **options)
    ends = response_ends(tokenizer, load(plain))
    n_by_text = 0
    for whole, response in zip(free, cut, strict=True):
        text = tokenizer.decode(whole, skip_special_tokens=True)
        if end not in text:
            assert response == whole
            continue
        n_by_text += 1
        assert response == whole[: len(response)] and ends.ended(response)
        assert tokenizer.decode(response) == text[: text.index(end) + 1]
        assert response_text(tokenizer, response) == text[: text.index(end)]
    assert n_by_text > 0
    assert cut == sample(  # several samples of a prompt, whose prompt is read once
        Scorer(load(plain)), tokenizer, [p for p in prompts for _ in "ab"],
        keys=[(key, i) if i else key for key in keys for i in range(2)],
        max_new_tokens=40, batch_size=8,
    )[::2]  # fmt: skip


def test_the_flags_of_samples_and_of_rollouts_count_every_end_token(plain):
    model = load(plain)
    ends = ends_of(model, [*range(100)])
    prompts = [PromptToSample(tokens=[256, a], chosen=[256], key=a) for a in range(97, 117)]
    sampling = samples.Sampling(
        n=20,
        k=1,
        max_prompt_length=8,
        max_new_tokens=3,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        min_p=None,
        seed=0,
        batch_size=20,
    )
    args = (Scorer(model), make_tokenizer(), prompts, {}, sampling, ALONE)
    drawn = samples._draw(*args, None, of="policy")
    assert drawn.ended == [response[-1] in ends for response in drawn.tokens]
    assert set(drawn.ended) == {False, True}
    learner = SimpleNamespace(tokenizer=make_tokenizer(), policy=Scorer(model))
    measures = SimpleNamespace(learner=learner)
    rollouts = SimpleNamespace(tokens=[[response] for response in drawn.tokens])
    assert RoundMeasures._lengths(measures, rollouts)["ended"] == drawn.ended


# ------------------------------------------------------------------------------- top_k and min_p


def chosen_tokens(logits, **options):
    """The tokens that an even grid of random numbers selects, for each row of logits."""
    grid = (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5) / 2000
    draw_all = InverseCDF(grid, **{"temperature": 1.0, "top_p": 1.0, "prompt_width": 0} | options)
    return draw_all(torch.zeros(2000, 0), logits.expand(2000, -1)).argmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.3},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_the_drawn_distribution_is_that_of_the_warpers_of_transformers(options):
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(3)) * 1.5
    warped = logits
    for name, warper in {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }.items():
        if name in options:
            warped = warper(options[name])(None, warped)
    counts = torch.bincount(chosen_tokens(logits, **options), minlength=20)
    assert ((counts / 2000 - warped.softmax(-1)[0]).abs() <= 1.5 / 2000).all()
    assert (counts[warped[0].isinf()] == 0).all()


def test_top_k_and_min_p_are_off_by_default(plain):
    model = load(plain)
    assert draw(model) == draw(model, top_k=None, min_p=None)
    assert draw(model, top_k=1) == draw(model, min_p=1.0) == draw(model, temperature=0)
    assert draw(model, top_k=3) != draw(model)


# ------------------------------------------------------------------------- K samples of a prompt


def make_recurrent():
    """A model whose cache also holds states, which cannot be copied row by row."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        pad_token_id=257,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def draw_and_count(model, prompts, keys, **options):
    """The samples, and how many positions the model read in passes over prompts."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    drawn = sample(Scorer(model), make_tokenizer(), prompts, keys=keys, max_new_tokens=N, **options)
    hook.remove()
    return drawn, sum(rows * columns for rows, columns in shapes if columns > 1)


LENGTHS = (1, 3, 30, 31)  # beyond the window of mistral and qwen2, which is 16
SEVERAL = [[256, *[97 + i] * (n - 1)] for i, n in enumerate(LENGTHS)]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "qwen2", "bloom"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.9}])
def test_k_samples_read_the_prompt_once_and_are_those_drawn_alone(architecture, options):
    model = make_bloom() if architecture == "bloom" else make_model(architecture)
    prompts, keys = zip(
        *[(p, (i, j)) for i, p in enumerate(SEVERAL) for j in range(4)], strict=True
    )
    drawn, n_read = draw_and_count(model, prompts, keys, batch_size=8, **options)
    assert n_read == 2 * 2 + 2 * 30  # two batches of two prompts, without their last column
    alone = [
        draw_and_count(model, [prompt], [key], **options)[0][0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    assert drawn == alone
    assert len(set(map(tuple, drawn))) > 12
    shuffled = [*range(0, 16, 3), *range(1, 16, 3), *range(2, 16, 3)]
    again, n_again = draw_and_count(
        model, [prompts[i] for i in shuffled], [keys[i] for i in shuffled], batch_size=8, **options
    )
    assert again == [drawn[i] for i in shuffled] and n_again == n_read


def make_bloom():
    """Its positions come from the attention mask."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bloom", vocab_size=258, hidden_size=32, n_layer=2, n_head=2, pad_token_id=257
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)
    return model


def test_a_prompt_with_one_sample_takes_the_plain_path():
    model = make_model("llama")
    drawn, n_read = draw_and_count(model, SEVERAL, range(4), batch_size=2)
    assert n_read == 2 * 3 + 2 * 31
    again, _ = draw_and_count(model, SEVERAL * 2, [*range(4), *range(10, 14)], batch_size=2)
    assert again[:4] == drawn and again[4:] != drawn


def test_models_with_another_cache_read_every_row():
    model = make_recurrent()
    assert kv_cache.make_cache(model) is None
    prompts = [[256, *b"abc"]] * 3
    drawn, n_read = draw_and_count(model, prompts, range(3))
    assert n_read == 3 * 4
    assert drawn == [draw_and_count(model, prompts[:1], [key])[0][0] for key in range(3)]


@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("size, peers", [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_batches_hold_whole_prompts_and_ranks_run_equally_often(k, size, peers):
    """With one sample of a prompt, batches are those of World.batches; four rows fit into one."""
    prompts = [[256] * (1 + i % 3) + [i] for i in range(5) for _ in range(k)]
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    seen, counts, flags = [], [], []
    for rank in range(size):
        world = World(rank, size, peers=peers)
        batches = list(generation._batches(prompts, 4, world))
        counts.append(len(batches))
        flags.append([repeated for *_, repeated in batches])
        flat = [(list(itertools.chain(*groups)), n) for groups, n, _ in batches]
        assert all(1 <= len(rows) <= 4 and n in (0, len(rows)) for rows, n in flat)
        if k == 1:
            assert flat == list(world.batches(by_length, 4))
        if rank % peers == 0:
            seen += [rows for rows, n in flat if n]
    assert sorted(i for rows in seen for i in rows) == list(range(5 * k))
    assert len(set(counts)) == 1 and flags == [[k > 1] * counts[0]] * size
    for number in range(5):
        of_prompt = set(range(number * k, (number + 1) * k))
        assert sum(not of_prompt.isdisjoint(rows) for rows in seen) == (2 if k == 7 else 1)


def test_ranks_agree_on_whether_prompts_repeat():
    prompts = [[1], [2, 2], [3, 3, 3], [3, 3, 3]]
    batches = [list(generation._batches(prompts, 2, World(rank, 2))) for rank in range(2)]
    assert batches[0] == [([[0]], 1, False), ([[2, 3]], 2, True)]
    assert batches[1] == [([[1]], 1, False), ([[0]], 0, True)]


# ------------------------------------------------------------------------- batches that change


@pytest.fixture
def changing(monkeypatch):
    """Batches of small models change too. Gets the number of rows of each call of `generate`."""
    monkeypatch.setattr(decoding, "SMALLEST_STEP", 0)
    sizes, decode = [], decoding.Decoder._decode

    def counted(decoder, enough):
        sizes.append(len(decoder.rows))
        return decode(decoder, enough)

    monkeypatch.setattr(decoding.Decoder, "_decode", counted)
    return sizes


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize(
    "architecture, options",
    [
        *((name, {}) for name in ("gpt2", "llama", "bloom", "gptj", "gemma2")),
        ("llama", {"temperature": 0}),
        ("gpt2", {"temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_rows_that_end_make_room_and_every_sample_is_the_one_drawn_alone(
    changing, architecture, k, options
):
    model = make_bloom() if architecture == "bloom" else make_model(architecture)
    model.generation_config.eos_token_id = EVEN[:32]  # lengths differ
    prompts, keys = zip(
        *[([256, *[97 + i] * (7 * i % 13)], (i, j)) for i in (3, 0, 5, 1, 2, 4) for j in range(k)],
        strict=True,
    )

    def draw(numbers, **more):
        return sample(
            Scorer(model),
            make_tokenizer(),
            [prompts[i] for i in numbers],
            keys=[keys[i] for i in numbers],
            max_new_tokens=N,
            **options,
            **more,
        )

    hidden: list = []
    drawn = draw(range(len(keys)), batch_size=4, hidden=hidden)
    windowed = kv_cache.make_cache(model).layers[0].is_sliding
    assert max(changing) <= 4 and (windowed or len(changing) > len(keys) / 4)
    alone = [draw([i])[0] for i in range(len(keys))]
    assert drawn == alone
    lengths = set(map(len, drawn))
    assert len(lengths) > 2 or options.get("temperature") == 0
    assert [len(states) for states in hidden] == list(map(len, drawn))


@pytest.mark.parametrize(
    "limit", ["max_position_embeddings", "max_seq_len", "original_max_position_embeddings"]
)
def test_rows_do_not_join_where_their_columns_could_pass_the_positions_of_a_model(changing, limit):
    model = make_model("llama")
    model.generation_config.eos_token_id = EVEN[:32]
    prompts = [[256, 97, 97 + i] for i in range(12)]
    for most, joins in ((3 + 2 * N - 1, False), (3 + 2 * N, True)):
        changing.clear()
        setattr(model.config, limit, most)
        options = {"keys": range(12), "max_new_tokens": N, "batch_size": 4}
        sample(Scorer(model), make_tokenizer(), prompts, **options)
        assert (len(changing) > 3) is joins


def test_a_model_that_drops_its_cache_is_refused_before_a_wrong_token(changing, monkeypatch):
    """As a model does that replaces the cache it was given."""
    model = make_model("llama")
    model.generation_config.eos_token_id = EVEN[:32]
    generate, prompts = model.generate, [[256, 97, 97 + i] for i in range(12)]

    def replaces(**inputs):
        cache = inputs["past_key_values"]
        return generate(**inputs | {"past_key_values": copy.deepcopy(cache)})

    monkeypatch.setattr(decoding, "_read_prompts", lambda *arguments, **options: None)
    monkeypatch.setattr(model, "generate", replaces)
    options = {"keys": range(12), "max_new_tokens": N}
    with pytest.raises(RuntimeError, match=r"has 0 of .* positions after sampling.* size of 1"):
        sample(Scorer(model), make_tokenizer(), prompts, batch_size=4, **options)
    assert len(sample(Scorer(model), make_tokenizer(), prompts, batch_size=1, **options)) == 12
