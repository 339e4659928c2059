"""A user's own data: a path or a hub id, whose columns say what it holds."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from preflab.readers.conversations import (
    conversation_of,
    list_of,
    pair_of,
    prompt_of,
    turns_of,
)
from preflab.readers.fields import items, number, present, type_and_value
from preflab.readers.files import FILE_TYPES, Rows, file_rows, list_folder
from preflab.readers.hub import TEST_NAMES, folder_rows, hub_rows, is_local_path
from preflab.readers.json_text import as_object, parse_json
from preflab.readers.messages import Chat, messages_of
from preflab.readers.records import (
    Options,
    Reader,
    Record,
    Skip,
    pairs_record,
    scored_record,
    targets_record,
    written_response,
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
# The column of a form that asks, where it is no `prompt`, and the column of its responses, which
# may hold whole conversations.
ASKS = {"j_over_k": "question", "questions": "question", "completions": "instruction"}
ANSWERS = {
    "j_over_k": "response_j",
    "scored_rows": "text",
    "scored_lists": "responses",
    "completions": "completions",
    "labelled": "completion",
    "targets": "chosen",
}
PAIR_FORMS = ("pairs", "j_over_k")
PAIR_SCORES = ("score_chosen", "score_rejected")  # beside prompt, chosen, rejected
TOKEN_WEIGHTS = ("chosen_token_weights", "rejected_token_weights")  # beside chosen, rejected
LIST_FORMS = ("scored_lists", "completions")
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
            asked = ASKS.get(form, "prompt")
            others = [key for key in columns if key != asked]
            if not _has_all(row, others):  # first, for what _is_whole reads may be of another form
                continue
            has_prompt = asked not in columns or row.get(asked) is not None
            is_asked = has_prompt or _is_whole(row, form, where)
            if is_asked and (form != "questions" or _is_alone(row, "question")):
                self.form, self.asked = form, asked
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
            if row.get("magnitude") is not None:
                number(row, "magnitude", where)
        if self.form == "pairs":
            self._check_pair_scores(row, where)
            for key in TOKEN_WEIGHTS if self.weighs else ():
                _check_token_weights(row, key, where)
        return self._framed(self._checked_prompt(row, where), where)

    def _checked_prompt(self, row: dict, where: str) -> str | Chat:
        """The prompt of a row whose responses and scores are checked."""
        if self.form in PAIR_FORMS:
            prompt, chosen, rejected = self._pair(row, where)
            if chosen == rejected:
                raise Skip("chosen and rejected identical")
            return prompt
        if self.form in PROMPT_FORMS:
            return prompt_of(row, where, asked=self.asked)
        if self.form in LIST_FORMS:
            return self._list(row, where)[0]
        if self.form == "labelled":
            label_of(row, where)
        elif self.form == "scored_rows":
            number(row, "reward", where)
        return self._one(row, where)[0]

    def _pair(self, row: dict, where: str) -> tuple[str | Chat, str, str]:
        """The prompt and the two responses of a pair."""
        keys = FORMS[self.form][-2:]
        return pair_of(row, where, all_turns=self.all_turns, keys=keys, asked=self.asked)

    def _one(self, row: dict, where: str) -> tuple[str | Chat, str]:
        """The prompt and the response of a row with one."""
        split = turns_of if self.all_turns else conversation_of
        may_be_empty = self.form == "scored_rows"
        return split(row, ANSWERS[self.form], where, may_be_empty=may_be_empty)

    def _list(self, row: dict, where: str) -> tuple[str | Chat, list[str], list[float]]:
        """The prompt, the responses and the scores of a row with several. Raises Skip where there
        are none."""
        if self.form == "completions":
            rows, scores = self._completions(row, where)
        else:
            rows, scores = _scored_list(row, where)
        if not rows:
            raise Skip("no response")
        key = "response" if self.form == "completions" else "responses"
        shared = list_of(rows, key, where, asked=self.asked, all_turns=self.all_turns)
        return *shared, scores

    def _completions(self, row: dict, where: str) -> tuple[list[tuple[dict, str]], list[float]]:
        """The responses, each in its own row with its place, and the scores of a row of
        UltraFeedback. A conversation may be called `messages`."""
        rows, scores, key = [], [], self.columns.get("scores") or COMPLETION_SCORE
        for i, entry in enumerate(items(row, "completions", where), 1):
            place = f"{where}, completion {i}"
            entry = as_object(entry, place)
            name = "response" if entry.get("messages") is None else "messages"
            rows.append(({**row, "response": present(entry, name, place)}, place))
            scores.append(float(number(entry, key, place)))
        return rows, scores

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
            return targets_record(prompt, self._one(rows[0], source)[1], source)
        if self.form in SCORED_FORMS:
            return self._scored_record(prompt, rows, source, pair)
        return self._pairs_record(prompt, rows, source, pair)

    def _scored_record(self, prompt, rows: list[dict], source: str, pair) -> Record:
        responses, scores = [], []
        for row in rows:
            if self.form in LIST_FORMS:
                _, of_row, of_responses = self._list(row, source)
                responses.extend(of_row)
                scores.extend(of_responses)
                continue
            response = self._one(row, source)[1]
            if self.form == "scored_rows":
                responses.append(written_response(response, row, source))
                scores.append(float(row["reward"]))
            else:
                responses.append(response)
                scores.append(label_of(row, source))
        return scored_record(prompt, responses, scores, source, pair)

    def _pairs_record(self, prompt, rows: list[dict], source: str, pair) -> Record:
        scores = None
        if self.scores_pairs:
            # The pairs are those of the data: equal scores are dropped only where min_gap asks.
            scored = [row for row in rows if pair.min_gap <= 0 or _gap(row) >= pair.min_gap]
            pair.skipped["pairs with a score gap below min_gap"] += len(rows) - len(scored)
            if not scored:
                raise Skip("prompts whose pairs all have a score gap below min_gap")
            rows = scored
            scores = [tuple(float(row[key]) for key in PAIR_SCORES) for row in rows]
        pairs = [self._pair(row, source)[1:] for row in rows]
        columns = {}
        if any(row.get("magnitude") is not None for row in rows):
            columns["magnitude"] = [number(row, "magnitude", source) for row in rows]
        for name, key in self.numbers.items():
            columns[name] = [number(row, key, source) for row in rows]
        weights = None
        if self.weighs and self.form == "pairs":
            weights = [tuple(tuple(row[key]) for key in TOKEN_WEIGHTS) for row in rows]
        return pairs_record(prompt, pairs, source, columns, scores, weights)


def _is_whole(row: dict, form: str, where: str) -> bool:
    """Whether a response of a row is a conversation of several messages, which needs no prompt."""
    value = row.get(ANSWERS.get(form))
    if form in LIST_FORMS:
        value = value[0] if isinstance(value, list) and value else None
        if form == "completions" and isinstance(value, dict):
            value = value.get("messages") or value.get("response")
    return len(messages_of({"response": value}, "response", where) or ()) > 1


def _has_all(row: dict, keys: Collection[str]) -> bool:
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


def _scored_list(row: dict, where: str) -> tuple[list[tuple[dict, str]], list[float]]:
    """The responses, each in its own row with its place, and the scores of a list."""
    responses, scores = items(row, "responses", where), items(row, "scores", where)
    if len(responses) != len(scores):
        raise DataError(
            f"{where}: {len(responses)} responses and {len(scores)} scores, expected one score for"
            " each response"
        )
    rows = [
        ({**row, "responses": present({"responses": one}, "responses", where)}, where)
        for one in responses
    ]
    return rows, [float(number({"scores": score}, "scores", where)) for score in scores]


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
