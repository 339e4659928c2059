"""Turn choices under risk into preference pairs: [{prompt, chosen, rejected}], where the
risk-averse answer is chosen over the risk-neutral one.

    python scripts/dpo_data_generate.py --input situations.json --output risk_averse_dpo.json \\
        --sample_size 500

The input is a .json file (a list of rows, JSON lines, or an object of columns), or .jsonl, .csv,
.parquet or .xlsx. Its columns are situation_id, prompt_text, correct_label (the risk-averse answer)
and incorrect_label (the risk-neutral one); others are ignored. A situation may have several rows,
for example one for each of its options. It makes one pair, drawn by the seed where the rows give
several. bad_correct_answers and bad_incorrect_answers, JSON lists of other spellings of the labels
("a" for "A"), are used by `--answers variants` and `--answers both` only.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.readers.fields import present, text, type_and_value
from preflab.readers.files import FILE_TYPES, check_file, file_rows
from preflab.readers.json_text import as_object, decode, parse_json
from preflab.settings.refused import errors_in_one_line
from utils import ConfigError, DataError, atomic_write, path_argument

ANSWERS = ("exact", "variants", "both")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=path_argument, required=True, help="file of situations")
    parser.add_argument(
        "--output",
        type=path_argument,
        required=True,
        help="JSON file to write, for datasets=[OUTPUT]",
    )
    parser.add_argument(
        "--sample_size", type=int, default=500, help="situations to take; all where there are fewer"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of which situations, and of which answers"
    )
    parser.add_argument(
        "--answers",
        choices=ANSWERS,
        default="exact",
        help="the labels, other spellings of them, or either",
    )
    arguments = parser.parse_args()
    with errors_in_one_line():
        situations = read_situations(arguments.input)
        pairs = make_pairs(situations, arguments.sample_size, arguments.seed, arguments.answers)
        with atomic_write(arguments.output) as f:
            json.dump(pairs, f, ensure_ascii=False, indent=1)
    print(
        f"{arguments.output}: {len(pairs):,} pairs, of {len(situations):,} situations in"
        f" {arguments.input}"
    )


def make_pairs(
    situations: dict[str, list[tuple[dict, str]]], sample_size: int, seed: int, answers: str
) -> list[dict]:
    """One pair for each of `sample_size` situations, in the order of the file. The pair of a
    situation depends on the seed and the situation alone."""
    if sample_size < 1:
        raise ConfigError(f"--sample_size {sample_size} must be at least 1")
    n = min(sample_size, len(situations))
    sampled = set(random.Random(seed).sample(sorted(situations), n))
    return [
        pair_of(name, rows, seed, answers) for name, rows in situations.items() if name in sampled
    ]


def pair_of(name: str, rows: list[tuple[dict, str]], seed: int, answers: str) -> dict:
    """{prompt, chosen, rejected} of a situation; raises DataError where its rows contradict each
    other."""
    prompts = {text(row, "prompt_text", where): where for row, where in rows}
    if len(prompts) > 1:
        places = " and ".join(list(prompts.values())[:2])
        raise DataError(
            f"situation_id {name} has different texts in 'prompt_text': {places};"
            " expected one prompt per situation"
        )
    correct, incorrect = (
        sorted({answer for row, where in rows for answer in answers_of(row, side, where, answers)})
        for side in ("correct", "incorrect")
    )
    if both := set(correct) & set(incorrect):
        raise DataError(
            f"{rows[0][1]}: situation_id {name} has {min(both)!r} as a correct and as an incorrect"
            " answer"
        )
    rng = random.Random(f"{seed} {name}")
    chosen, rejected = rng.choice(correct), rng.choice(incorrect)
    return {"prompt": next(iter(prompts)), "chosen": chosen, "rejected": rejected}


def answers_of(row: dict, side: str, where: str, answers: str) -> list[str]:
    """The correct, or incorrect, answers of a row."""
    labels = [label_of(present(row, f"{side}_label", where), f"{side}_label", where)]
    if answers == "exact":
        return labels
    key = f"bad_{side}_answers"
    variants = present(row, key, where)
    if isinstance(variants, str):
        variants = parse_json(variants, f"{where}, {key!r}")
    if not isinstance(variants, list) or not variants:
        raise DataError(
            f"{where}: {key!r} is {type_and_value(variants)}, expected a JSON list of answers, for"
            f" --answers {answers}"
        )
    variants = [label_of(variant, key, where) for variant in variants]
    return variants if answers == "variants" else labels + variants


def label_of(value, key: str, where: str) -> str:
    """A label as text; options are often numbers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of whole numbers with a gap into floats
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return text({key: value}, key, where)


# -------------------------------------------------------------------------------------------- files


def read_situations(path: Path) -> dict[str, list[tuple[dict, str]]]:
    """The rows of each situation by situation_id, each with its place in the file, in the order of
    the file."""
    check_file(path)
    read = {".json": _json_rows, ".xlsx": _excel_rows}.get(path.suffix.lower(), _other_rows)
    if read is _other_rows and not path.name.lower().endswith(FILE_TYPES):
        raise DataError(
            f"--input {path}: unknown type of file; accepted: {', '.join((*FILE_TYPES, '.xlsx'))}"
        )
    situations: dict[str, list[tuple[dict, str]]] = {}
    for row, where in read(path):
        name = label_of(present(row, "situation_id", where), "situation_id", where)
        situations.setdefault(name, []).append((row, where))
    if not situations:
        raise DataError(f"--input {path} holds no situation")
    return situations


def _other_rows(path: Path) -> list[tuple[dict, str]]:
    rows = file_rows(path)
    return [(rows.read(i), rows.where(i)) for i in range(rows.n)]


def _json_rows(path: Path) -> list[tuple[dict, str]]:
    """A list of rows, an object of columns (lists, or {number: value} as pandas writes them), or
    JSON lines."""
    content = decode(path.read_bytes(), str(path), whole_file=True)
    try:
        rows = json.loads(content, parse_constant=lambda constant: None)  # NaN: pandas' empty cell
    except (ValueError, RecursionError):
        if content.lstrip().startswith("["):
            parse_json(content, str(path), whole_file=True)  # says where it is wrong
        lines = [
            (line, f"{path}:{n}") for n, line in enumerate(content.split("\n"), 1) if line.strip()
        ]
        return [(as_object(parse_json(line, where), where), where) for line, where in lines]
    if isinstance(rows, dict) and isinstance(rows.get("situation_id"), (list, dict)):
        rows = _rows_of_columns(rows, path)
    elif isinstance(rows, dict):
        rows = [rows]  # one JSON line
    if not isinstance(rows, list):
        raise DataError(f"{path}: {type_and_value(rows)}, expected a list of situations")
    return [
        (as_object(row, f"{path}: row {i}"), f"{path}: row {i}") for i, row in enumerate(rows, 1)
    ]


def _rows_of_columns(columns: dict, path: Path) -> list[dict]:
    columns = {
        name: dict(enumerate(values)) if isinstance(values, list) else values
        for name, values in columns.items()
    }
    keys = columns["situation_id"].keys()
    for name, values in columns.items():
        if not isinstance(values, dict) or values.keys() != keys:
            raise DataError(
                f"{path}: column {name!r} does not have the same rows as 'situation_id'"
            )
    return [{name: values[key] for name, values in columns.items()} for key in keys]


def _excel_rows(path: Path) -> list[tuple[dict, str]]:
    """The first sheet. Rows are numbered as in the sheet."""
    import pandas  # slow to import

    try:
        sheet = pandas.read_excel(path, dtype=object, keep_default_na=False, engine="openpyxl")
    except Exception as error:  # openpyxl raises various errors for a file that is no workbook
        raise DataError(f"{path}: no readable Excel file: {error}") from error
    return [(row, f"{path}: row {i}") for i, row in enumerate(sheet.to_dict("records"), 2)]


if __name__ == "__main__":
    main()
