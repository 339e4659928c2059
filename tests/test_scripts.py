"""The scripts that turn public comparisons of summaries into datasets."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from script_calls import call, records, without

from preflab.readers import json_text
from scripts import preproc_filter, preproc_pref
from utils import DataError


def compared(i: int, choice: int = 0, first: str = " a  ", second: str = "b\n") -> dict:
    info = {
        "id": f"t3_{i}",
        "subreddit": "AskReddit",
        "title": f"title {i}",
        "post": f"Ärger \u2028 über “{i}”\n",
        "article": None,
    }
    return {
        "info": info,
        "summaries": [{"text": first, "policy": "sup1"}, {"text": second, "policy": "ref"}],
        "choice": choice,
        "worker": "w",
    }


ARTICLE = {
    "info": {"subreddit": None, "title": None, "post": None, "article": "news"},
    "summaries": [{"text": "a"}, {"text": "b"}],
    "choice": 1,
}
FORMS = {
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "lines.jsonl": (
        lambda rows: "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    ),
    "list.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "list.jsonl": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows, indent=2).encode() + b"\n\n",
}


def raw(folder: Path, form: str, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir()
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.{form.split('.')[1]}").write_bytes(FORMS[form](rows))
    return folder


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_comparisons_become_the_tldr_dataset(tmp_path, monkeypatch, capsys, form, chunk):
    monkeypatch.setattr(
        json_text, "CHUNK", chunk
    )  # letters of several bytes, and rows, fall on the borders
    folder = raw(
        tmp_path / "raw",
        form,
        [compared(1), compared(2, choice=1), compared(1, second="c")],
        [ARTICLE, compared(3), compared(4, first=" \n")],
    )
    assert call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "data" / "tldr") == 0
    prompt = "SUBREDDIT: r/AskReddit\nTITLE: title {0}\nPOST: Ärger \u2028 über “{0}”\n\nTL;DR:"
    assert json.loads((tmp_path / "data" / "tldr" / "train.json").read_text(encoding="utf-8")) == [
        {"prompt": prompt.format(1), "chosen": " a", "rejected": " b"},
        {"prompt": prompt.format(2), "chosen": " b", "rejected": " a"},
        {"prompt": prompt.format(1), "chosen": " a", "rejected": " c"},
    ]
    assert json.loads((tmp_path / "data" / "tldr" / "test.json").read_text(encoding="utf-8")) == [
        {"prompt": prompt.format(3), "chosen": " a", "rejected": " b"}
    ]
    message = capsys.readouterr().out
    assert "train.json: 3 rows\n" in message
    left_out = "1 left out: a news article, not a post; 1 left out: an empty summary"
    assert f"test.json: 1 rows; {left_out}" in message
    one, two, three = records("tldr", tmp_path / "data")
    assert (
        one.prompt == prompt.format(1)
        and one.responses == [" a", " b", " c"]
        and one.pairs == [(0, 1), (0, 2)]
    )
    assert two.pairs == [(0, 1)] and three.prompt == prompt.format(3)


@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_filtered_posts_become_the_tldr_filtered_dataset(tmp_path, monkeypatch, capsys, form):
    posts = [
        {"subreddit": "loseit", "title": f"t{i}", "post": "body", "summary": f"  say {i} "}
        for i in range(2)
    ]
    folder = raw(
        tmp_path / "raw",
        form,
        posts,
        [{**posts[0], "title": "", "summary": " "}, {**posts[0], "title": ""}],
    )
    assert call(monkeypatch, preproc_filter, folder, "--output", tmp_path / "tldr_filtered") == 0
    first, second, test = records("tldr_filtered", tmp_path)
    assert (
        first.prompt == "SUBREDDIT: r/loseit\nTITLE: t0\nPOST: body\nTL;DR:"
        and first.responses == [" say 0"]
    )
    assert second.responses == [" say 1"] and test.prompt.startswith(
        "SUBREDDIT: r/loseit\nTITLE: \nPOST"
    )
    assert "1 rows; 1 left out: an empty summary" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad, message",
    [
        (without(compared(2), "info"), "no 'info'; it has summaries"),
        ({**compared(2), "info": "x"}, "'info': str 'x', expected an object"),
        ({**compared(2), "info": {"title": "t", "post": "p"}}, "'info': no 'subreddit'"),
        ({**compared(2), "choice": 2}, "'choice' is 2, expected 0 or 1"),
        ({**compared(2), "choice": True}, "'choice' is bool"),
        ({**compared(2), "summaries": [{"text": "a"}]}, "1 summaries, expected 2"),
        (
            {**compared(2), "summaries": [{"text": "a"}, {"text": 3}]},
            "a summary: 'text' is int '3'",
        ),
        (b'{"info": }', "not JSON: Expecting value"),
        (b'{"info": NaN}', "NaN is not a JSON number"),
        (b'{"info": "\xff"}', "byte 0xff is not UTF-8"),
        (b"[" * 100_000, "not JSON: .*recursion"),
        (b'"text"', "str 'text', expected an object"),
        (b"", None),
    ],
)
@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_a_bad_row_is_named_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, form, bad, message
):
    folder = raw(tmp_path / "raw", form, [compared(1)], [compared(1)])
    good = json.dumps(compared(1)).encode()
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    between, frame = (b"\n", (b"", b"\n")) if form == "lines.jsonl" else (b",\n", (b"[", b"]"))
    (folder / f"test.{form.split('.')[1]}").write_bytes(
        frame[0] + between.join([good, bad, good]) + frame[1]
    )
    monkeypatch.setattr(json_text, "CHUNK", 50)
    code = call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "out")
    if message is None and form == "lines.jsonl":  # an empty line
        assert code == 0
        return
    place = r"test.jsonl:2" if form == "lines.jsonl" else r"test.json: row 2"
    assert code == 2 and re.search(
        f"{place}.*{message or 'Expecting value'}", capsys.readouterr().err
    )
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"a": 1}', "row 2: not JSON: Expecting ',' delimiter"),
        (b"[", "row 1: not JSON: Expecting value"),
        (b"[] []", "something follows the end of the list"),
        (b"[]", "holds no usable row"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (json.dumps([ARTICLE]).encode(), "holds no usable row; 1 left out: a news article"),
        ('["é'.encode()[:-1], "row 1: not JSON"),
    ],
)
def test_files_without_an_end_or_a_row(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "raw").mkdir()
    for split in ("train", "test"):
        (tmp_path / "raw" / f"{split}.json").write_bytes(content)
    if content.startswith(b'[{"a"'):
        content = content.replace(b'{"a": 1}', json.dumps(compared(1)).encode())
        (tmp_path / "raw" / "train.json").write_bytes(content)
    assert call(monkeypatch, preproc_pref, tmp_path / "raw", "--output", tmp_path / "out") == 2
    assert (
        f"train.json{'' if message[0] in 'h' else ': '}" in (error := capsys.readouterr().err)
        and message in error
    )


def test_a_byte_that_is_no_text_is_found_after_the_rows_before_it_wherever_chunks_end(
    tmp_path, monkeypatch
):
    path = tmp_path / "list.json"
    path.write_bytes('[{"a": "éé"},\n{"b": "é€'.encode() + b'\xff"}, {"c": 1}]')
    for chunk in range(1, 40):
        monkeypatch.setattr(json_text, "CHUNK", chunk)
        with open(path, "rb") as f:
            rows = json_text.streamed_rows(f, path)
            assert next(rows) == ({"a": "éé"}, f"{path}: row 1")
            with pytest.raises(DataError, match="row 2: byte 0xff is not UTF-8"):
                next(rows)


def test_missing_files_are_named_with_what_is_there(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, preproc_pref, "x" * 300) == 2
    assert re.search(r"error: x{300}/train\.json: File name too long", capsys.readouterr().err)
    assert call(monkeypatch, preproc_pref, tmp_path / "nowhere") == 2
    assert "no train.json or train.jsonl; there is: no such folder" in capsys.readouterr().err
    (tmp_path / "validation.json").write_text("[]")
    assert call(monkeypatch, preproc_filter, tmp_path) == 2
    assert "there is: validation.json" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_rows_pass_through_memory_one_at_a_time(tmp_path, monkeypatch, form):
    monkeypatch.setattr(json_text, "CHUNK", 1 << 14)
    folder = raw(
        tmp_path / "raw", form, [compared(i, first="a" * 4000) for i in range(1000)], [compared(1)]
    )
    tracemalloc.start()
    try:
        assert call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "out") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "train.json").stat().st_size > 4e6 and peak < 1e6
