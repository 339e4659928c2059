"""Rows of folders and of hub datasets.

A folder holds train and test files, or what `datasets.save_to_disk` wrote, or files laid out as on
the hub.
"""

import glob
import re
from pathlib import Path

from preflab.readers.files import FILE_TYPES, Rows, file_rows, list_folder, without_fillers
from utils import DataError, content_hash

TEST_NAMES = ("test", "validation")
NO_NAMES = (None, None)
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# The words by which `datasets` knows a split, in the name of a file or folder.
SPLIT_WORD = re.compile(
    r"(?<![a-z0-9])(train|training|test|testing|eval|evaluation|valid|validation|val|dev)(?![a-z])",
    re.IGNORECASE,
)
HUB_PREFIX = "the hub dataset "  # in front of a repository's name in messages


def folder_rows(path: Path, split: str, named: tuple[str | None, str | None] = NO_NAMES) -> Rows:
    """A split of a folder.

    A folder is read as a hub dataset where its README.md lists configs, or where a file is named as
    one of the train split (data/train-00000-of-00001.parquet).

    named: `train_split` and `test_split`, the names of the user's splits; see `_choose`.
    """
    if _has_named_files(path, named):
        name, whole = _choose(str(path), _data_files(path), split, TEST_NAMES, named)
        rows = file_rows(_file_named(path, name))
        rows.whole = whole
        return rows
    if not _is_saved_dataset(path) and not _lists_configs(path):
        train = _file_named(path, "train")
        test = _file_named(path, "test") or _file_named(path, "validation")
        if train and not any(named):
            rows = file_rows(test if test and split == "test" else train)
            rows.whole = test is None
            return rows
        if not (any(named) or _names_a_train_split(path)):
            raise DataError(
                f"{path}: no file named train of type {', '.join(FILE_TYPES)}, no"
                " data/train-*.parquet or README.md with configs as on the hub, and nothing that"
                f" save_to_disk of datasets wrote; there is: {list_folder(path)}"
            )
    advice = "; repair the folder, or give one file of it by its name"
    splits = _load(path, str(path), advice)
    _check_one_source(path, named)
    fingerprint = content_hash(split, *_visible_files(path))
    return _split_rows(str(path), splits, split, TEST_NAMES, fingerprint, named)


def hub_rows(
    repo: str,
    split: str,
    data_dir: str,
    *,
    test_names=("test",),
    only: str | None = None,
    named: tuple[str | None, str | None] = NO_NAMES,
) -> Rows:
    """A split of a hub dataset, or of its local copy in `data_dir/repo`; rows stay in memory-mapped
    Arrow files.

    test_names: names that the test split may have, the first that exists is taken. only: a split to
    read as if there were no other, which makes it `whole`. named: as in `folder_rows`.
    """
    copy = Path(data_dir) / repo
    has_copy = copy.is_dir()
    if has_copy and _has_named_files(copy, named):
        return folder_rows(copy, split, named)
    advice = (
        "; without network, or for one config of several, put a copy with train and test files in"
        f" {copy}"
    )
    splits = _load(copy if has_copy else repo, f"{HUB_PREFIX}{repo}", advice)
    if has_copy:
        _check_one_source(copy, named)
    if only in splits:
        splits = {only: splits[only]}
    fingerprint = content_hash(split, *_visible_files(copy)) if has_copy else None
    return _split_rows(f"{HUB_PREFIX}{repo}", splits, split, test_names, fingerprint, named)


def is_local_path(name: str) -> bool:
    """Whether a dataset's name can only be a path: hub ids are NAME or OWNER/NAME, and neither part
    begins with a dot or a tilde."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


# ------------------------------------------------------------------------------- what a folder is


def _file_named(folder: Path, name: str) -> Path | None:
    files = [folder / f"{name}{suffix}" for suffix in FILE_TYPES]
    files = [file for file in files if file.is_file()]
    if len(files) > 1:
        raise DataError(
            f"{folder}: {' and '.join(file.name for file in files)}, expected one of them; move the"
            " others elsewhere"
        )
    return files[0] if files else None


def _data_files(folder: Path) -> list[str]:
    """The names, without the type, of the data files in a folder."""
    found = [
        file.name[: -len(suffix)]
        for suffix in FILE_TYPES
        for file in folder.glob(f"*{suffix}")
        if file.is_file() and not file.name.startswith(".")
    ]
    return sorted(set(found))


def _has_named_files(folder: Path, named: tuple[str | None, str | None]) -> bool:
    """Whether the user's names of splits are those of files in the folder, and not of splits that
    save_to_disk wrote, that README.md lists or that are in shards as on the hub."""
    if not any(named) or _is_saved_dataset(folder) or _lists_configs(folder):
        return False
    files = _data_files(folder)
    return bool(files) and not any(SHARD.search(file) for file in files)


def _visible_files(folder: Path) -> list[Path]:
    """All files below a folder, without hidden ones, which belong to git or to a download."""

    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(folder).parts)

    return sorted(file for file in folder.rglob("*") if file.is_file() and not is_hidden(file))


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset, or of a DatasetDict, wrote it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _lists_configs(folder: Path) -> bool:
    """Whether the YAML head of its README.md says which files are which split, as on the hub."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    content = readme.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
    return head is not None and re.search(r"^configs:", head[1], re.MULTILINE) is not None


def _names_a_train_split(folder: Path) -> bool:
    """Whether a path in the folder has the word train, which `datasets` takes for its split."""
    paths = (str(file.relative_to(folder)).lower() for file in _visible_files(folder))
    return any(re.search(r"(?<![a-z0-9])train(?![a-z0-9])", path) for path in paths)


# --------------------------------------------------------------------------------- loaded splits


def _load(place: Path | str, description: str, advice: str) -> dict:
    """The splits by name, each a `datasets.Dataset`, of a folder (Path) or a hub id (str).

    description and advice: begin and end of the message where they cannot be loaded.
    """
    import datasets  # slow to import, and not every dataset needs it

    load = datasets.load_dataset
    if isinstance(place, Path):
        if _is_saved_dataset(place):
            load = datasets.load_from_disk
        elif glob.has_magic(str(place.absolute())):
            raise DataError(
                f"{description}: datasets reads * ? and [ in a path as a pattern; rename the folder"
            )
        place = str(place.absolute())  # a bare "csv" would be the name of a loader
    try:
        splits = load(place)
    # No connection, no such dataset, no access, an unknown format: `datasets` has no common class
    # for them, and to the user all mean that there are no rows.
    except Exception as error:
        raise DataError(f"{description} cannot be loaded ({_one_line(error)}){advice}") from error
    return splits if isinstance(splits, dict) else {"train": splits}


def _check_one_source(folder: Path, named: tuple[str | None, str | None]) -> None:
    """Raise DataError where `datasets` takes several files for one split by a word in their names,
    such as train_prefs.jsonl and train_sft.jsonl, and the user did not name the split.

    Files whose names differ in numbers only are shards.
    """
    import datasets

    if _is_saved_dataset(folder) or _lists_configs(folder):
        return
    files = datasets.load_dataset_builder(str(folder.absolute())).config.data_files or {}
    for key, name, words in (
        ("train_split", named[0], ("train",)),
        ("test_split", named[1], TEST_NAMES),
    ):
        split = next((word for word in words if word in files), None)
        if name is not None or split is None:
            continue
        sources = {_without_numbers(file, folder): Path(file) for file in files[split]}
        if len(sources) == 1:
            continue
        places = [str(file.relative_to(folder.absolute())) for file in sources.values()]
        choices = " or ".join(f"{key}={name}" for name in sorted(sources))
        advice = f"choose by {choices}" if all("/" not in place for place in places) else ""
        raise DataError(
            f"{folder}: {' and '.join(sorted(places)[:8])} would all be its {split} split;"
            f" {advice or 'give one of them, or its folder, by its path'}"
        )


def _without_numbers(file: str, folder: Path) -> str:
    """The path of a file in a folder up to the part with the name of a split, without its type and
    the numbers of shards."""
    parts = Path(file).relative_to(folder.absolute()).parts
    last = max((i for i, part in enumerate(parts) if SPLIT_WORD.search(part)), default=0)
    name = "/".join(parts[: last + 1])
    suffix = next((suffix for suffix in FILE_TYPES if name.endswith(suffix)), "")
    return re.sub(r"[\W_]*\d+([\W_]*of[\W_]*\d+)?", "", name.removesuffix(suffix))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _choose(
    description: str,
    names: list[str],
    split: str,
    test_names: tuple[str, ...],
    named: tuple[str | None, str | None],
) -> tuple[str, bool]:
    """The name of the rows to read for a split, and whether they are `whole`: a single split that
    is not named as a test split, or one split that the user named for both.

    Raises DataError, with the names that there are, for a split that is not there.
    """
    there = f"{description} has no {{}} split; it has: {', '.join(names)}"
    for key, name in zip(("train_split", "test_split"), named, strict=True):
        if name is not None and name not in names:
            raise DataError(f"{there.format(name)}; {key} chooses one of them")
    train, test = named
    test = test or next((name for name in test_names if name in names), None)
    whole = (test is None and len(names) == 1) or (test is not None and test == train)
    if whole:
        return train or names[0], True
    name = (train or "train") if split == "train" else test
    if name not in names:
        expected = "train" if split == "train" else " or ".join(test_names)
        raise DataError(f"{there.format(expected)}; {split}_split chooses one of them")
    return name, False


def _split_rows(
    description: str,
    splits: dict,
    split: str,
    test_names: tuple[str, ...],
    fingerprint: str | None,
    named: tuple[str | None, str | None],
) -> Rows:
    """The rows of a split that `_choose` selects."""
    name, whole = _choose(description, list(splits), split, test_names, named)
    # Plain Python rows, whatever format (NumPy, torch, some columns) was set before saving.
    data = splits[name].with_format(None)
    place = f"{description.removeprefix(HUB_PREFIX)}[{name}]"

    def where(i: int) -> str:
        return f"{place}:{i}"

    def read(i: int) -> dict:
        try:
            return without_fillers(data[i])
        # Text that is not UTF-8, an image without the package that decodes it: no common class.
        except Exception as error:
            raise DataError(f"{where(i)}: cannot be read ({_one_line(error)})") from error

    return Rows(len(data), read, where, fingerprint or splits[name]._fingerprint, whole)
