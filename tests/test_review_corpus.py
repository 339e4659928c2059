"""The shipped lexicon, the generator of review-like texts, and the blank model made for them."""

import filecmp
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from preflab.rewards.text import lexicon
from scripts import make_review_corpus as corpus
from scripts import make_tiny_model as tiny
from utils import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
LEXICON = ROOT / "data" / "lexicon.json"
WORDS = json.loads(LEXICON.read_text(encoding="utf-8"))
SENTIMENT = {sign: set(WORDS[name]) for sign, name in (("+", "positive"), ("-", "negative"))}


@pytest.fixture(scope="module")
def files():
    """(train, test, prompts) of a small corpus."""
    return corpus.make_corpus(3000, 200, seed=5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model folder made by the commands of the two scripts."""
    folder = tmp_path_factory.mktemp("tiny")
    run(
        "make_tiny_model.py", "--corpus", corpus_of(folder / "corpus"), "--output", folder / "model"
    )
    return folder / "model"


def corpus_of(folder: Path, seed: int = 0) -> Path:
    run("make_review_corpus.py", "--output", folder, "--n", 2000, "--n_prompts", 50, "--seed", seed)
    return folder


def run(script: str, *arguments) -> None:
    subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
        check=True,
        capture_output=True,
    )


def signs(text: str) -> set[str]:
    tokens = set(re.findall(r"[a-z']+", text.lower()))
    return {sign for sign, words in SENTIMENT.items() if tokens & words}


def entries(table) -> list[str]:
    """All texts of a table of the grammar, however deep, with "+" and "-" left out."""
    if isinstance(table, str):
        return [table]
    if isinstance(table, dict):
        return [
            text for key, value in table.items() if key not in ("+", "-") for text in entries(value)
        ]
    return [text for value in table for text in entries(value)]


def polarised(table) -> list[tuple[str, str]]:
    if not isinstance(table, dict):
        return []
    own = [(sign, text) for sign in ("+", "-") for text in table.get(sign, ())]
    return own + [pair for value in table.values() for pair in polarised(value)]


def test_lexicon_is_lower_case_disjoint_and_without_repeats():
    for words in WORDS.values():
        assert 60 <= len(words) == len(set(words)) <= 100
        assert all(re.fullmatch(r"[a-z']+", word) for word in words)
    assert not SENTIMENT["+"] & SENTIMENT["-"]


@pytest.mark.parametrize(
    "tables",
    [corpus.ADJECTIVES, corpus.COMMON, corpus.DOMAINS],
    ids=["adjectives", "common", "domains"],
)
def test_the_lexicon_agrees_with_the_grammar(tables):
    marked = polarised(tables)
    assert marked
    # "it broke after {number} days": what a slot puts in is checked where its table is.
    assert [(sign, text) for sign, text in marked if signs(text) != {sign}] == []
    assert [text for text in entries(tables) if signs(text)] == []


def test_hints_hold_no_sentiment_and_keep_their_promise():
    for pair in corpus.HINTS.values():
        for sign, hints in pair.items():
            assert [hint for hint in hints if signs(hint)] == []
            assert not set(hints) & set(pair["-" if sign == "+" else "+"])
    for seed in range(200):
        writer = corpus.Writer(random.Random(seed), "hotel")
        text = writer.fill("{lead} {aspect} {was} {adj}")
        assert signs(text) == {
            sign for sign, hints in corpus.HINTS["lead"].items() if text.startswith(tuple(hints))
        }


def test_links_tell_agreement_from_contrast():
    seen = set()
    for seed in range(200):
        first, link, second = (
            corpus.Writer(random.Random(seed), "film")
            .fill("{adj_story} {link} {adj_story}")
            .split()
        )
        assert (link == "and") == (signs(first) == signs(second))
        seen.add(link)
    assert seen == {"and", "but"}


def test_equal_seeds_make_equal_corpora(files):
    assert corpus.make_corpus(3000, 200, seed=5) == files
    assert corpus.make_corpus(3000, 200, seed=6) != files


def test_equal_commands_write_equal_bytes(tmp_path, model_folder, monkeypatch):
    names = ["train.jsonl", "test.jsonl", "prompts.jsonl"]
    first, second, other = (
        corpus_of(tmp_path / "a"),
        corpus_of(tmp_path / "b"),
        corpus_of(tmp_path / "c", seed=1),
    )
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names
    assert filecmp.cmpfiles(first, other, names, shallow=False)[1] == names
    # In this process: the folder it is compared with came from another, with another hash seed.
    monkeypatch.setattr(
        sys, "argv", ["", "--corpus", str(first), "--output", str(tmp_path / "model")]
    )
    tiny.main()
    names = sorted(path.name for path in model_folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(names)
    assert filecmp.cmpfiles(tmp_path / "model", model_folder, names, shallow=False)[0] == names
    with pytest.raises(ConfigError, match="exists"):
        tiny.main()


def test_no_prompt_is_in_two_files(files):
    train, test, prompts = ([row["prompt"] for row in rows] for rows in files)
    assert (len(train), len(test), len(prompts), len(set(prompts))) == (3000, 150, 200, 200)
    assert (
        not set(train) & set(test)
        and not set(train) & set(prompts)
        and not set(test) & set(prompts)
    )
    # The space of prompts is far larger than what is drawn from it.
    assert len(set(train)) > 2400


def test_texts_are_short_and_end_as_sentences(files):
    train = files[0]
    for row in train:
        assert 4 <= len(row["prompt"].split()) <= 14
        assert len(row["chosen"].split()) in corpus.WORDS
        assert re.fullmatch(r" [A-Za-z ,.'-]+\.", row["chosen"])
        assert not re.search(
            r"[{}_]|  |\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", row["prompt"] + row["chosen"]
        )
        # A response starts a sentence just where the prompt has ended one; "I" is a capital
        # anywhere.
        assert row["chosen"].startswith(" I ") or row["chosen"][1].isupper() == row[
            "prompt"
        ].endswith(".")
    assert len({row["chosen"] for row in train}) > 2800


def test_a_prompt_does_not_decide_the_sentiment(files):
    assert [row["prompt"] for rows in files for row in rows if signs(row["prompt"])] == []
    score, rng, within, means = lexicon(path=str(LEXICON)), random.Random(0), [], []
    for _ in range(40):
        prompt = corpus.write_prompt(rng)
        scores = score([prompt.text] * 40, [corpus.write_response(rng, prompt) for _ in range(40)])
        assert min(scores) < 0.7 and max(scores) > 1.3
        within.append(statistics.stdev(scores))
        means.append(statistics.mean(scores))
    # 0.36 if signs were independent, about 0.5 as they agree with a tone.
    assert 0.44 < statistics.mean(within) < 0.6
    assert 0.93 < statistics.mean(means) < 1.07
    # Means over 40 responses differ by chance alone by about 0.4 / sqrt(40).
    assert statistics.stdev(means) < 0.12


def test_more_prompts_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(
        corpus, "write_prompt", lambda rng: corpus.Prompt("We stayed here and", "hotel", "and")
    )
    with pytest.raises(ConfigError, match="lower them"):
        corpus.make_corpus(0, 2, seed=0)


@pytest.mark.parametrize(
    "text",
    [
        " the soup was bland, but we loved the evening.",
        "I'm here , and it's 3 . 50 !",
        "  two  spaces\tand a tab ",
        "line one\nline two\r\n\n",
        "naïve café, Größe",
        "漢字 и кириллица",
        "👍🏽 family 👨‍👩‍👧",
        "\u200b\ufeff\x00",
        "",
    ],
)
def test_any_text_survives_the_tokenizer(model_folder, text):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("We ate and" + text)["input_ids"]) == "We ate and" + text


def test_special_tokens(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("we")["input_ids"] == tokenizer("we", add_special_tokens=False)["input_ids"]


def test_words_of_the_corpus_are_short_in_tokens(model_folder, files):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert 1.0 < tiny.tokens_per_word(tokenizer, [row["chosen"] for row in files[1]]) < 1.3


def test_the_model_fits_the_tokenizer_and_its_size(model_folder):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        AutoTokenizer.from_pretrained(model_folder),
    )
    assert 1_000_000 < model.num_parameters() < 2_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {
        model.lm_head.weight.dtype
    } and model.dtype.itemsize == 4
    ids = {
        name: getattr(model.config, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    assert ids == {name: getattr(tokenizer, name) for name in ids}


def test_seeds_differ_and_wrong_input_is_named(tmp_path, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    first, other = (tiny.blank_model(tokenizer, seed).lm_head.weight for seed in (0, 1))
    assert not first.equal(other)
    with pytest.raises(DataError, match="make_review_corpus"):
        tiny.read_texts(tmp_path)
    with pytest.raises(ConfigError, match="--vocab_size 100"):
        tiny.train_tokenizer(["a"], 100)
