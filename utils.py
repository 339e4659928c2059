"""Errors, atomic files, content hashes, seeding, and other small helpers."""

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

LINES_EVERY = 20.0  # seconds; an update that comes late still makes a line within 30


class PrefLabError(ValueError):
    """An error the user can fix; the message says what was received, what is accepted and what to
    change."""

    everywhere = False  # whether all ranks raise it, so that only rank 0 should report it


class ConfigError(PrefLabError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(PrefLabError):
    """A data file that cannot be used; the message names the file and the line."""


def first_line(error: Exception) -> str:
    """The class of an exception and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


_FULL = "free some space, or name folders on another disk; what was complete stays usable"
_DENIED = "name a folder that you can write to"
_NO_FOLDER = "a file stands where a folder is needed; name another folder"
# What the machine refuses, by the number of the error, and what to do.
_REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _DENIED),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), _NO_FOLDER),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files, as with ulimit -n 4096"),
    errno.EISDIR: "a folder stands where a file is needed; name another one",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EIO: "the disk failed; name folders on another one",
}


def machine_error(error: BaseException | None) -> str:
    """One line on what the machine refused, and what to do: no space, no permission, no handles, a
    file in place of a folder. Empty for any other error.

    Libraries wrap such errors, or give their number in the message only.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if match := re.search(r"\((?:os error) (\d+)\)|\[Errno (\d+)\]", str(error)):
            number = int(match[1] or match[2])
        if "No usable temporary directory" in str(error):
            return f"{error.args[-1]}; set TMPDIR to a folder that you can write to"
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            number = number or errno.ENOSPC  # it does not say which
        if number in _REFUSALS:
            path = getattr(error, "filename", None)
            place = f"{path}: " if path is not None else ""
            return f"{place}{os.strerror(number)}; {_REFUSALS[number]}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ""


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError where nothing can be written to a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"x")
            f.flush()
    except OSError as error:
        if error.filename and Path(error.filename).parent == folder:
            error.filename = None  # of the trial, which nobody asked for
        raise ConfigError(f"{key}={folder}: {machine_error(error) or first_line(error)}") from error


def nearest(word: str, accepted: Iterable[str], n: int = 3) -> str:
    """`did you mean a, b?` when some accepted name is close to `word`, else the accepted names in
    order."""
    accepted = sorted(accepted)
    close = difflib.get_close_matches(word, accepted, n=n, cutoff=0.6)
    if close:
        return f"did you mean {', '.join(close)}?"
    return f"accepted: {', '.join(accepted)}"


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator:
    """Open a temporary file beside `path`; on success it replaces `path`, on failure it is
    deleted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    handle = _temporary_file(path, mode)
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.chmod(handle.name, 0o666 & ~_umask())
            os.replace(handle.name, path)
    except BaseException:
        Path(handle.name).unlink(missing_ok=True)
        raise


def _temporary_file(path: Path, mode: str):
    """A new file beside `path`, marked as being written until it is closed."""
    encoding = None if "b" in mode else "utf-8"
    while True:
        handle = tempfile.NamedTemporaryFile(  # noqa: SIM115  (the caller closes it)
            mode, dir=path.parent, prefix=f".{path.name}.", delete=False, encoding=encoding
        )
        if _mark(handle.fileno(), handle.name):
            return handle
        handle.close()


# ".NAME." and what `tempfile` adds to it.
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete what killed processes have left of `atomic_write` and `atomic_directory` in a folder.

    name: only of this file or folder. What a process still writes is marked by a lock, and stays.
    """
    paths = []
    with contextlib.suppress(OSError):  # no such folder, or one that cannot be listed
        paths = sorted(folder.iterdir())
    for path in paths:
        match = _TEMPORARY.fullmatch(path.name)
        if not match or name not in (None, match[1]) or path.is_symlink():
            continue
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mark(descriptor: int, path: str | Path) -> bool:
    """Mark a new file or folder as being written until the descriptor is closed; False where
    `remove_leftovers` of another process has deleted it before."""
    with contextlib.suppress(OSError):  # file systems without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.path.exists(path)


def json_lines(path: Path) -> list[str]:
    """The lines of a JSON-lines file that are not blank. Lines end at newlines only: `splitlines`
    would also split texts at characters such as U+2028."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line for line in text.split("\n") if line.strip()]


def drop_incomplete_line(path: Path) -> None:
    """Remove a last line without a newline, which a kill cut short, before rows are appended."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))


def append_rows(path: Path, rows: list[dict], **columns) -> None:
    """Add rows to a JSON-lines file, all or none of them. columns: the same values for each row,
    written first."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    with atomic_write(path) as f:
        f.write(before)
        f.writelines(json.dumps({**columns, **row}, ensure_ascii=False) + "\n" for row in rows)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; on success it is renamed to `path`, on failure it
    is deleted.

    If another process has finished the same folder already, that one stays and this one is deleted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    with contextlib.ExitStack() as stack:
        while True:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                if _mark(stack.enter_context(_opened(temporary)), temporary):
                    break
        yield temporary
        finish_directory(temporary, path)


def finish_directory(temporary: Path, path: Path) -> None:
    """Rename a filled temporary folder to `path`, once all of its files are on the disk.

    Files and folders get the modes that the umask asks for; some libraries write private files.
    """
    umask = _umask()
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if not file.is_symlink():
            os.chmod(file, (0o777 if file.is_dir() else 0o666) & ~umask)
    os.chmod(temporary, 0o777 & ~umask)
    try:
        os.rename(temporary, path)
    except OSError:
        if not path.is_dir():
            raise


CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the size and the SHA-256 of each file in a folder, for `damaged_file`."""
    contents = {
        path.name: [path.stat().st_size, content_hash(path)] for path in sorted(folder.iterdir())
    }
    (folder / CHECKSUMS).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def damaged_file(folder: Path) -> str:
    """The first file of a folder that differs from what `write_checksums` saw, and in what; empty
    if all are the same."""
    try:
        contents = json.loads((folder / CHECKSUMS).read_bytes())
        for name, (size, digest) in contents.items():
            if damage := wrong_size(folder, name, size):
                return damage
            if content_hash(folder / name) != digest:
                return f"{name} has another content than was written"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"{CHECKSUMS} cannot be read ({first_line(error)})"
    return ""


def wrong_size(folder: Path, name: str, size: int) -> str:
    """What is wrong with the size of a file of a folder that was written with `size` bytes; empty
    if nothing is."""
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if (found := path.stat().st_size) != size:
        return f"{name} has {found:,} bytes, and {size:,} were written"
    return ""


def _umask() -> int:
    # The only portable way to read the umask is to set it and set it back.
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def in_use(path: Path, purpose: str = "") -> Iterator[None]:
    """Inside, this process holds the lock file. Raises ConfigError where another one holds it.

    purpose: what for, as a clause of the message. A holder that dies, in any way, lets go of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"{path.parent} is in use by {_holder(path)}{purpose}; wait until it ends, or set"
            " another local_run_dir"
        ) from error
    except NotImplementedError:
        say_without_locks(path.parent)
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def one_at_a_time(path: Path, waiting: str) -> Iterator[None]:
    """Inside, this process alone holds the lock file. While another one does, `waiting` is logged
    and this process waits; a holder that dies, in any way, lets go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            logging.getLogger("preflab").info(waiting)
            lock.acquire()
    except NotImplementedError:
        say_without_locks(path.parent)
    try:
        yield
    finally:
        lock.release()


def say_without_locks(folder: Path) -> None:
    """Warn that a folder's file system does not keep two runs apart."""
    logging.getLogger("preflab").warning(
        f"{folder}: this file system has no locks, so a second run there is not noticed"
    )


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")[:100] or "another process"
    return "another process"


# In the folder of a model that was trained here: its settings.
TRAINING_CONFIG = "training_config.yaml"


def model_folder(path: str | Path) -> Path | str:
    """The folder for `from_pretrained` of a run (its best checkpoint, else its latest) or of a
    checkpoint, also by its policy.pt; `path` itself where it is neither."""
    folder = Path(path).parent if Path(path).name == "policy.pt" else Path(path)
    candidates = (folder / inner for inner in ("BEST/hf", "LATEST/hf", "hf"))
    return next((folder for folder in candidates if folder.is_dir()), path)


def path_argument(text: str) -> Path:
    """A path of a command line. ~ is the home folder, also behind `=`, where no shell reads it."""
    return Path(text).expanduser()


def load_module(module: str, key: str) -> ModuleType:
    """Import `my_losses` or `path/to/my_losses.py`, whose decorators add to a registry.

    A file is imported under a unique name, once until its content changes; it can import the
    modules beside it. key: the setting that names the module. Raises ConfigError for one that does
    not exist, and, with file and line, for one that fails.
    """
    path = Path(module).expanduser()
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ConfigError(f"{key}={module!r}: no such file (looked in {Path.cwd()})")
    folder = path.resolve().parent if is_file else Path.cwd()
    if str(folder) not in sys.path:
        # At the end: a file of the user's must not be imported in place of an installed package.
        sys.path.append(str(folder))
    try:
        return _import_file(path.resolve()) if is_file else importlib.import_module(module)
    except Exception as error:
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else None
        if not is_file and missing and f"{module}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{key}={module!r} cannot be imported from {Path.cwd()}; give a module name or a"
                " path ending in .py"
            ) from error
        text = str(error) if isinstance(error, PrefLabError) else first_line(error)
        raise ConfigError(f"{key}={module!r}: {_place(error, folder)}: {text}") from error


def _import_file(path: Path) -> ModuleType:
    """The module of a file outside the import path, executed unless this content already was."""
    source = path.read_bytes()
    name, digest = f"{path.stem}_{content_hash(str(path))[:8]}", content_hash(source)
    before = sys.modules.get(name)
    if before is not None and before.__source_hash__ == digest:
        return before
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    module.__source_hash__ = digest
    sys.modules[name] = module  # before its code runs: dataclasses look their module up by name
    try:
        # Compiled here: Python's cache of bytecode can miss a change within the same second.
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _place(error: Exception, folder: Path) -> str:
    """File and line of an error: the innermost one in `folder`, where the user's code is."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    project = Path(__file__).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(folder)
        and not Path(frame.filename).is_relative_to(project / "preflab")
        and frame.filename != __file__
    ]
    frame = (theirs or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def content_hash(*parts: str | bytes | Path) -> str:
    """Hex digest of the parts in order, 32 digits; a `Path` stands for the bytes of that file."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as f:
                part = hashlib.file_digest(f, "sha256").digest()
        elif isinstance(part, str):
            part = part.encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def mean_and_error(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; (None, None) without values, (mean, None) for one value."""
    values = list(values)
    n = len(values)
    if n == 0:
        return None, None
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    import torch  # slow to import, and reports do not need it

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Progress(tqdm):
    """The progress of a loop: a bar on a terminal, and a line every LINES_EVERY seconds in a file.

    Takes tqdm's arguments. disable: True on the ranks that show nothing. A loop that ends before
    the first line prints none.
    """

    def __init__(self, *args, disable: bool | None = None, **options):
        self.in_lines = sys.stderr is not None and not sys.stderr.isatty()
        if self.in_lines:
            options |= {"delay": LINES_EVERY, "mininterval": LINES_EVERY, "miniters": 1}
            options |= {"ncols": 100, "ascii": True}
        super().__init__(
            *args, disable=bool(disable) or sys.stderr is None, file=sys.stderr, **options
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not self.in_lines:
            return super().display(msg, pos)
        print(msg or str(self), file=self.fp, flush=True)
        return True

    def close(self) -> None:
        if self.in_lines and not self.disable:
            self.disable = True  # tqdm would clear the line, for which a file has no way
            self._decr_instances(self)
        else:
            super().close()
