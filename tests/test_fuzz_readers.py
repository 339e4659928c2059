"""Whatever a file holds, reading and tokenising it gives valid records or a PrefLabError with a
place."""

import csv
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preference_datasets
from preflab.batching.token_store import prepare, tokenise
from preflab.batching.truncation import truncate
from preflab.readers.columns import FORMS
from preflab.readers.files import Rows
from preflab.readers.registry import DATASETS, open_dataset
from utils import PrefLabError

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MAX_LENGTH, MAX_PROMPT_LENGTH = 24, 12
# Examples of each test; the same ones every time, unless FUZZ_EXAMPLES is set.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
FOLDER = "-dossier ü 数据"  # a dash, spaces and letters beyond ASCII in every path

fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FUZZ_EXAMPLES" not in os.environ,
)

# Line breaks of `splitlines` that are none in JSON lines or CSV, characters with a meaning in CSV
# or HTML, half a surrogate pair, ...
NASTY = [
    "",
    " ",
    "\x00",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1c",
    "\r",
    "\r\n",
    '"',
    "\\",
    "a,b",
    "<|endoftext|>",
    "\ud800",
    "\U0001f600",
    "\n\nAssistant:",
    "<![",
    "&#xD800;",
    "<code>",
    "=1",
    "x" * 300,
]
TEXTS = (
    st.sampled_from(NASTY)
    | st.text(max_size=12)
    | st.lists(st.sampled_from(NASTY), max_size=4).map("".join)
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.integers(10**30, 10**40) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            TEXTS | st.sampled_from(["role", "content", "text", "pm_score"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
NUMBERS = st.integers(-3, 3) | st.floats(-2, 2)
PROMPTS = st.sampled_from(["p", "q", "\n\nHuman: hi\n\nAssistant:"]) | TEXTS


def mostly(good):
    """A valid value; in one of 16 draws any JSON at all."""
    return st.integers(0, 15).flatmap(lambda i: JSON if i == 0 else good)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROLES = st.sampled_from(["user", "assistant"])
CHAT = st.builds(chat, st.sampled_from("pq"), TEXTS)
MESSAGE = st.fixed_dictionaries({"role": mostly(ROLES), "content": mostly(TEXTS)})
MESSAGES = CHAT | CHAT.map(lambda chat: chat[:1]) | st.lists(mostly(MESSAGE), max_size=3)
ANSWER = st.fixed_dictionaries({"text": mostly(TEXTS), "pm_score": mostly(NUMBERS)})
ANSWERS = st.lists(mostly(ANSWER), max_size=3)
LISTS = {
    "responses": st.lists(mostly(TEXTS), max_size=3),
    "scores": st.lists(mostly(NUMBERS), max_size=3),
}
DIALOGUES = st.builds(
    "{}{}".format, st.sampled_from(["\n\nHuman: hi\n\nAssistant:", "\n\nHuman: ", ""]), TEXTS
)
VALUES = {
    "prompt": PROMPTS,
    "question": PROMPTS,
    "magnitude": NUMBERS,
    "reward": NUMBERS,
    "label": st.sampled_from([True, False, 0, 1, "true"]),
    **LISTS,
}
COLUMNS = {
    form: {name: VALUES.get(name, TEXTS) for name in ("prompt", *columns)}
    for form, columns in FORMS.items()
}
COLUMNS["pairs"]["magnitude"] = COLUMNS["j_over_k"]["magnitude"] = NUMBERS
COLUMNS["messages"] = {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}
COLUMNS["messages alone"] = {"chosen": MESSAGES, "rejected": MESSAGES}


def rows_of(columns: dict):
    """Rows of some columns, whose values are mostly valid; in some rows columns are missing."""
    columns = {name: mostly(values) for name, values in columns.items()}
    row = st.fixed_dictionaries({}, optional=columns)
    whole = st.fixed_dictionaries(columns)
    return st.lists(whole | whole | whole | row, min_size=1, max_size=6)


def check(name: str, data_dir: Path, place: str, in_row: bool) -> None:
    """Read both splits and tokenise them; any error must name `place`, followed by a line, row or
    post if `in_row`."""
    try:
        for split in ("train", "test"):
            source = open_dataset(name, split, data_dir=str(data_dir))
            for record in source.records():
                check_record(record, source.truncation)
                if record.scores is not None:
                    assert all(record.scores[a] > record.scores[b] for a, b in record.pairs)
    except PrefLabError as error:
        message = str(error)
        assert place in message
        _, rest = message.split(place, 1)
        of_the_file = r"holds one prompt only|holds no row|the file is empty"
        assert not in_row or re.search(rf"(:|row |post )\d+|{of_the_file}", rest), message


def check_record(record, truncation: str) -> None:
    assert record.prompt and record.responses and 0 <= record.sft_target < len(record.responses)
    assert all(isinstance(response, str) for response in record.responses)
    assert all(0 <= i < len(record.responses) for pair in record.pairs for i in pair)
    assert record.scores is None or all(map(math.isfinite, record.scores))
    assert all(
        len(values) == len(record.pairs) and all(map(math.isfinite, values))
        for values in record.columns.values()
    )
    (prompt,), (whole,), *_ = tokenise([record], TOKENIZER)
    is_chat = not isinstance(record.prompt, str)
    prompt, responses, (prompt_cut, cuts) = truncate(
        prompt, whole, TOKENIZER, truncation, MAX_LENGTH, MAX_PROMPT_LENGTH, chat=is_chat
    )
    assert is_chat or prompt[0] == TOKENIZER.bos_token_id
    assert not prompt_cut or len(prompt) == MAX_PROMPT_LENGTH
    if not is_chat:
        whole = [[*uncut, TOKENIZER.eos_token_id] for uncut in whole]
    for tokens, uncut, cut in zip(responses, whole, cuts, strict=True):
        assert len(prompt) + len(tokens) <= MAX_LENGTH
        assert tokens == (uncut[: len(tokens)] if cut else uncut)


def as_jsonl(rows, newline, bom) -> bytes:
    return bom + newline.join([json.dumps(row).encode() for row in rows])


def as_json(rows, newline, bom) -> bytes:
    return bom + json.dumps(rows, indent=1).encode().replace(b"\n", newline)


def as_csv(rows, newline, bom) -> bytes:
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(out, lineterminator=newline.decode())
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name, "") for name in names]
        writer.writerow(
            [json.dumps(cell) if isinstance(cell, (list, dict)) else cell for cell in cells]
        )
    return bom + out.getvalue().encode("utf-8", "surrogatepass")


FORMATS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / FOLDER).mkdir()
    return tmp_path / FOLDER


@pytest.mark.parametrize("form", COLUMNS)
@fuzz
@given(
    data=st.data(),
    suffix=st.sampled_from(list(FORMATS)),
    newline=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    bom=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_rows_of_mixed_types(folder, form, data, suffix, newline, bom):
    path = folder / f"my pairs{suffix}"
    path.write_bytes(FORMATS[suffix](data.draw(rows_of(COLUMNS[form])), newline, bom))
    check(str(path), folder, str(path), in_row=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@fuzz
@given(data=st.data(), form=st.sampled_from(["pairs", "scored_rows"]))
def test_corrupted_bytes(folder, suffix, data, form):
    """A valid file with some of its bytes changed, dropped or inserted."""
    numbers, texts = st.integers(0, 3), st.sampled_from(["p", "q", "r"])
    valid = {name: numbers if name in ("reward", "magnitude") else texts for name in COLUMNS[form]}
    rows = data.draw(st.lists(st.fixed_dictionaries(valid), min_size=2, max_size=5))
    path = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        content = bytearray(path.read_bytes())
    else:
        content = bytearray(FORMATS[suffix](rows, b"\n", b""))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    check(str(path), folder, str(path), in_row=False)


POST = st.fixed_dictionaries(
    {"responses": mostly(LISTS["responses"]), "rewards": mostly(LISTS["scores"])},
    optional={"post": JSON},
)
NAMED = {
    **{
        name: (reader.file.replace("{split}", "{}"), rows_of(COLUMNS["scored_rows"]))
        for name, reader in DATASETS.items()
        if isinstance(reader, preference_datasets.ScoredLines)
    },
    "tldr rated": (
        "tldr-sft-{}-rel.json",
        mostly(st.dictionaries(TEXTS, mostly(POST), max_size=4)),
    ),
    "tldr": ("tldr/{}.json", rows_of(COLUMNS["pairs"]) | rows_of(COLUMNS["messages"])),
    "tldr_filtered": ("tldr_filtered/{}.json", rows_of(COLUMNS["targets"])),
}
HUB = {
    "hh": {"chosen": DIALOGUES, "rejected": DIALOGUES},
    "shp": {
        "history": TEXTS,
        "human_ref_A": TEXTS,
        "human_ref_B": TEXTS,
        "score_A": NUMBERS,
        "score_B": NUMBERS,
        "labels": st.integers(0, 1),
    },
    "se": {"question": TEXTS, "answers": ANSWERS},
}


def test_every_named_dataset_is_tried():
    tried = {name.split()[0] for name in NAMED} | set(HUB)
    own = {
        name
        for name, reader in DATASETS.items()
        if type(reader).__module__ == "preference_datasets"
    }
    assert not own - tried, "add their files to NAMED, or their columns to HUB"


@pytest.mark.parametrize("name", NAMED)
@fuzz
@given(data=st.data())
def test_files_of_named_datasets(folder, name, data):
    file, content = NAMED[name]
    (folder / file).parent.mkdir(exist_ok=True)
    rows = data.draw(content)
    for split in ("train", "test"):
        path = folder / file.format(split)
        path.write_bytes(FORMATS[path.suffix](rows, b"\n", b""))
    in_row = isinstance(rows, list) and name != "tldr rated"
    check(name.split()[0], folder, file.format("train"), in_row=in_row)


def put_on_the_hub(monkeypatch, rows: list[dict]) -> None:
    """Every hub dataset of the named readers has these rows in each split."""
    there = Rows(len(rows), rows.__getitem__, lambda i: f"repo[train]:{i}", "fingerprint")
    monkeypatch.setattr(preference_datasets, "hub_rows", lambda *args, **options: there)


@pytest.mark.parametrize("name", HUB)
@fuzz
@given(data=st.data())
def test_rows_of_hub_sets(folder, monkeypatch, name, data):
    put_on_the_hub(monkeypatch, data.draw(rows_of(HUB[name])))
    check(name, folder, "repo[train]", in_row=True)


# ------------------------------------------------------------------- files that are known to be odd


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        # With any other line break, csv's writer does not quote a lone \r.
        path.write_bytes(FORMATS[path.suffix](rows, b"\r\n", b""))
    return str(path)


def stored(name: str, cache_dir: Path) -> dict[str, list[str]]:
    """The responses to each prompt, as the token store has them on disk."""
    responses = {}
    sizes = {"max_length": 2**22, "max_prompt_length": 2**21}
    for split in ("train", "test"):
        source = open_dataset(name, split)
        store = prepare(source, TOKENIZER, cache_dir=cache_dir, **sizes)
        for i, (begin, end) in enumerate(store.prompts):
            spans = store.responses[np.asarray(store.response_prompt) == i]
            assert all(store.tokens[last - 1] == TOKENIZER.eos_token_id for _, last in spans)
            assert str(store.sources[i]).startswith(name)
            prompt = TOKENIZER.decode(store.tokens[begin + 1 : end])
            responses[prompt] = [TOKENIZER.decode(store.tokens[b : e - 1]) for b, e in spans]
    return responses


@pytest.mark.parametrize("suffix", [*FORMATS, ".parquet"])
def test_odd_texts_come_through_unchanged(folder, tmp_path, suffix):
    odd = [text for text in NASTY if text not in ("\ud800", "<|endoftext|>")]
    rows = [
        {"prompt": f"p{i}", "chosen": f"{text} a {text}", "rejected": f"b{text}"}
        for i, text in enumerate([*odd, "".join(odd)])
    ]
    expected = {row["prompt"]: [row["chosen"], row["rejected"]] for row in rows}
    assert stored(write(folder / f"my pairs{suffix}", rows), tmp_path / "cache") == expected


LONG = "".join(text for text in NASTY if text not in ("\ud800", "<|endoftext|>")) * 3100


@pytest.mark.parametrize("suffix", [*FORMATS, ".parquet"])
def test_rows_of_a_megabyte(folder, suffix):
    name = write(
        folder / f"long{suffix}",
        [{"prompt": p, "chosen": f"{p}{LONG}", "rejected": LONG} for p in "pqr"],
    )
    responses = {
        record.prompt: record.responses
        for split in ("train", "test")
        for record in open_dataset(name, split).records()
    }
    assert responses == {p: [p + LONG, LONG] for p in "pqr"} and len(LONG) > 2**20


def test_a_row_of_a_megabyte_is_tokenised(folder, tmp_path):
    name = write(
        folder / "long.csv",
        [
            {"prompt": "p", "chosen": LONG, "rejected": "b"},
            {"prompt": "q", "chosen": "a", "rejected": "b"},
        ],
    )
    assert stored(name, tmp_path / "cache") == {"p": [LONG, "b"], "q": ["a", "b"]}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "newline, bom",
    [(b"\n", b""), (b"\r\n", b"\xef\xbb\xbf"), (b"\n\n\n", b""), (b"\r\n\r\n", b"\xef\xbb\xbf")],
)
def test_ends_of_lines_and_a_byte_order_mark_change_no_token(
    folder, tmp_path, monkeypatch, suffix, newline, bom
):
    """Nor does a path that begins with a dash, has spaces and is not absolute."""
    rows = [{"prompt": f"p {i}", "chosen": f" ü, {i}", "rejected": ' "b"'} for i in range(4)]
    monkeypatch.chdir(folder)
    Path(f"-my pairs ü{suffix}").write_bytes(FORMATS[suffix](rows, newline, bom))
    assert stored(f"-my pairs ü{suffix}", tmp_path / "cache") == {
        row["prompt"]: [row["chosen"], row["rejected"]] for row in rows
    }


ROW = '{"prompt": "p", "chosen": "a", "rejected": "b"}'
ODD = {
    "no bytes.json": (b"", "the file is empty"),
    "blank lines.jsonl": (b"\n\r\n \n", "holds no row"),
    "byte order mark.jsonl": (b"\xef\xbb\xbf", "holds no row"),
    "brackets.json": (b"[" * 200_000, "not JSON: .*recursion"),
    "objects.jsonl": (b'{"prompt":' * 100_000, ":1: not JSON: .*recursion"),
    "deep field.jsonl": (
        f'{ROW}\n{{"prompt": {"[" * 900}{"]" * 900}, "chosen": "a", "rejected": "b"}}\n'.encode(),
        ":2: a message of 'prompt' is list",
    ),
    "digits.jsonl": (
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "magnitude": ' + b"1" * 5000 + b"}",
        ":1: not JSON: .*4300 digits",
    ),
    "not a number.json": (
        b'[{"prompt": "p", "text": "a", "reward": 1}, {"prompt": "p", "text": "b", "reward": NaN}]',
        "row 2: 'reward' is nan, expected a finite number",
    ),
    "surrogate in a name.jsonl": (b'{"\\ud800": "p"}', r":1: columns"),
    "surrogate in a role.jsonl": (
        (
            b'{"chosen": [{"role": "\\udfff", "content": "p"}, {"role": "a", "content": "b"}],'
            b' "rejected": "b"}'
        ),
        ":1, a message of 'chosen': 'role' holds half a surrogate pair",
    ),
    "later messages.jsonl": (
        ROW.encode() + b'\n{"prompt": "p", "chosen": [null, null], "rejected": "b"}',
        ":2: a message of 'chosen' is NoneType",
    ),
    "utf-16.jsonl": (ROW.encode("utf-16"), ":1: byte 0xff is not UTF-8"),
    "latin-1.csv": (
        "prompt,chosen,rejected\np,é,b\n".encode("latin-1"),
        ":2: byte 0xe9 is not UTF-8",
    ),
    "quote.csv": (
        b'prompt,chosen,rejected\np,a,b\nq,"a"x,b\n',
        ":3: no readable CSV: ',' expected",
    ),
    "open quote.csv": (b'prompt,chosen,rejected\np,"a,b\n', "no readable CSV: unexpected end"),
    "header.csv": (b"prompt,chosen,rejected\n", "holds a header and no row"),
    "cut.parquet": (None, "no readable parquet"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_refused_with_a_place(folder, name):
    content, message = ODD[name]
    if content is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(ROW)]), folder / name)
        content = (folder / name).read_bytes()[:-20]
    (folder / name).write_bytes(content)
    with pytest.raises(PrefLabError, match=re.escape(name) + ".*" + message):
        list(open_dataset(str(folder / name), "train").records())


def test_parquet_text_that_is_not_utf8(folder):
    offsets = pyarrow.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    content = pyarrow.py_buffer(b"\xff\xfe")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, content])
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": broken, "chosen": ["a", "b"], "rejected": ["c", "d"]}),
        folder / "pairs.parquet",
    )
    with pytest.raises(PrefLabError, match=r"pairs\.parquet: no readable parquet file: .*0xff"):
        open_dataset(str(folder / "pairs.parquet"), "train")


def test_chat_messages_in_the_files_of_tldr(folder):
    row = {"chosen": chat("post", "good"), "rejected": chat("post", "bad")}
    (folder / "tldr").mkdir()
    write(folder / "tldr" / "train.json", [row])
    (record,) = open_dataset("tldr", "train", data_dir=str(folder)).records()
    assert record.prompt.messages == chat("post", "good")[:1]
    assert record.responses == ["good", "bad"] and record.pairs == [(0, 1)]


def test_an_answer_that_is_no_object(monkeypatch):
    row = {"question": "q", "answers": [{"text": "a", "pm_score": 1}, None]}
    put_on_the_hub(monkeypatch, [row] * 2)
    match = r"repo\[train\]:\d, answer 2: NoneType 'None', expected an object"
    with pytest.raises(PrefLabError, match=match):
        list(open_dataset("se", "train").records())


def test_html_that_cannot_be_parsed_is_skipped_and_counted(folder, monkeypatch):
    answers = [{"text": "<p>yes</p>", "pm_score": 2}, {"text": "<p>no</p>", "pm_score": 1}]
    rows = [
        {"question": f"<p>q{i}</p>" if i % 2 else "<![0 x", "answers": answers} for i in range(300)
    ]
    put_on_the_hub(monkeypatch, rows)
    source = open_dataset("se", "train")
    assert {record.responses[0] for record in source.records()} == {" yes"}
    assert source.counts["rows"] + source.counts["skipped"]["HTML that cannot be read"] == 297
