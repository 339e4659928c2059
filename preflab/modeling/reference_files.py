"""The files that hold a reference's log-probs: checked whenever they are read."""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from preflab.batching.token_store import TokenStore
from utils import DataError, wrong_size

LOGPS, CHECKSUMS = "logps", "checksums"


class ReferenceLogps:
    """Log-probs of the responses of a token store, in nats, one per token, on disk.

    Two files: `logps` (tokens of the store,), of which those of prompts are never written and take
    no space on disk; and `checksums` (responses,) uint32, of the log-probs of each response, or 0
    while they are not known. A response whose log-probs were half written, cut or changed differs
    from its checksum, and is never read.

    They are not memory-mapped: a full disk, or a file that another program cuts, would end the
    process by a signal.
    """

    def __init__(self, folder: Path, store: TokenStore, dtype: str, mode: str = "rb"):
        self.folder, self.spans, self.dtype = folder, store.responses, np.dtype(dtype)
        # Open as long as this object lives.
        self._logps = open(folder / LOGPS, mode, buffering=0)  # noqa: SIM115
        self._checksums = open(folder / CHECKSUMS, mode, buffering=0)  # noqa: SIM115
        self.checksums = np.fromfile(folder / CHECKSUMS, dtype=np.uint32)

    def known(self, responses: np.ndarray) -> np.ndarray:
        """Whether log-probs were written, (responses,)."""
        return self.checksums[responses] != 0

    def intact(self, responses: np.ndarray) -> np.ndarray:
        """Whether log-probs were written and are what was written, (responses,)."""
        flags = (self._content(r) is not None for r in map(int, responses))
        return np.fromiter(flags, dtype=np.bool_, count=len(responses))

    def logps(self, response: int) -> np.ndarray:
        """Log-probs of a response, (tokens,). Raises DataError where they are not, or no longer, on
        disk."""
        content = self._content(int(response))
        if content is None:
            raise DataError(
                f"the reference's log-probs of response {response} in {self.folder} are missing, or"
                " have changed while this run read them; start again, and they are computed again"
            )
        return np.frombuffer(content, dtype=self.dtype)

    def write(self, logps: dict[int, np.ndarray]) -> None:
        """Store log-probs. logps: (tokens,) by response."""
        contents = {r: values.astype(self.dtype).tobytes() for r, values in logps.items()}
        for response, content in contents.items():
            _write_at(self._logps, self._offset(response), content)
        for response, content in contents.items():  # behind all that they stand for
            self.checksums[response] = self._checksum(response, content)
            _write_at(self._checksums, 4 * response, self.checksums[response].tobytes())

    def _offset(self, response: int) -> int:
        return int(self.spans[response][0]) * self.dtype.itemsize

    def _content(self, response: int) -> bytes | None:
        """The bytes of a response's log-probs, None where they differ from their checksum."""
        begin, end = map(int, self.spans[response])
        n_bytes = (end - begin) * self.dtype.itemsize
        content = os.pread(self._logps.fileno(), n_bytes, self._offset(response))
        same = self._checksum(response, content) == self.checksums[response]
        return content if same and len(content) == n_bytes else None

    def _checksum(self, response: int, content: bytes) -> int:
        """Not 0, and another one for the same bytes of another response, reference or store."""
        return zlib.crc32(content, zlib.crc32(f"{self.folder.name} {response}".encode())) or 1


def _write_at(file: BinaryIO, offset: int, content: bytes) -> None:
    while content:  # a disk that is almost full takes a part of it
        written = os.pwrite(file.fileno(), content, offset)
        content, offset = content[written:], offset + written


def make_files(folder: Path, store: TokenStore, dtype: str) -> None:
    """Make the files of a store, of zeros that take no space on disk until they are written to."""
    for name, size in _sizes(store, dtype).items():
        _resize(folder / name, size)


def repair_sizes(folder: Path, store: TokenStore, dtype: str) -> list[str]:
    """Give the files of a store the sizes that they were made with; returns what was wrong. What
    was lost reads as zeros, which fit no checksum."""
    damages = wrong_sizes(folder, store, dtype)
    for name in damages:
        _resize(folder / name, _sizes(store, dtype)[name])
    (folder / "known").unlink(missing_ok=True)  # of a version without checksums
    return list(damages.values())


def wrong_sizes(folder: Path, store: TokenStore, dtype: str) -> dict[str, str]:
    """What is wrong with the sizes of the files of a store, by the name of the file."""
    sizes = _sizes(store, dtype).items()
    return {name: wrong for name, size in sizes if (wrong := wrong_size(folder, name, size))}


def _sizes(store: TokenStore, dtype: str) -> dict[str, int]:
    n_bytes = np.dtype(dtype).itemsize
    return {LOGPS: n_bytes * len(store.tokens), CHECKSUMS: 4 * len(store.responses)}


def _resize(path: Path, size: int) -> None:
    with open(path, "ab") as f:
        f.truncate(size)
