"""A user's own data: a path or a hub id, whose columns say what it holds."""

import re
from pathlib import Path

from preflab.readers.fields import items, kind_of, number, present, text
from preflab.readers.files import FILE_TYPES, file_rows, parse_json
from preflab.readers.hub import TEST_NAMES, folder_rows, hub_rows
from preflab.readers.records import Reader, Record, Skip, pairs_record, scored_record
from utils import DataError

# Column sets in the order in which they are looked for.
FORMS = {
    "pairs": ("chosen", "rejected"),
    "j_over_k": ("question", "response_j", "response_k"),
    "scored_rows": ("prompt", "text", "reward"),
    "scored_lists": ("prompt", "responses", "scores"),
    "labelled": ("prompt", "completion", "label"),
    "targets": ("prompt", "chosen"),
    "prompts": ("prompt",),
}


# What a cell of a CSV file is read as, by our name of its column: numbers, or JSON where it begins
# like this.
CSV_NUMBERS = ("reward", "magnitude")


CSV_LISTS = {
    **dict.fromkeys(("responses", "scores"), re.compile(r"\s*\[")),
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), re.compile(r"\s*\[\s*\{")),
}


def accepted_columns() -> str:
    return "; ".join(
        ", ".join(needed if form != "pairs" else ("prompt", *needed))
        for form, needed in FORMS.items()
    )


class UserPairs(Reader):
    """A path or hub id; the columns say what it holds."""

    truncation = "keep_end"

    def __init__(self, name: str):
        self.name = name

    def rows(self, split, options):
        path, self.columns = Path(self.name), options.columns
        if path.is_dir():
            rows = folder_rows(path, split)
        elif path.suffix.lower() in FILE_TYPES or path.exists():
            rows = file_rows(path)
            rows.whole = True
        else:
            rows = hub_rows(self.name, split, options.data_dir, test_names=TEST_NAMES)
        self.all_text = rows.all_text
        if rows.n:
            self._find_form(self._fields(rows.read(0), rows.where(0)), rows.where(0))
        return rows

    def _fields(self, row: dict, where: str) -> dict:
        """The row under our names, where the user said what theirs are; what a CSV has as text, as
        what it stands for."""
        renamed = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        row = {
            key: value for key, value in row.items() if key not in self.columns.values()
        } | renamed
        return (
            {key: csv_cell(value, key, where) for key, value in row.items()}
            if self.all_text
            else row
        )

    def _find_form(self, row: dict, where: str) -> None:
        self.form = next(
            (
                form
                for form, needed in FORMS.items()
                if all(row.get(key) is not None for key in needed)
            ),
            None,
        )
        if self.form is None:
            raise DataError(
                f"{where}: columns {', '.join(map(str, row))}; accepted sets: {accepted_columns()};"
                " dataset_columns renames yours"
            )
        provides = {
            "targets": set(),
            "prompts": set(),
            "pairs": {"pairs"},
            "j_over_k": {"pairs"},
        }.get(self.form, {"pairs", "scores"})
        self.provides = frozenset(provides)
        self.pairing = "all" if "scores" in provides else None
        self.merges, self.only_prompts = self.form != "targets", self.form == "prompts"

    def prompt(self, row, where):
        row = self._fields(row, where)
        if row.get("magnitude") is not None and self.form in ("pairs", "j_over_k"):
            number(row, "magnitude", where)
        if self.form == "pairs":
            return check_pair(row, where)
        if self.form == "j_over_k":
            if text(row, "response_j", where) == text(row, "response_k", where):
                raise Skip("chosen and rejected identical")
            return text(row, "question", where)
        if self.form == "scored_rows":
            text(row, "text", where, may_be_empty=True), number(row, "reward", where)
        elif self.form == "scored_lists":
            if len(items(row, "responses", where)) != len(items(row, "scores", where)):
                raise DataError(
                    f"{where}: {len(row['responses'])} responses and {len(row['scores'])} scores,"
                    " expected as many"
                )
            if not row["responses"]:
                raise Skip("no response")
            for response, score in zip(row["responses"], row["scores"]):
                (
                    text({"responses": response}, "responses", where, may_be_empty=True),
                    number({"scores": score}, "scores", where),
                )
        elif self.form == "labelled":
            response_of(row, "completion", where), label_of(row, where)
        elif self.form == "targets":
            response_of(row, "chosen", where)
        return prompt_of(row, where)

    def record(self, prompt, rows, source, pair):
        rows = [self._fields(row, source) for row in rows]
        if self.form == "prompts":
            return Record(prompt, [""], [], 0, None, {}, source)
        if self.form == "targets":
            return Record(prompt, [response_of(rows[0], "chosen", source)], [], 0, None, {}, source)
        if self.form == "scored_rows":
            scores = [float(row["reward"]) for row in rows]
            return scored_record(prompt, [row["text"] for row in rows], scores, source, pair)
        if self.form == "scored_lists":
            both = [(r, float(s)) for row in rows for r, s in zip(row["responses"], row["scores"])]
            return scored_record(prompt, [r for r, _ in both], [s for _, s in both], source, pair)
        if self.form == "labelled":
            return scored_record(
                prompt,
                [response_of(row, "completion", source) for row in rows],
                [label_of(row, source) for row in rows],
                source,
                pair,
            )
        if self.form == "j_over_k":
            pairs = [(row["response_j"], row["response_k"]) for row in rows]
        else:
            pairs = [
                (response_of(row, "chosen", source), response_of(row, "rejected", source))
                for row in rows
            ]
        columns = {}
        if any(row.get("magnitude") is not None for row in rows):
            columns["magnitude"] = [number(row, "magnitude", source) for row in rows]
        return pairs_record(prompt, pairs, source, columns)


def csv_cell(value: str, key: str, where: str):
    """A number, or a list that is written as JSON, where the column takes one; else the text
    itself, which its reader may refuse."""
    if key in CSV_NUMBERS:
        try:
            return float(value)
        except ValueError:
            return value
    if key not in CSV_LISTS or not CSV_LISTS[key].match(value):
        return value
    try:
        return parse_json(value, f"{where}, {key!r}")
    except DataError as error:
        kind = "a list" if key in ("responses", "scores") else "chat messages"
        raise DataError(
            f"{error}; it begins as {kind} in JSON, as json.dumps writes them; mend it, or save the"
            " data as JSON or parquet"
        ) from error


def check_pair(row: dict, where: str):
    """The prompt of a pair; strings, or chat messages whose last is the response."""
    chosen, rejected = response_of(row, "chosen", where), response_of(row, "rejected", where)
    prompt = prompt_of(row, where)
    if _messages_before(row["chosen"]) != _messages_before(row["rejected"]):
        raise Skip("chosen and rejected have different prompts")
    if chosen == rejected:
        raise Skip("chosen and rejected identical")
    return prompt


def prompt_of(row: dict, where: str):
    """The prompt column, or the messages of `chosen` before its last."""
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("chosen"), list):
        if len(row["chosen"]) < 2:
            raise DataError(
                f"{where}: no 'prompt', and 'chosen' is a single message, expected the messages"
                " before the answer too"
            )
        return [_message(message, "chosen", where) for message in row["chosen"][:-1]]
    if isinstance(prompt, list):
        if not prompt:
            raise DataError(f"{where}: 'prompt' is an empty list, expected chat messages")
        return [_message(message, "prompt", where) for message in prompt]
    return text(row, "prompt", where)


def response_of(row: dict, key: str, where: str) -> str:
    """A response: text, or the content of the last chat message."""
    value = present(row, key, where)
    if not isinstance(value, list):
        return text(row, key, where)
    if not value:
        raise DataError(f"{where}: {key!r} is an empty list, expected chat messages")
    return [_message(message, key, where) for message in value][-1]["content"]


LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


def label_of(row: dict, where: str) -> float:
    """Whether a completion is desirable, as a score: 1 for true and 0 for false, also as numbers or
    as text."""
    label = str(present(row, "label", where)).strip().lower()
    if label not in LABELS:
        raise DataError(
            f"{where}: 'label' is {kind_of(row['label'])}, expected true (desirable) or false"
        )
    return LABELS[label]


def _messages_before(response) -> list:
    """(role, content) of the messages before the last; none for plain text."""
    return [(m["role"], m["content"]) for m in response[:-1]] if isinstance(response, list) else []


def _message(message, key: str, where: str) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(
            f"{where}: a message of {key!r} is {kind_of(message)}, expected {{role, content}}"
        )
    (
        text(message, "role", f"{where}, a message of {key!r}"),
        text(message, "content", f"{where}, a message of {key!r}"),
    )
    return message
