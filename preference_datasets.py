"""One reader for each named dataset: raw rows to records. A new dataset is one class with a
decorator."""

from pathlib import Path

import numpy as np

from preflab.readers.conversations import check_pair, response_of
from preflab.readers.fields import items, number, text, type_and_value
from preflab.readers.files import Rows, file_rows
from preflab.readers.hub import hub_rows
from preflab.readers.json_text import as_object, read_json
from preflab.readers.records import (
    Reader,
    Record,
    Responses,
    Skip,
    pairs_record,
    response_text_of,
    scored_record,
    targets_record,
)
from preflab.readers.registry import register_dataset
from utils import DataError, content_hash


class ScoredLines(Reader):
    """Files with one response on each line: {prompt, text, reward}."""

    provides = frozenset({"pairs", "scores"})
    pairing = "first_two"
    file = "{split}.jsonl"

    def rows(self, split, options):
        return file_rows(Path(options.data_dir) / self.file.format(split=split))

    def prompt(self, row, where):
        text(row, "text", where, may_be_empty=True)
        number(row, "reward", where)
        return text(row, "prompt", where)

    def record(self, prompt, rows, source, pair):
        responses = [response_text_of(row, source) for row in rows]
        scores = [float(row["reward"]) for row in rows]
        return scored_record(prompt, responses, scores, source, pair)


@register_dataset("imdb")
class Imdb(ScoredLines):
    """Continuations of film-review openings with a sentiment score (ODPO, arXiv:2402.10571)."""

    file = "imdb-sft-{split}.jsonl"


@register_dataset("toxicity")
class Toxicity(ScoredLines):
    """Continuations of prompts with a non-toxicity score (ODPO, arXiv:2402.10571)."""

    file = "toxicity-sft-{split}-reward.jsonl"


@register_dataset("reviews")
class Reviews(ScoredLines):
    """The shipped set: the tiny model's own samples, scored by the sentiment lexicon."""

    file = "reviews-{split}.jsonl"
    pairing = "all"


@register_dataset("hh")
class HelpfulHarmless(Reader):
    """Anthropic's helpful and harmless dialogues (arXiv:2204.05862): chosen and rejected are whole
    dialogues that share all but the last answer."""

    truncation = "keep_end"
    provides = frozenset({"pairs"})
    turn = "\n\nAssistant:"

    def rows(self, split, options):
        return hub_rows("Anthropic/hh-rlhf", split, options.data_dir)

    def prompt(self, row, where):
        chosen, rejected = text(row, "chosen", where), text(row, "rejected", where)
        if self.turn not in chosen:
            raise DataError(
                f"{where}: 'chosen' has no {self.turn!r}, expected a dialogue that ends with an"
                " answer"
            )
        prompt = chosen[: chosen.rindex(self.turn) + len(self.turn)]
        if not rejected.startswith(prompt):
            raise Skip("rejected does not start with the prompt of chosen")
        if chosen == rejected:
            raise Skip("chosen and rejected identical")
        if not chosen[len(prompt) :].strip() or not rejected[len(prompt) :].strip():
            raise Skip("an empty response")
        return prompt

    def record(self, prompt, rows, source, pair):
        n = len(prompt)
        pairs = [(row["chosen"][n:], row["rejected"][n:]) for row in rows]
        return pairs_record(prompt, pairs, source)


def _as_dialogue(question: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant:"


@register_dataset("shp")
class StanfordHumanPreferences(Reader):
    """Reddit answers with votes (SHP, arXiv:2110.08420): pairs in which one answer has at least
    twice the votes of the other."""

    provides = frozenset({"pairs", "scores"})

    def rows(self, split, options):
        return hub_rows("stanfordnlp/SHP", split, options.data_dir)

    def prompt(self, row, where):
        for side in "AB":
            text(row, f"human_ref_{side}", where)
            number(row, f"score_{side}", where)
        if number(row, "labels", where) not in (0, 1):
            raise DataError(
                f"{where}: 'labels' is {row['labels']}, expected 1 (A preferred) or 0 (B preferred)"
            )
        low, high = sorted((row["score_A"], row["score_B"]))
        if high < 2 * low or high == low:
            raise Skip("the larger score is not twice the smaller")
        if row["human_ref_A"] == row["human_ref_B"]:
            raise Skip("chosen and rejected identical")
        if (row["labels"] == 1) != (row["score_A"] > row["score_B"]):
            raise Skip("the label contradicts the scores")
        return _as_dialogue(text(row, "history", where))

    def record(self, prompt, rows, source, pair):
        responses = Responses()
        for row in rows:
            a = responses.add(f" {row['human_ref_A']}", float(row["score_A"]))
            b = responses.add(f" {row['human_ref_B']}", float(row["score_B"]))
            responses.pairs.append((a, b) if row["labels"] == 1 else (b, a))
        best = max(range(len(responses.scores)), key=responses.scores.__getitem__)
        return Record(prompt, responses.texts, responses.pairs, best, responses.scores, {}, source)


@register_dataset("se")
class StackExchange(Reader):
    """Stack Exchange answers with votes; HTML becomes text, code stays marked as <code>."""

    provides = frozenset({"pairs", "scores"})
    pairing = "all"

    def rows(self, split, options):
        rows = hub_rows(
            "HuggingFaceH4/stack-exchange-preferences", split, options.data_dir, only="train"
        )
        # The order of `Dataset.shuffle(seed=42)`.
        order = np.random.default_rng(42).permutation(rows.n).tolist()
        n_test = max(1, rows.n // 100)
        order = order[:n_test] if split == "test" else order[n_test:]
        note = "1% of the rows, shuffled with seed 42, are the test split"

        def read(i: int) -> dict:
            return rows.read(order[i])

        def where(i: int) -> str:
            return rows.where(order[i] if order else 0)

        return Rows(len(order), read, where, rows.fingerprint, note=note)

    def prompt(self, row, where):
        for i, answer in enumerate(items(row, "answers", where)):
            place = f"{where}, answer {i + 1}"
            answer = as_object(answer, place)
            text(answer, "text", place)
            number(answer, "pm_score", place)
        return _as_dialogue(_plain_text(text(row, "question", where)))

    def record(self, prompt, rows, source, pair):
        responses = Responses()
        for row in rows:
            for answer in row["answers"]:
                response = _plain_text(answer["text"]).strip("\n")
                if response:
                    responses.add(f" {response}", float(answer["pm_score"]))
        if not responses.texts:
            raise Skip("no answer with text")
        return scored_record(prompt, responses.texts, responses.scores, source, pair)


def _plain_text(html: str) -> str:
    """The text of HTML, with code between <code> and </code>."""
    from bs4 import BeautifulSoup, ParserRejectedMarkup  # slow to import

    try:
        soup = BeautifulSoup(html, "html.parser")
    except ParserRejectedMarkup as error:
        raise Skip("HTML that cannot be read") from error
    for code in soup.find_all("code"):
        code.replace_with(f"<code>{code.get_text()}</code>")
    return soup.get_text()


@register_dataset("tldr")
class Tldr(Reader):
    """Reddit posts and summaries: rated ones (ODPO, arXiv:2402.10571), or pairs (arXiv:2009.01325)
    where there are no ratings."""

    provides = frozenset({"pairs", "scores"})
    pairing = "all"

    def rows(self, split, options):
        rated = Path(options.data_dir) / f"tldr-sft-{split}-rel.json"
        pairs = Path(options.data_dir) / "tldr" / f"{split}.json"
        if rated.is_file() and pairs.is_file():
            raise DataError(
                f"datasets=[tldr] reads {rated} (rated samples) or {pairs} (pairs, made by"
                " scripts/preproc_pref.py), and both are there; move the one that you do not want"
                " elsewhere"
            )
        if rated.is_file():
            return _rated_posts(rated)
        if pairs.is_file():
            self.provides, self.pairing = frozenset({"pairs"}), None
            return file_rows(pairs)
        raise DataError(
            f"datasets=[tldr] needs {rated} ({{post: {{responses, rewards}}}}, rated samples of the"
            f" ODPO repository) or {pairs} ([{{prompt, chosen, rejected}}], made by"
            " scripts/preproc_pref.py from summarize_from_feedback); neither is there"
        )

    def prompt(self, row, where):
        if "post" not in row:
            return check_pair(row, where)
        responses, scores = items(row, "responses", where), items(row, "rewards", where)
        if len(responses) != len(scores):
            raise DataError(
                f"{where}: {len(responses)} responses and {len(scores)} rewards, expected one"
                " reward for each response"
            )
        for i, (response, score) in enumerate(zip(responses, scores, strict=True), 1):
            place = f"{where}, response {i}"
            text({"response": response}, "response", place, may_be_empty=True)
            number({"reward": score}, "reward", place)
        return text(row, "post", where) + "\n\nTL;DR:"

    def record(self, prompt, rows, source, pair):
        if "post" not in rows[0]:
            pairs = [
                (response_of(row, "chosen", source), response_of(row, "rejected", source))
                for row in rows
            ]
            return pairs_record(prompt, pairs, source)
        responses, scores = [], []
        for row in rows:
            for response, score in zip(row["responses"], row["rewards"], strict=True):
                if "<|endoftext|>" in response:
                    pair.skipped["responses that contain <|endoftext|>"] += 1
                else:
                    responses.append(response)
                    scores.append(float(score))
        if not responses:
            raise Skip("no response without <|endoftext|>")
        return scored_record(prompt, responses, scores, source, pair)


def _rated_posts(path: Path) -> Rows:
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: {type_and_value(content)}, expected {{post: {{responses, rewards}}}}"
        )
    posts = list(content)

    def where(i: int) -> str:
        return f"{path}: post {i + 1}"

    def read(i: int) -> dict:
        return {"post": posts[i], **as_object(content[posts[i]], where(i))}

    return Rows(len(posts), read, where, content_hash(path))


@register_dataset("tldr_filtered")
class TldrFiltered(Reader):
    """Filtered Reddit posts with their authors' summaries (arXiv:2009.01325), for SFT."""

    merges = False

    def rows(self, split, options):
        path = Path(options.data_dir) / "tldr_filtered" / f"{split}.json"
        if not path.is_file():
            raise DataError(
                f"datasets=[tldr_filtered] needs {path}, made by scripts/preproc_filter.py from"
                " openai-tldr-filtered"
            )
        return file_rows(path)

    def prompt(self, row, where):
        text(row, "chosen", where)
        return text(row, "prompt", where)

    def record(self, prompt, rows, source, pair):
        return targets_record(prompt, rows[0]["chosen"], source)
