"""Tokenising, truncating, ordering and collating, against small cases worked out by hand."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tokenizer

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData, prompts_to_sample
from preflab.batching.loader import Loader, epoch_order
from preflab.batching.microbatches import split_step
from preflab.batching.packing import LAYOUTS, Layout
from preflab.batching.summary import describe_data
from preflab.batching.token_store import prepare, tokenise
from preflab.batching.truncation import truncate
from preflab.readers.messages import Chat
from preflab.readers.records import Record
from scripts.data_checks import render_prompt
from utils import DataError

EOS = BOS = 256
PAD = 257
PADDED = Layout("padded", PAD, last_tokens=True)


class FakeSource:
    """A dataset split made of given records; counts how often it is read."""

    def __init__(self, records, truncation="keep_start", version="1"):
        self.name, self.split, self.truncation, self.version = "fake", "train", truncation, version
        self.content, self.reads = records, 0
        self.counts = {"rows": len(records), "pairs": 0, "skipped": {}}

    def fingerprint(self):
        return self.version + repr(self.content)

    def records(self):
        self.reads += 1
        yield from self.content


def record(
    prompt="ab",
    responses=("x", "yz"),
    pairs=((1, 0),),
    scores=(0.5, 2.0),
    target=1,
    columns=None,
    source="f.jsonl:1",
):
    scores = list(scores) if scores else None
    return Record(prompt, list(responses), list(pairs), target, scores, columns or {}, source)


def store_of(tmp_path, records, *, max_length=64, max_prompt_length=32, **options):
    return prepare(
        FakeSource(records, **options),
        make_tokenizer(),
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        cache_dir=tmp_path,
    )


def pairs_of(tmp_path, records, **options):
    return PreferenceData([store_of(tmp_path, records, **options)], "pairs", "fake")


def ids(text):
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


# ----------------------------------------------------------------------------------- tokens on disk


def test_store_holds_bos_prompt_and_responses_with_eos(tmp_path):
    store = store_of(tmp_path, [record(), record("c", ("only",), (), None, 0)])
    (p0, p1), (r0, r1, r2) = store.prompts, store.responses
    assert store.tokens[slice(*p0)].tolist() == [BOS, *ids("ab")]
    assert store.tokens[slice(*r0)].tolist() == [*ids("x"), EOS]
    assert store.tokens[slice(*r1)].tolist() == [*ids("yz"), EOS]
    assert store.tokens[slice(*p1)].tolist() == [BOS, *ids("c")]
    assert store.tokens[slice(*r2)].tolist() == [*ids("only"), EOS]
    assert store.pairs.tolist() == [[1, 0]] and store.targets.tolist() == [1, 2]
    assert store.scores[:2].tolist() == [0.5, 2.0] and np.isnan(store.scores[2])
    assert store.response_prompt.tolist() == [0, 0, 1]


def test_second_start_reads_the_cache_and_a_changed_file_does_not(tmp_path):
    options = {"max_length": 64, "max_prompt_length": 32, "cache_dir": tmp_path}
    first, again = FakeSource([record()]), FakeSource([record()])
    changed = FakeSource([record("other")])
    a, b = prepare(first, make_tokenizer(), **options), prepare(again, make_tokenizer(), **options)
    assert (first.reads, again.reads) == (1, 0)
    assert np.array_equal(a.tokens, b.tokens) and a.counts == b.counts
    assert isinstance(b.tokens, np.memmap)
    prepare(changed, make_tokenizer(), **options)
    shorter = FakeSource([record()])
    prepare(shorter, make_tokenizer(), **(options | {"max_length": 50}))
    assert (changed.reads, shorter.reads) == (1, 1)


def test_a_reader_that_fails_leaves_nothing_behind(tmp_path):
    class Broken(FakeSource):
        def records(self):
            yield self.content[0]
            raise DataError("f.jsonl:2: broken")

    options = {"max_length": 64, "max_prompt_length": 32, "cache_dir": tmp_path}
    with pytest.raises(DataError, match=r"f\.jsonl:2"):
        prepare(Broken([record()]), make_tokenizer(), **options)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_no_prompt_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable prompt"):
        store_of(tmp_path, [])


# --------------------------------------------------------------------------------------- truncation


def cut(prompt, responses, truncation="keep_start", max_length=10, max_prompt_length=4):
    prompt, responses = list(range(prompt)), [list(range(n)) for n in responses]
    return truncate(prompt, responses, make_tokenizer(), truncation, max_length, max_prompt_length)


def test_nothing_is_cut_when_all_fits():
    prompt, responses, cuts = cut(5, [3, 1])  # 1 + 5 + 3 + 1 = 10
    assert prompt == [BOS, 0, 1, 2, 3, 4] and responses == [[0, 1, 2, EOS], [0, EOS]]
    assert cuts == (False, [False, False])


@pytest.mark.parametrize("truncation, rest", [("keep_start", [0, 1, 2]), ("keep_end", [3, 4, 5])])
def test_the_prompt_is_cut_first_and_keeps_its_bos(truncation, rest):
    prompt, responses, cuts = cut(6, [3, 1], truncation)
    assert prompt == [BOS, *rest] and responses == [[0, 1, 2, EOS], [0, EOS]]
    assert cuts == (True, [False, False])


def test_only_a_response_that_was_cut_loses_its_eos():
    prompt, responses, cuts = cut(6, [9, 6, 5, 2])
    assert len(prompt) == 4
    assert responses == [list(range(6)), list(range(6)), [0, 1, 2, 3, 4, EOS], [0, 1, EOS]]
    assert cuts == (True, [True, True, False, False])  # of the second, EOS itself did not fit


def test_a_short_prompt_leaves_its_room_to_the_responses():
    prompt, responses, cuts = cut(2, [20])
    assert prompt == [BOS, 0, 1] and len(responses[0]) == 7
    assert cuts == (False, [True])


def test_counts_of_what_was_cut(tmp_path):
    records = [record("p" * 20, ("x" * 30, "y")), record()]
    store = store_of(tmp_path, records, max_length=16, max_prompt_length=8)
    assert (store.counts["truncated_prompts"], store.counts["truncated_responses"]) == (1, 1)


# ------------------------------------------------------------------------------------------ prompts


def test_chat_messages_go_through_the_template_with_one_bos():
    tokenizer = make_tokenizer()
    chat = record(Chat([{"role": "user", "content": "hi"}]))
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(chat, tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    bos = tokenizer.bos_token
    assert render_prompt(chat, tokenizer) == f"{bos}[user]hi[assistant]"
    (prompt,), *_ = tokenise([chat], tokenizer)
    prompt, *_ = truncate(prompt, [[1]], tokenizer, "keep_end", 99, 99, chat=True)
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_prompts_to_sample_are_distinct_cut_and_the_same_for_every_seed(tmp_path):
    records = [record("p" * 40 + str(i), pairs=((1, 0), (0, 1))) for i in range(9)]
    data = pairs_of(tmp_path, records, truncation="keep_end")
    prompts = prompts_to_sample(data, 5, max_prompt_length=10)
    assert len({p.key for p in prompts}) == 5
    for p in prompts:
        assert p.tokens == [BOS, *ids("p" * 8 + str(p.key))]
    assert [p.key for p in prompts] == [p.key for p in prompts_to_sample(data, 9, 10)][:5]


# -------------------------------------------------------------------------------------------- order


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    groups = np.repeat(np.arange(10), 3)
    orders = {key: epoch_order(groups, *key).tolist() for key in ((0, 0), (0, 1), (1, 0))}
    assert all(sorted(order) == list(range(30)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    assert epoch_order(groups, 0, 0).tolist() == orders[0, 0]


def smallest_distance(order, groups):
    """How close two examples of a group come in an order."""
    place = np.argsort(order)
    return min(np.diff(np.sort(place[groups == g])).min() for g in np.unique(groups))


def test_pairs_of_one_prompt_are_spread_out():
    groups = np.repeat(np.arange(25), 4)
    for seed in range(5):
        # 100 pairs, 4 for each prompt: 25 apart, but for rounding.
        assert smallest_distance(epoch_order(groups, seed, 0), groups) >= 15
    assert smallest_distance(np.random.default_rng(0).permutation(100), groups) < 15  # the control


def test_which_pair_of_a_prompt_comes_first_is_random():
    firsts = {int(epoch_order(np.zeros(6, dtype=int), seed, 0)[0]) for seed in range(40)}
    assert len(firsts) == 6


def loader(n=10, **options):
    defaults = {"batch_size": 4, "seed": 0, "n_epochs": 1, "n_examples": None}
    return Loader(np.arange(n), **(defaults | options))


def test_every_example_once_an_epoch_the_last_partial_batch_included():
    batches = [b.tolist() for b in loader(n_epochs=2)]
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(10))
    assert batches[:3] != batches[3:]


@pytest.mark.parametrize(
    "n_epochs, n_examples, total", [(1, 7, 7), (None, 13, 13), (1, 30, 10), (3, None, 30)]
)
def test_stops_at_whichever_limit_comes_first(n_epochs, n_examples, total):
    batches = loader(n_epochs=n_epochs, n_examples=n_examples)
    assert batches.total == total == sum(len(b) for b in batches)


@pytest.mark.parametrize("stop", range(7))
def test_state_of_a_few_integers_resumes_anywhere(stop):
    whole, first, second = loader(n_epochs=2), loader(n_epochs=2), loader(n_epochs=2)
    before = [next(first).tolist() for _ in range(min(stop, 6))]
    state = json.loads(json.dumps(first.state_dict()))
    assert all(isinstance(v, int) for v in state.values())
    second.load_state_dict(state)
    assert before + [b.tolist() for b in second] == [b.tolist() for b in whole]


def test_seed_changes_the_order():
    assert [b.tolist() for b in loader(seed=0)] != [b.tolist() for b in loader(seed=1)]


def test_order_prompts_keeps_the_pairs_of_a_prompt_together():
    groups = np.tile(np.arange(20), 3)
    order = epoch_order(groups, 0, 0, "prompts")
    assert sorted(order) == list(range(60))
    assert [len(set(groups[order[i : i + 3]])) for i in range(0, 60, 3)] == [1] * 20
    assert groups[order].tolist() != sorted(groups.tolist())  # prompts are shuffled
    assert order.tolist() == epoch_order(groups, 0, 0, "prompts").tolist()
    assert order.tolist() != epoch_order(groups, 1, 0, "prompts").tolist()


def test_the_next_step_is_prepared_ahead_and_the_state_is_that_of_what_was_used():
    prepared, whole = [], [b.tolist() for b in loader(n_epochs=2)]

    def prepare(indices):
        prepared.append(indices.tolist())
        return indices.sum()

    ahead = loader(n_epochs=2)
    for i, (indices, total) in enumerate(ahead.ahead(prepare)):
        assert indices.tolist() == whole[i] and total == sum(whole[i])
        assert ahead.examples == sum(map(len, whole[: i + 1]))
        rest = loader(n_epochs=2)
        rest.load_state_dict(ahead.state_dict())
        assert [b.tolist() for b in rest] == whole[i + 1 :]
    assert prepared == whole


def test_an_error_in_preparation_reaches_the_step_it_belongs_to():
    def prepare(indices):
        if 0 in indices:
            raise DataError("bad example")

    with pytest.raises(DataError, match="bad example"):
        list(loader().ahead(prepare))


# ------------------------------------------------------------------------------------- microbatches


def uneven_data(tmp_path, n_prompts=9):
    """Prompts of several lengths with three responses and three pairs each."""
    every = ((0, 1), (0, 2), (1, 2))
    records = [
        record("p" * (1 + 3 * i % 17), ["a" * (i + 1), "b" * 3, "c" * (20 - i)], every, None)
        for i in range(n_prompts)
    ]
    return pairs_of(tmp_path, records)


def tokens_of(data, examples, layout):
    return collate(data, examples, layout).n_tokens if len(examples) else 0


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize(
    "ranks, at_least, tokens", [(1, 1, None), (1, 3, None), (1, 1, 120), (2, 1, 100), (3, 2, None)]
)
def test_microbatches_hold_every_example_of_a_step_once(
    tmp_path, name, grouping, ranks, at_least, tokens
):
    data, examples = uneven_data(tmp_path), np.random.default_rng(0).permutation(27)
    layout = Layout(name, PAD)
    options = {"ranks": ranks, "at_least": at_least, "tokens": tokens, "grouping": grouping}
    parts = split_step(data, examples, layout, **options)
    assert len(parts) == ranks and len({len(of_rank) for of_rank in parts}) == 1
    assert sorted(int(e) for of_rank in parts for part in of_rank for e in part) == list(range(27))
    assert len(parts[0]) >= min(at_least, 9)
    for of_rank, again in zip(parts, split_step(data, examples, layout, **options), strict=True):
        assert [part.tolist() for part in of_rank] == [part.tolist() for part in again]
    if name == "prefix_shared":
        homes = [{int(data.groups[e]) for e in part} for of_rank in parts for part in of_rank]
        assert sum(map(len, homes)) == len(set.union(*homes))  # no prompt in two microbatches
    if grouping and name != "padded":
        sizes = [tokens_of(data, part, layout) for of_rank in parts for part in of_rank]
        assert max(sizes) - min(sizes) < 60  # one prompt with its responses
    if tokens is None:
        assert len(parts[0]) == at_least


def test_grouping_by_length_saves_padding(tmp_path):
    data, examples = uneven_data(tmp_path), np.random.default_rng(0).permutation(27)
    layout = Layout("padded", PAD)

    def padded(grouping):
        parts = split_step(data, examples, layout, ranks=1, at_least=6, grouping=grouping)[0]
        return sum(collate(data, part, layout).input_ids.numel() for part in parts if len(part))

    assert padded(True) < 0.9 * padded(False)


def test_padding_counts_towards_the_size_of_a_microbatch(tmp_path):
    """One long pair among short ones: a microbatch by real tokens alone would be mostly padding."""
    records = [record("p" * 5, ["a" * n, "b" * n], ((0, 1),), None) for n in (50, *[5] * 30)]
    data, layout = pairs_of(tmp_path, records), Layout("padded", PAD)
    for grouping in (True, False):
        parts = split_step(data, np.arange(31), layout, ranks=1, tokens=400, grouping=grouping)[0]
        assert all(len(part) for part in parts)
        assert max(collate(data, part, layout).input_ids.numel() for part in parts) <= 400


def test_fewer_prompts_than_ranks_leave_a_rank_empty(tmp_path):
    data = uneven_data(tmp_path, n_prompts=1)
    parts = split_step(data, np.arange(3), Layout("prefix_shared", PAD), ranks=2, at_least=4)
    assert sorted(len(part) for of_rank in parts for part in of_rank) == [0, 3]
    assert [len(of_rank) for of_rank in parts] == [1, 1]


# ------------------------------------------------------------------------------------------ batches


def test_batch_says_where_each_scored_token_is_predicted_and_who_owns_it(tmp_path):
    data = pairs_of(tmp_path, [record(), record("longer", ("q", "rst"), ((0, 1),))])
    batch = collate(data, np.array([0, 1]), PADDED)
    rows, width = batch.input_ids.shape
    assert (rows, width) == (4, 11)
    expected = [[*ids(text), EOS] for text in ("yz", "x", "q", "rst")]
    flat = batch.input_ids.reshape(-1)
    for r, tokens in enumerate(expected):
        own = batch.owners == r
        positions = batch.positions[own]
        assert batch.targets[own].tolist() == tokens
        assert flat[positions + 1].tolist() == tokens  # predicted one place before its own
        assert (positions // width).unique().tolist() == [r]
        assert batch.ends[r].item() == positions[-1].item() + 1
    assert batch.lengths.tolist() == [3, 2, 2, 4]
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 2], [1, 3])
    assert batch.scores.tolist() == [2.0, 0.5, 0.5, 2.0]
    assert batch.attention_mask.sum(1).tolist() == [6, 5, 9, 11]
    assert batch.n_tokens == 31
    assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()


def test_masks_come_from_lengths_not_from_ids(tmp_path):
    """A response that holds the EOS and pad ids in its text is scored in full."""
    text = "a<|endoftext|>b<|pad|>c"
    data = pairs_of(tmp_path, [record("p", (text, "x"), ((0, 1),))])
    batch = collate(data, np.array([0]), PADDED)
    assert EOS in ids(text) and PAD in ids(text)
    assert batch.targets[batch.owners == 0].tolist() == [*ids(text), EOS]
    assert batch.attention_mask[0].sum() == 2 + len(ids(text)) + 1


def test_a_response_in_several_pairs_is_one_row(tmp_path):
    pairs = ((0, 1), (0, 2), (1, 2))
    data = pairs_of(tmp_path, [record("p", ("a", "b", "c"), pairs, (3, 2, 1), 0)])
    batch = collate(data, np.array([0, 1, 2]), PADDED)
    assert batch.input_ids.shape[0] == 3
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([0, 0, 1], [1, 2, 2])


def test_targets_and_mixtures_and_columns(tmp_path):
    one = store_of(tmp_path, [record(columns={"magnitude": [0.25]})])
    two = store_of(tmp_path, [record("other", source="g.jsonl:7", columns={"magnitude": [0.75]})])
    data = PreferenceData([one, two], "pairs", "fake")
    assert len(data) == 2 and data.describe(1).startswith("g.jsonl:7")
    assert collate(data, np.array([1, 0]), PADDED).columns["magnitude"].tolist() == [0.75, 0.25]
    assert data.groups.tolist() == [0, 1]
    targets = PreferenceData([one, two], "targets", "fake")
    batch = collate(targets, np.array([0, 1]), PADDED)
    assert batch.rejected is None and batch.targets[batch.owners == 0].tolist() == [*ids("yz"), EOS]


def loss_that(**fields):
    defaults = {
        "name": "some",
        "reads": frozenset(),
        "columns": frozenset(),
        "weight": None,
        "inspect_scores": lambda *scores: "a remark",
    }
    return SimpleNamespace(**(defaults | fields))


def test_data_are_checked_for_what_the_loss_reads(tmp_path):
    scored = pairs_of(tmp_path, [record()])
    bare = pairs_of(tmp_path, [record(scores=None)])
    assert scored.check_for(loss_that(reads={"scores"})) == "a remark"
    assert bare.check_for(loss_that()) is None
    with pytest.raises(DataError, match=r"f\.jsonl:1.*has none"):
        bare.check_for(loss_that(reads={"scores"}))
    with pytest.raises(DataError, match="column 'magnitude'"):
        scored.check_for(loss_that(columns={"magnitude"}))


def test_histograms_count_everything(tmp_path):
    store = store_of(tmp_path, [record("p" * n, scores=(0.5, 0.5 + n / 10)) for n in range(1, 40)])
    description = describe_data([store])
    histograms = description["histograms"]
    totals = {name: sum(histogram["counts"]) for name, histogram in histograms.items()}
    assert totals == {"prompt_tokens": 39, "response_tokens": 78, "score_gap": 39}
    for histogram in histograms.values():
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1
    json.dumps(description)


def test_batch_moves_with_all_its_tensors(tmp_path):
    data = pairs_of(tmp_path, [record(columns={"magnitude": [0.25]})])
    moved = collate(data, np.array([0]), PADDED).to("meta")
    values = [*vars(moved).values(), *moved.columns.values()]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) == 11 and all(t.device.type == "meta" for t in tensors)
