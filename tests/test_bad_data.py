"""Files, names and rows that cannot be read: each error names the place and what is expected."""

import contextlib
import json
import math
import os
import re
import tempfile
from pathlib import Path

import pytest
from conftest import write_jsonl
from dataset_files import PAIRS, as_file, both, hub_cache, named_pairs, read  # noqa: F401
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preflab.readers.registry import open_dataset
from utils import ConfigError, DataError

GOOD = '{"prompt": "p", "text": "t", "reward": 1.0}'


@pytest.mark.parametrize(
    "line, message",
    [
        ("no json", r"imdb-sft-train.jsonl:2: not JSON"),
        ("[1, 2]", r":2: list .*expected an object"),
        ('{"prompt": "p", "text": "t"}', r":2: no 'reward'; it has prompt, text"),
        ('{"prompt": 3, "text": "t", "reward": 1}', r":2: 'prompt' is int '3', expected text"),
        ('{"prompt": " ", "text": "t", "reward": 1}', r":2: 'prompt' is empty"),
        ('{"prompt": "p", "text": ["t"], "reward": 1}', r":2: 'text' is list"),
        (
            '{"prompt": "p", "text": "t", "reward": "1"}',
            r":2: 'reward' is str '1', expected a number",
        ),
        ('{"prompt": "p", "text": "t", "reward": true}', r":2: 'reward' is bool"),
        ('{"prompt": "p", "text": "t", "reward": NaN}', r":2: NaN is not a JSON number"),
        (
            '{"prompt": "p", "text": "t", "reward": 1e999}',
            r":2: 'reward' is inf, expected a finite number",
        ),
        (b'{"prompt": "p\xff", "text": "t", "reward": 1}', r":2: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "imdb-sft-train.jsonl").write_bytes(
        GOOD.encode() + b"\n" + content + b"\n" + GOOD.encode() + b"\n"
    )
    with pytest.raises(DataError, match=message):
        read("imdb", tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"imdb-sft-train\.jsonl: no such file; in .*: nothing"):
        read("imdb", tmp_path)
    (tmp_path / "imdb-sft-train.jsonl").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        read("imdb", tmp_path)
    (tmp_path / "imdb-sft-train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no row"):
        read("imdb", tmp_path)
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    with pytest.raises(DataError, match="expected a list of objects"):
        read(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text('[{"prompt": "p",\n"chosen": }]')
    with pytest.raises(DataError, match=r"a\.json:2: not JSON"):
        read(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no readable parquet"):
        read(tmp_path / "a.parquet", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0], PAIRS[0] | {"magnitude": "1", "rejected": " c"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'magnitude' is str '1', expected a number"):
        read(tmp_path / "a.jsonl", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0] | {"chosen": "\ud800"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'chosen' holds half a surrogate pair"):
        read(tmp_path / "a.jsonl", tmp_path)
    for missing in ({"chosen": ""}, {"rejected": "  "}):
        write_jsonl(tmp_path / "a.jsonl", [*PAIRS[:2], PAIRS[3] | missing])
        with pytest.raises(DataError, match=f"a.jsonl:3: '{next(iter(missing))}' is empty"):
            read(tmp_path / "a.jsonl", tmp_path)


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path):
    content = "\ufeff" + "\r\n".join(
        [GOOD, "", GOOD.replace('"t"', '"ü 😀"').replace("1.0", "2.0"), ""]
    )
    (tmp_path / "imdb-sft-train.jsonl").write_bytes(content.encode())
    records, _ = read("imdb", tmp_path)
    assert named_pairs(records[0]) == [("ü 😀", "t")]


def test_names_and_options_are_checked_at_once(tmp_path):
    with pytest.raises(ConfigError, match="did you mean imdb"):
        open_dataset("imbd", "train")
    with pytest.raises(ConfigError, match="accepted: train, test"):
        open_dataset("imdb", "validation")
    with pytest.raises(ConfigError, match="did you mean best_worst"):
        open_dataset("imdb", "train", pairing="best_wurst")


@pytest.mark.parametrize(
    "name",
    ["/nowhere/pairs", "./pairs", "../pairs", "data/my/pairs", "pairs.jsonl", "me/pairs.parquet"],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr("datasets.load_dataset", lambda name: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    nearest = {"/nowhere/pairs": "/: ", "../pairs": f"{tmp_path}: data/"}
    nearest = nearest.get(name, f"{tmp_path / 'data'}: nothing")
    message = re.escape(f"{Path(name)}: no such file or folder; in {nearest}")
    with pytest.raises(DataError, match=message):
        open_dataset(name, "train", data_dir=str(tmp_path))


def test_a_home_folder_is_not_expanded(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name: pytest.fail("asked the hub"))
    for name in ("~/pairs", "~/pairs.jsonl", "~somebody"):
        with pytest.raises(DataError, match=f"{name}: no such file or folder; ~ is not expanded"):
            open_dataset(name, "train")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "x" * 300 + ".jsonl",
        "x" * 300 + ".parquet",
        "x/" + "y" * 300,
        "y" * 5000 + "/x",
        "x\0y.jsonl",
        "\ud800/x",
    ],
)
def test_names_that_no_file_can_have_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for data_dir in (tmp_path, "d" * 300):
        with pytest.raises(
            (DataError, ConfigError), match=r"File name too long|cannot be loaded|no such file"
        ):
            open_dataset(name, "train", data_dir=str(data_dir))
    with pytest.raises(DataError, match=r"d{300}/imdb-sft-train\.jsonl: File name too long"):
        open_dataset("imdb", "train", data_dir="d" * 300)


def test_a_name_that_yaml_takes_for_a_number_is_refused():
    with pytest.raises(
        ConfigError, match=r"datasets=\[2024\] is int '2024', expected a name.*\./2024"
    ):
        open_dataset(2024, "train")


@contextlib.contextmanager
def without_privileges():
    """As somebody who is not root, to whom alone permissions mean nothing."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_files_that_may_not_be_read_are_named(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for suffix in (".json", ".jsonl", ".csv", ".parquet"):
            as_file(folder / f"x{suffix}", PAIRS).chmod(0)
        posts = folder / "tldr-sft-train-rel.json"
        posts.write_text("{}")
        posts.chmod(0)
        (folder / "closed").mkdir(mode=0)
        folder.chmod(0o755)
        with without_privileges():
            for suffix in (".json", ".jsonl", ".csv", ".parquet"):
                with pytest.raises(DataError, match=rf"/x\{suffix}: .*[Pp]ermission denied"):
                    open_dataset(str(folder / f"x{suffix}"), "train")
            for name in ("closed", "closed/x.jsonl"):
                with pytest.raises(DataError, match=f"/{name}.*: Permission denied"):
                    open_dataset(str(folder / name), "train")
            with pytest.raises(DataError, match=r"rel\.json: Permission denied"):
                open_dataset("tldr", "train", data_dir=str(folder))


def test_what_is_not_a_file_or_is_deleted_is_named(tmp_path):
    (tmp_path / "imdb-sft-train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"imdb-sft-train\.jsonl: a folder, expected a file"):
        read("imdb", tmp_path)
    os.mkfifo(tmp_path / "x.jsonl")  # as a shell makes of <(command)
    with pytest.raises(DataError, match=r"x\.jsonl: a pipe or a device, expected a file"):
        read(tmp_path / "x.jsonl", tmp_path)
    source = open_dataset(str(as_file(tmp_path / "y.jsonl", PAIRS)), "train")
    (tmp_path / "y.jsonl").unlink()
    with pytest.raises(DataError, match=r"y\.jsonl: No such file"):
        list(source.records())


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "text", "reward", "chosen", "rejected", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40), max_size=5),
    st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_whatever_the_bytes_there_are_records_or_an_error_with_a_place(tmp_path, lines, suffix):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        for record in both(path, tmp_path):
            assert record.prompt and record.responses
            assert all(
                record.scores is None or math.isfinite(record.scores[i])
                for pair in record.pairs
                for i in pair
            )
    except DataError as error:
        assert "fuzz" in str(error)
