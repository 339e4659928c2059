"""What the frozen reference says of each response: computed once, kept on disk, shared by every run that has the same.

The log-probs of one token store under one reference are a folder under `cache_dir`/reference, named by the content of
both: weights, tokens, dtypes and versions. Runs of a sweep that start together wait for the one that computes.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from batching import PreferenceData, TokenStore
from distributed import World
from layouts import Layout, lay_out
from logprobs import Scorer, score_responses
from models import archive_files, model_files
from utils import ConfigError, DataError, content_hash

VERSION = 1  # raise it whenever the same weights and tokens would give other log-probs
SPOT_CHECKS = 8  # responses computed anew when log-probs are found on disk


class ReferenceLogps:
    """Log-probs of the responses of a token store, a number a token, memory-mapped.

    Both files are as long as the store is: a value for each of its tokens (those of prompts are never written, and take
    no space on disk), and for each of its responses whether it is known.
    """

    def __init__(self, folder: Path, store: TokenStore, dtype: str, mode: str = "r"):
        self.folder, self.spans = folder, store.responses
        self.values = np.memmap(folder / "logps", dtype=dtype, mode=mode, shape=(len(store.tokens),))
        self.known = np.memmap(folder / "known", dtype=np.uint8, mode=mode, shape=(len(store.responses),))

    def logps(self, response: int) -> np.ndarray:
        """(tokens of the response,)"""
        if not self.known[response]:
            raise DataError(f"the reference's log-probs of response {response} are not in {self.folder}; delete the folder and start again")
        begin, end = self.spans[response]
        return self.values[begin:end]

    def write(self, responses: list[int], logps: list[np.ndarray]) -> None:
        for response, values in zip(responses, logps):
            begin, end = self.spans[response]
            self.values[begin:end] = values
        self.values.flush()  # known only once it is there
        self.known[responses] = 1


def why_not_cached(config, loss) -> str | None:
    """Why the reference has to run in every step, in a run that reads it; None where its log-probs can be kept."""
    if "token_kl" in loss.reads:
        return f"loss={loss.name} reads the reference's whole distribution at every token"
    if config.model.from_scratch:
        return "model.from_scratch=true draws the reference's weights anew"
    return None


def wants_cache(config, loss) -> bool:
    """Whether a run keeps the reference's log-probs. Raises ConfigError where it was asked to and cannot."""
    if config.reference.cache is False or config.function != "train" or "reference" not in loss.reads:
        return False
    why = why_not_cached(config, loss)
    if why and config.reference.cache is True:
        raise ConfigError(f"reference.cache=true: {why}, which is not kept; use reference.cache=auto")
    return why is None


def reference_key(config) -> str:
    """Changes with the content of the reference's weights, its dtypes, and the code that computes with them."""
    model = config.model
    archive = model.reference_archive or model.archive
    files = [path for path in model_files(model.name_or_path) if not archive or path.name == "config.json"]
    files += archive_files(archive) if archive else []
    hashes = []
    for path in files:
        with open(path, "rb") as f:
            hashes.append(hashlib.file_digest(f, "sha256").hexdigest())
    return content_hash(f"reference {VERSION}", transformers.__version__, str(model.reference_dtype), str(model.fsdp_policy_mp), *hashes)


def attach_reference(
    config, data: dict[str, PreferenceData], needed: dict[str, np.ndarray], scorer: Callable[[], Scorer], layout: Layout, tokens: int, world: World
) -> None:
    """Give the stores of `data` the reference's log-probs of the `needed` examples, computing those that are not on disk.

    needed: indices of examples by split. scorer: builds the reference, or what equals it. tokens: of a forward pass.
    """
    scorer = functools.cache(scorer)
    root = Path(config.cache_dir) / "reference"
    key = world.agree(lambda: reference_key(config))
    stores = {store.key: store for split in data.values() for store in split.stores}
    wanted = _responses_of(data, needed)
    folders = {name: root / content_hash(key, name) for name in stores}
    dtype = "float64" if config.model.reference_dtype == "float64" else "float32"
    world.agree(lambda: [_create(folders[name], stores[name], np.dtype(dtype).itemsize) for name in stores])
    lock = FileLock(root / f"{content_hash(key, *sorted(stores))}.lock")
    told = False
    while not world.agree(lambda: _acquire(lock, 20.0 if told else 0.1)):
        if not told:
            print("another run computes the reference's log-probs; waiting for it")
        told = True
    try:
        kept = {name: ReferenceLogps(folders[name], stores[name], dtype, "r+") for name in stores}
        found, missing = ({name: [r for r in wanted[name] if bool(kept[name].known[r]) == known] for name in stores} for known in (True, False))
        # Every rank has looked before rank 0 writes, or they would not agree on what is missing.
        missing = world.agree(lambda: missing)
        if any(missing.values()):
            _fill(stores, missing, kept if world.rank == 0 else None, scorer(), layout, tokens, world)
        world.barrier()
    finally:
        lock.release()
    n_found, n_all = (sum(map(len, lists.values())) for lists in (found, wanted))
    print(f"reference: log-probs of {n_all:,} responses, {n_found:,} of them found on disk; it does not run in the training steps")
    for store in (store for split in data.values() for store in split.stores):
        store.reference = ReferenceLogps(folders[store.key], store, dtype)
        if not store.reference.known[wanted[store.key]].all():
            raise ConfigError(f"cache_dir={config.cache_dir} is not the same folder on every machine; put it on a shared disk, or use reference.cache=false")
    if n_found:
        _spot_check(stores, world.agree(lambda: found), scorer(), layout)


def _responses_of(data: dict[str, PreferenceData], needed: dict[str, np.ndarray]) -> dict[str, list[int]]:
    wanted: dict[str, set[int]] = {store.key: set() for split in data.values() for store in split.stores}
    for split, examples in needed.items():
        for example in examples:
            store, responses = data[split].responses_of(int(example))
            wanted[store.key].update(responses)
    return {name: sorted(responses) for name, responses in wanted.items()}


def _create(folder: Path, store: TokenStore, itemsize: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("logps", itemsize * len(store.tokens)), ("known", len(store.responses))):
        with open(folder / name, "ab") as f:  # zeros that take no space until they are written to
            if f.tell() < size:
                f.truncate(size)


def _acquire(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _fill(stores, missing: dict[str, list[int]], kept: dict | None, scorer: Scorer, layout: Layout, tokens: int, world: World) -> None:
    """Compute what is missing, a prompt with all its responses at a time; rank 0 writes it down."""
    trees: dict[tuple[str, int], list[int]] = {}
    for name, responses in missing.items():
        for r in responses:
            trees.setdefault((name, int(stores[name].response_prompt[r])), []).append(r)
    work = [(name, prompt, responses, _tokens_of(stores[name], prompt, responses)) for (name, prompt), responses in trees.items()]
    work.sort(key=lambda item: -item[3])
    batches = [[]]
    for item in work:
        if batches[-1] and sum(other[3] for other in batches[-1]) + item[3] > tokens:
            batches.append([])
        batches[-1].append(item)
    bar = tqdm(total=sum(map(len, missing.values())), desc="reference", unit=" responses", delay=2.0, disable=world.no_bar)
    for [batch], n_real in world.batches(batches, 1):
        logps = iter(_logps(scorer, [_tree(stores[name], prompt, responses) for name, prompt, responses, _ in batch], layout))
        done = [(name, responses, [next(logps) for _ in responses]) for name, _, responses, _ in batch]
        for name, responses, values in world.gather(done if n_real else []):
            _check_finite(stores[name], responses, values)
            if kept is not None:
                kept[name].write(responses, values)
            bar.update(len(responses))
    bar.close()


def _tokens_of(store: TokenStore, prompt: int, responses: list[int]) -> int:
    return int(np.diff(store.prompts[prompt])[0] + np.diff(store.responses[responses], axis=1).sum())


def _tree(store: TokenStore, prompt: int, responses: list[int]) -> tuple:
    spans = [store.prompts[prompt], *(store.responses[r] for r in responses)]
    first, *rest = (store.tokens[begin:end] for begin, end in spans)
    return first, rest


@torch.no_grad()
def _logps(scorer: Scorer, trees: list[tuple], layout: Layout) -> list[np.ndarray]:
    """Log-probs of each response of some trees, in order."""
    batch = lay_out(trees, layout).to(scorer.device)
    values: Tensor = score_responses(scorer, batch).token_logps.cpu()
    return [piece.numpy() for piece in values.split(batch.lengths.tolist())]


def _check_finite(store: TokenStore, responses: list[int], values: list[np.ndarray]) -> None:
    for response, of_response in zip(responses, values):
        if not np.isfinite(of_response).all():
            raise DataError(f"the reference's log-probs of a response of {store.sources[store.response_prompt[response]]} are not finite")


def _spot_check(stores, found: dict[str, list[int]], scorer: Scorer, layout: Layout) -> None:
    """Compute a few of the log-probs found on disk again. Raises DataError where they differ beyond rounding."""
    bound = 1e-3 if scorer.is_full_precision() else 0.2
    everything = [(name, r) for name, responses in found.items() for r in responses]
    for i in np.unique(np.linspace(0, len(everything) - 1, SPOT_CHECKS).astype(int)):
        name, r = everything[i]
        store = stores[name]
        [now] = _logps(scorer, [_tree(store, int(store.response_prompt[r]), [r])], layout)
        error = np.abs(now - store.reference.logps(r)).max()
        if not error < bound:
            raise DataError(f"the reference's log-probs in {store.reference.folder} are off by {error:.3g} at response {r}: delete that folder, and they are computed anew")
