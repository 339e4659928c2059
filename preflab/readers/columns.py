"""A user's own data: a path or a hub id, whose columns say what it holds."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from preflab.readers.fields import items, number, present, text, type_and_value
from preflab.readers.files import FILE_TYPES, Rows, file_rows, list_folder
from preflab.readers.hub import TEST_NAMES, folder_rows, hub_rows, is_local_path
from preflab.readers.json_text import as_object, parse_json
from preflab.readers.messages import (
    Chat,
    chat,
    messages_of,
    plain_text,
    split_answer,
    split_turns,
    whole_conversation,
)
from preflab.readers.records import (
    Options,
    Reader,
    Record,
    Skip,
    pairs_record,
    response_text_of,
    scored_record,
    targets_record,
)
from utils import ConfigError, DataError

# The columns of each form of data, in the order in which forms are tried.
FORMS = {
    "pairs": ("chosen", "rejected"),
    "j_over_k": ("question", "response_j", "response_k"),
    "scored_rows": ("prompt", "text", "reward"),
    "scored_lists": ("prompt", "responses", "scores"),
    "completions": ("instruction", "completions"),
    "labelled": ("prompt", "completion", "label"),
    "targets": ("prompt", "chosen"),
    "prompts": ("prompt",),
    "questions": ("question",),
}
# Forms that hold prompts to sample for.
PROMPT_FORMS = ("prompts", "questions")
PAIR_FORMS = ("pairs", "j_over_k")
PAIR_SCORES = ("score_chosen", "score_rejected")  # beside prompt, chosen, rejected
TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")  # beside chosen, rejected
SCORED_FORMS = ("scored_rows", "scored_lists", "completions", "labelled")
COMPLETION_SCORE = "overall_score"  # of UltraFeedback's completions, beside their response

# A CSV file has text only. Cells of these columns are read as numbers, or as JSON where they match.
CSV_NUMBERS = ("reward", "magnitude", *PAIR_SCORES)
CSV_LISTS = ("responses", "scores", *TOKEN_WEIGHTS)
CSV_JSON = {
    **dict.fromkeys(CSV_LISTS, re.compile(r"\s*\[")),
    **dict.fromkeys(
        ("prompt", "chosen", "rejected", "completion", "completions"), re.compile(r"\s*\[\s*\{")
    ),
}

PLACE = re.compile(r"\{(?:prompt|question)\}")

LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


def accepted_columns() -> str:
    """The accepted sets of columns, for messages."""
    sets = [("prompt", *FORMS["pairs"]), *(FORMS[form] for form in FORMS if form != "pairs")]
    return "; ".join(", ".join(columns) for columns in sets)


def columns_with_pairs() -> str:
    """The sets of columns that make pairs, for messages."""
    sets = [("prompt", *FORMS["pairs"]), FORMS["j_over_k"]]
    sets += [FORMS[form] for form in SCORED_FORMS]
    return "; ".join(", ".join(columns) for columns in sets)


def columns_with_token_weights() -> str:
    """The columns that hold weights of tokens, for messages."""
    return ", ".join(("prompt", *FORMS["pairs"], *TOKEN_WEIGHTS))


def columns_with_scores() -> str:
    """The sets of columns that hold scores, for messages."""
    sets = [("prompt", *FORMS["pairs"], *PAIR_SCORES), *(FORMS[form] for form in SCORED_FORMS)]
    return "; ".join(", ".join(columns) for columns in sets)


class UserPairs(Reader):
    """A path or hub id whose first row decides the form of all rows."""

    truncation = "keep_end"
    chooses_splits = True

    def __init__(self, name: str):
        self.name = name

    def rows(self, split, options):
        self.columns, self.template = options.columns, options.prompt_template
        self.all_turns = options.train_on == "assistant"
        if self.template is not None and len(PLACE.findall(self.template)) != 1:
            raise ConfigError(
                f"prompt_template={self.template!r} must have one {{prompt}} or {{question}}, where"
                " the text of the data goes, as in 'Question: {question}\\n\\nAnswer: '"
            )
        ours = {theirs: ours for ours, theirs in options.columns.items()}
        self.numbers = {name: ours.get(name, name) for name in options.numbers}
        self.weighs = options.token_weights
        rows = self._open(split, options)
        self.all_text = rows.all_text
        if rows.n:
            first = self._fields(rows.read(0), rows.where(0))
            self._find_form(first, rows.where(0))
            self._check_numbers(first, rows.where(0), options.numbers)
        return rows

    def _open(self, split: str, options: Options) -> Rows:
        path, named = Path(self.name), (options.train_split, options.test_split)
        if path.is_dir():
            return folder_rows(path, split, named)
        if path.exists():
            if any(named):
                raise ConfigError(
                    f"datasets=[{self.name}] is one file, and train_split and test_split choose"
                    " among the splits of a folder or a hub dataset; set them to null, or give the"
                    " folder"
                )
            rows = file_rows(path)
            rows.whole = True
            return rows
        if is_local_path(self.name) or path.name.lower().endswith(FILE_TYPES):
            raise _no_such_path(path)
        return hub_rows(self.name, split, options.data_dir, test_names=TEST_NAMES, named=named)

    def _fields(self, row: dict, where: str) -> dict:
        """The row under our names, where dataset_columns gives the user's; CSV cells as the numbers
        and lists that they hold."""
        renamed = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        taken = set(self.columns.values())
        row = {key: value for key, value in row.items() if key not in taken} | renamed
        if not self.all_text:
            return row
        numbers = (*CSV_NUMBERS, *self.numbers.values())
        return {key: parse_cell(value, key, where, numbers) for key, value in row.items()}

    def _find_form(self, row: dict, where: str) -> None:
        for form, columns in FORMS.items():
            if all(row.get(key) is not None for key in columns) and (
                form != "questions" or _is_alone(row, "question")
            ):
                self.form = form
                break
        else:
            raise DataError(
                f"{where}: columns {', '.join(map(str, row))}; accepted sets: {accepted_columns()};"
                " dataset_columns renames yours"
            )
        self.scores_pairs = self.form == "pairs" and _has_all(row, PAIR_SCORES)
        if self.form in PAIR_FORMS and not self.scores_pairs:
            self.provides = frozenset({"pairs"})
        elif self.form in (*PAIR_FORMS, *SCORED_FORMS):
            self.provides = frozenset({"pairs", "scores"})
        else:
            self.provides = frozenset()
        if self.form == "pairs" and _has_all(row, TOKEN_WEIGHTS):
            self.provides |= {"token_weights"}
        self.pairing = "all" if self.form in SCORED_FORMS else None
        self.merges = self.form != "targets"
        self.only_prompts = self.form in PROMPT_FORMS

    def _check_numbers(self, row: dict, where: str, wanted: dict[str, str]) -> None:
        """The form has pairs, and the first row the further numbers that are wanted of each."""
        for name, reader in wanted.items():
            if self.form not in (*PAIR_FORMS, *PROMPT_FORMS):
                raise DataError(
                    f"{where}: {reader} reads a number of each pair from the column {name!r}, and"
                    " these rows are no pairs; give prompt, chosen and rejected"
                )
            if self.form in PAIR_FORMS and self.numbers[name] not in row:
                raise DataError(
                    f"{where}: no column {name!r}, which {reader} reads; columns:"
                    f" {', '.join(map(str, row))}"
                )

    def prompt(self, row, where):
        row = self._fields(row, where)
        if self.form in PAIR_FORMS:
            for key in self.numbers.values():
                number(row, key, where)
        if self.form in PAIR_FORMS and row.get("magnitude") is not None:
            number(row, "magnitude", where)
        if self.form == "pairs":
            self._check_pair_scores(row, where)
            for key in TOKEN_WEIGHTS if self.weighs else ():
                _check_token_weights(row, key, where)
            return self._framed(check_pair(row, where, all_turns=self.all_turns), where)
        if self.form == "j_over_k":
            return self._framed(_check_j_over_k(row, where), where)
        if self.form == "questions":
            return self._framed(plain_text(row, "question", where), where)
        if self.form == "completions":
            self._completions(row, where)
            return self._framed(plain_text(row, "instruction", where), where)
        if self.form in ("labelled", "targets"):
            key = "completion" if self.form == "labelled" else "chosen"
            if self.form == "labelled":
                label_of(row, where)
            return self._framed(self._conversation(row, key, where)[0], where)
        if self.form == "scored_rows":
            plain_text(row, "text", where, may_be_empty=True)
            number(row, "reward", where)
        elif self.form == "scored_lists":
            _check_scored_lists(row, where)
        return self._framed(prompt_of(row, where), where)

    def _completions(self, row: dict, where: str) -> tuple[list[str], list[float]]:
        """The responses and the scores of a row of UltraFeedback."""
        responses, scores, key = [], [], self.columns.get("scores") or COMPLETION_SCORE
        for i, entry in enumerate(items(row, "completions", where), 1):
            place = f"{where}, completion {i}"
            entry = as_object(entry, place)
            responses.append(plain_text(entry, "response", place, may_be_empty=True))
            scores.append(float(number(entry, key, place)))
        if not responses:
            raise Skip("no response")
        return responses, scores

    def _conversation(self, row: dict, key: str, where: str) -> tuple[str | Chat, str]:
        if not self.all_turns:
            return conversation_of(row, key, where)
        return turns_of(row, key, key, where)

    def _framed(self, prompt: str | Chat, where: str) -> str | Chat:
        """A prompt of text inside `prompt_template`."""
        if self.template is None:
            return prompt
        if isinstance(prompt, Chat):
            raise ConfigError(
                f"{where}: prompt_template is for prompts of text, and this one is a conversation,"
                " which the model's chat template formats; set prompt_template=null"
            )
        return PLACE.sub(lambda _: prompt, self.template)

    def _check_pair_scores(self, row: dict, where: str) -> None:
        if self.scores_pairs:
            for key in PAIR_SCORES:
                number(row, key, where)
        elif _has_all(row, PAIR_SCORES):
            raise DataError(
                f"{where}: {' and '.join(PAIR_SCORES)}, which the first row does not have; give"
                " them for all rows or none"
            )

    def record(self, prompt, rows, source, pair):
        rows = [self._fields(row, source) for row in rows]
        if self.form in PROMPT_FORMS:
            return targets_record(prompt, "", source)
        if self.form == "targets":
            return targets_record(prompt, self._conversation(rows[0], "chosen", source)[1], source)
        if self.form in SCORED_FORMS:
            return self._scored_record(prompt, rows, source, pair)
        return self._pairs_record(prompt, rows, source, pair)

    def _scored_record(self, prompt, rows: list[dict], source: str, pair) -> Record:
        responses, scores = [], []
        for row in rows:
            if self.form == "scored_rows":
                responses.append(response_text_of(row, source))
                scores.append(float(row["reward"]))
            elif self.form == "completions":
                for values, more in zip(
                    (responses, scores), self._completions(row, source), strict=True
                ):
                    values.extend(more)
            elif self.form == "scored_lists":
                responses.extend(row["responses"])
                scores.extend(map(float, row["scores"]))
            else:
                responses.append(self._conversation(row, "completion", source)[1])
                scores.append(label_of(row, source))
        return scored_record(prompt, responses, scores, source, pair)

    def _pairs_record(self, prompt, rows: list[dict], source: str, pair) -> Record:
        chosen, rejected = ("chosen", "rejected")
        if self.form == "j_over_k":
            chosen, rejected = ("response_j", "response_k")
        scores = None
        if self.scores_pairs:
            # The pairs are those of the data: equal scores are dropped only where min_gap asks.
            scored = [row for row in rows if pair.min_gap <= 0 or _gap(row) >= pair.min_gap]
            pair.skipped["pairs with a score gap below min_gap"] += len(rows) - len(scored)
            if not scored:
                raise Skip("prompts whose pairs all have a score gap below min_gap")
            rows = scored
            scores = [tuple(float(row[key]) for key in PAIR_SCORES) for row in rows]
        if self.all_turns and self.form == "pairs":
            pairs = [pair_of(row, source, all_turns=True)[1:] for row in rows]
        else:
            response = _text_response if self.form == "j_over_k" else response_of
            pairs = [
                (response(row, chosen, source), response(row, rejected, source)) for row in rows
            ]
        columns = {}
        if any(row.get("magnitude") is not None for row in rows):
            columns["magnitude"] = [number(row, "magnitude", source) for row in rows]
        for name, key in self.numbers.items():
            columns[name] = [number(row, key, source) for row in rows]
        weights = None
        if self.weighs and self.form == "pairs":
            weights = [tuple(tuple(row[key]) for key in TOKEN_WEIGHTS) for row in rows]
        return pairs_record(prompt, pairs, source, columns, scores, weights)


def _has_all(row: dict, keys: tuple) -> bool:
    return all(row.get(key) is not None for key in keys)


def _check_token_weights(row: dict, key: str, where: str) -> None:
    for i, weight in enumerate(items(row, key, where), 1):
        if number({key: weight}, key, f"{where}, weight {i}") < 0:
            raise DataError(f"{where}, weight {i}: {key!r} is {weight}, expected at least 0")


def _gap(row: dict) -> float:
    """By how much the chosen response scores higher; negative where the scores contradict the
    pair."""
    return float(row["score_chosen"]) - float(row["score_rejected"])


def _no_such_path(path: Path) -> DataError:
    """The error for a path that does not exist, with what its nearest existing folder holds."""
    if path.parts[0].startswith("~"):
        return DataError(
            f"{path}: no such file or folder; ~ is not expanded here, write the whole path"
        )
    parents = Path(os.path.abspath(path)).parents
    folder = next(parent for parent in parents if parent.is_dir())
    return DataError(f"{path}: no such file or folder; in {folder}: {list_folder(folder)}")


def parse_cell(value: str, key: str, where: str, numbers: Collection[str] = CSV_NUMBERS):
    """A cell of a CSV file as the number or the JSON list that its column takes, else its text,
    which the reader may refuse. numbers: the columns of numbers."""
    if key in numbers:
        try:
            return float(value)
        except ValueError:
            return value
    if key not in CSV_JSON or not CSV_JSON[key].match(value):
        return value
    try:
        return parse_json(value, f"{where}, {key!r}")
    except DataError as error:
        expected = "a list" if key in CSV_LISTS else "chat messages"
        raise DataError(
            f"{error}; it begins as {expected} in JSON, as json.dumps writes them; correct it, or"
            " save the data as JSON or parquet"
        ) from error


# --------------------------------------------------------------------------- what a row must hold


def check_pair(row: dict, where: str, *, all_turns: bool = False) -> str | Chat:
    """The prompt of a pair: text, or the messages that both conversations share."""
    prompt, chosen, rejected = pair_of(row, where, all_turns=all_turns)
    if chosen == rejected:
        raise Skip("chosen and rejected identical")
    return prompt


def pair_of(row: dict, where: str, *, all_turns: bool) -> tuple[str | Chat, str, str]:
    """Prompt, chosen and rejected response of a row. all_turns: the responses are all turns from
    the first of the assistant's in which the two conversations differ."""
    keys = ("chosen", "rejected")
    if row.get("prompt") is None:
        of_chosen, of_rejected = (len(messages_of(row, key, where) or "ab") for key in keys)
        if of_rejected == 1 < of_chosen:
            raise Skip("chosen and rejected have different prompts")
    if all_turns:
        (prompt, chosen), (other, rejected) = (
            turns_of(row, key, against, where)
            for key, against in zip(keys, reversed(keys), strict=True)
        )
    else:
        (prompt, chosen), (other, rejected) = (conversation_of(row, key, where) for key in keys)
    if type(prompt) is not type(other):
        raise DataError(
            f"{where}: one of 'chosen' and 'rejected' is text and the other one messages; write"
            " both the same way"
        )
    same = prompt == other if isinstance(prompt, str) else prompt.key() == other.key()
    if not same:
        earlier = isinstance(prompt, Chat) and not all_turns
        hint = " (train_on=assistant learns from earlier turns too)" if earlier else ""
        raise Skip(f"chosen and rejected have different prompts{hint}")
    return prompt, chosen, rejected


def turns_of(row: dict, key: str, against: str, where: str) -> tuple[str | Chat, str]:
    """The prompt of a row and the response in a column, with all turns of the assistant in which it
    differs from the column `against`; all of its turns where that is the same column."""
    messages = whole_conversation(row, key, where)
    other = messages if against == key else whole_conversation(row, against, where)
    if messages is None or other is None:
        return conversation_of(row, key, where)
    both = split_turns(messages, other, key, where)
    if both is None:
        raise Skip("chosen and rejected have different prompts")
    return chat(row, both[0], where), both[1]


def _check_j_over_k(row: dict, where: str) -> str:
    if plain_text(row, "response_j", where) == plain_text(row, "response_k", where):
        raise Skip("chosen and rejected identical")
    return plain_text(row, "question", where)


def _check_scored_lists(row: dict, where: str) -> None:
    responses, scores = items(row, "responses", where), items(row, "scores", where)
    if len(responses) != len(scores):
        raise DataError(
            f"{where}: {len(responses)} responses and {len(scores)} scores, expected one score for"
            " each response"
        )
    if not responses:
        raise Skip("no response")
    for response, score in zip(responses, scores, strict=True):
        plain_text({"responses": response}, "responses", where, may_be_empty=True)
        number({"scores": score}, "scores", where)


def prompt_of(row: dict, where: str) -> str | Chat:
    """The prompt column: text, or messages."""
    if (messages := messages_of(row, "prompt", where)) is not None:
        return chat(row, messages, where)
    for column in ("tools", "system"):
        if row.get(column):
            raise DataError(
                f"{where}: {column!r} is for a chat template, and 'prompt' is text, so it would not"
                " be read; give 'prompt' as messages, or remove the column"
            )
    return text(row, "prompt", where)


def conversation_of(row: dict, key: str, where: str) -> tuple[str | Chat, str]:
    """The prompt of a row and the response in a column: texts, or messages whose last is the
    response."""
    messages = whole_conversation(row, key, where)
    if messages is None:
        return prompt_of(row, where), text(row, key, where)
    before, answer = split_answer(messages, key, where)
    return chat(row, before, where), answer


def response_of(row: dict, key: str, where: str) -> str:
    """A response: text, or the content of the last message."""
    return conversation_of(row, key, where)[1]


def _text_response(row: dict, key: str, where: str) -> str:
    return plain_text(row, key, where)


def label_of(row: dict, where: str) -> float:
    """Whether a completion is desirable, as a score: 1 for true and 0 for false, also where they
    are written as numbers or as text."""
    label = str(present(row, "label", where)).strip().lower()
    if label not in LABELS:
        raise DataError(
            f"{where}: 'label' is {type_and_value(row['label'])}, expected true (desirable) or"
            " false"
        )
    return LABELS[label]


def _is_alone(row: dict, key: str) -> bool:
    """Whether no other column of a row holds text."""
    return not any(isinstance(value, str) and name != key for name, value in row.items())
