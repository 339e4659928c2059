"""Rows of folders and of hub sets: train and test files, what `datasets.save_to_disk` wrote, data
sets as the hub lays them out."""

import glob
import re
from pathlib import Path

from preflab.readers.files import FILE_TYPES, Rows, file_rows, listed
from utils import DataError, content_hash

TEST_NAMES = ("test", "validation")


def folder_rows(path: Path, split: str) -> Rows:
    """A split of a folder: of its train and test files, of what `save_to_disk` wrote, or of files
    laid out as the hub has them.

    A folder is taken for a hub data set where its README.md lists configs, or a file is named as
    one of the train split (data/train-00000-of-00001.parquet).
    """
    if not _was_saved(path) and not _lists_configs(path):
        train, test = (
            _file_named(path, "train"),
            _file_named(path, "test") or _file_named(path, "validation"),
        )
        if train:
            rows = file_rows(test if test and split == "test" else train)
            rows.whole = test is None
            return rows
        if not any(
            re.search(r"(?<![a-z0-9])train(?![a-z0-9])", str(file.relative_to(path)).lower())
            for file in _files_of(path)
        ):
            raise DataError(
                f"{path}: no file named train of type {', '.join(FILE_TYPES)}, no"
                " data/train-*.parquet or README.md with configs as on the hub, and nothing that"
                f" save_to_disk of datasets wrote; there is: {listed(path)}"
            )
    found = _load(path, str(path), "; mend it, or give one file of it by its name")
    return _split_rows(str(path), found, split, TEST_NAMES, content_hash(split, *_files_of(path)))


def hub_rows(
    repo: str, split: str, data_dir: str, *, test_names=("test",), only: str | None = None
) -> Rows:
    """A split of a hub dataset, or of its local copy in `data_dir/repo`; rows stay in memory-mapped
    Arrow files.

    test_names: what the test split may be called. only: the one split there is, which is then
    `whole`.
    """
    local = Path(data_dir) / repo
    copied = local.is_dir()
    mend = (
        "; without network, or for one config of several, put a copy with train and test files in"
        f" {local}"
    )
    found = _load(local if copied else repo, f"the hub dataset {repo}", mend)
    if only in found:
        found = {only: found[only]}
    return _split_rows(
        f"the hub dataset {repo}",
        found,
        split,
        test_names,
        content_hash(split, *_files_of(local)) if copied else None,
    )


def _file_named(folder: Path, name: str) -> Path | None:
    files = [file for suffix in FILE_TYPES if (file := folder / f"{name}{suffix}").is_file()]
    if len(files) > 1:
        raise DataError(
            f"{folder}: {' and '.join(file.name for file in files)}, expected one of them; take the"
            " others away"
        )
    return files[0] if files else None


def _files_of(folder: Path) -> list[Path]:
    """All files in it, except hidden ones, which are git's or a download's own."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _was_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset, or of a DatasetDict, wrote it."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _lists_configs(folder: Path) -> bool:
    """Whether its README.md says, in its head, which files are which split, as on the hub."""
    readme = folder / "README.md"
    head = (
        re.match(
            r"---\s*\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL
        )
        if readme.is_file()
        else None
    )
    return head is not None and re.search(r"^configs:", head[1], re.MULTILINE) is not None


def _load(place: Path | str, told: str, mend: str) -> dict:
    """The splits by name, each a `datasets.Dataset`, of a folder or of a hub name; `mend` ends the
    message where there are none."""
    import datasets  # slow to import, and not every dataset needs it

    saved = isinstance(place, Path) and _was_saved(place)
    if isinstance(place, Path):
        place = str(place.absolute())  # "csv" by itself is a kind of file to datasets
        if not saved and glob.has_magic(place):
            raise DataError(
                f"{told}: datasets takes * ? and [ in a path for a pattern; rename the folder"
            )
    try:
        found = (datasets.load_from_disk if saved else datasets.load_dataset)(place)
    except (
        Exception
    ) as error:  # no connection, no such set, no access, no such format: all mean the same here
        raise DataError(f"{told} cannot be loaded ({_one_line(error)}){mend}") from error
    return found if isinstance(found, dict) else {"train": found}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _split_rows(
    told: str, found: dict, split: str, test_names: tuple[str, ...], fingerprint: str | None
) -> Rows:
    """The rows of a split by its name, or of the only one there is, which is then `whole` unless it
    is called a test split."""
    test = next((name for name in test_names if name in found), None)
    whole = test is None and len(found) == 1
    name = next(iter(found)) if whole else "train" if split == "train" else test
    if name not in found:
        raise DataError(
            f"{told} has no {'train' if split == 'train' else ' or '.join(test_names)} split; it"
            f" has: {', '.join(found)}"
        )
    data = found[name].with_format(
        None
    )  # the rows as they are, whatever format they were saved to be read in
    place = f"{told.removeprefix('the hub dataset ')}[{name}]"

    def where(i: int) -> str:
        return f"{place}:{i}"

    def read(i: int) -> dict:
        try:
            return data[i]
        # text that is no UTF-8, a picture without the package for it, ...: each has a class of its
        # own
        except Exception as error:
            raise DataError(f"{where(i)}: cannot be read ({_one_line(error)})") from error

    return Rows(len(data), read, where, fingerprint or found[name]._fingerprint, whole)
