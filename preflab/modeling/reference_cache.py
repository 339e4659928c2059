"""What the frozen reference says of each response: computed once, kept on disk, shared by every run
that has the same.

The log-probs of one token store under one reference are a folder under `cache_dir`/reference, named
by the content of both: weights, tokens, dtypes and versions. Runs of a sweep that start together
wait for the one that computes.
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

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout, lay_out
from preflab.batching.token_store import TokenStore
from preflab.distributed.process_group import World
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.modeling.weights_io import archive_files, model_files
from utils import ConfigError, DataError, content_hash

VERSION = 1  # raise it whenever the same weights and tokens would give other log-probs


SPOT_CHECKS = 4  # responses of each data set computed anew when log-probs are found on disk


class ReferenceLogps:
    """Log-probs of the responses of a token store, a number a token, memory-mapped.

    Both files are as long as the store is: a value for each of its tokens (those of prompts are
    never written, and take no space on disk), and for each of its responses whether it is known.
    """

    def __init__(self, folder: Path, store: TokenStore, dtype: str, mode: str = "r"):
        self.folder, self.spans = folder, store.responses
        self.values = np.memmap(
            folder / "logps", dtype=dtype, mode=mode, shape=(len(store.tokens),)
        )
        self.known = np.memmap(
            folder / "known", dtype=np.uint8, mode=mode, shape=(len(store.responses),)
        )

    def logps(self, response: int) -> np.ndarray:
        """(tokens of the response,)"""
        if not self.known[response]:
            raise DataError(
                f"the reference's log-probs of response {response} are not in {self.folder}; delete"
                " the folder and start again"
            )
        begin, end = self.spans[response]
        return self.values[begin:end]

    def write(self, logps: dict[int, np.ndarray]) -> None:
        """logps: by response."""
        for response, values in logps.items():
            begin, end = self.spans[response]
            self.values[begin:end] = values
        self.values.flush()  # known only once it is there
        self.known[list(logps)] = 1


def why_not_cached(config, loss) -> str | None:
    """Why the reference has to run in every step, in a run that reads it; None where its log-probs
    can be kept."""
    if "token_kl" in loss.reads:
        return f"loss={loss.name} reads the reference's whole distribution at every token"
    if config.model.from_scratch:
        return "model.from_scratch=true draws the reference's weights anew"
    if config.function == "online":
        return "the policy's own samples are new in every round"
    return None


def wants_cache(config, loss) -> bool:
    """Whether a training run keeps the reference's log-probs. Raises ConfigError where it was asked
    to and cannot."""
    if (
        config.reference.cache is False
        or config.function == "eval"
        or "reference" not in loss.reads
    ):
        return False
    why = why_not_cached(config, loss)
    if why and config.reference.cache is True:
        raise ConfigError(
            f"reference.cache=true: {why}, which is not kept; use reference.cache=auto"
        )
    return why is None


def is_built(config, loss) -> bool:
    """Whether a training run has a reference beside its policy, to run in the steps or to sample
    from."""
    return "reference" in loss.reads and (samples(config, loss) or not wants_cache(config, loss))


def samples(config, loss) -> bool:
    """Whether evaluations sample from policy and reference, and measure the KL between them."""
    return "scalar_head" not in loss.reads and (
        config.sample_during_eval or config.function == "eval"
    )


def reference_key(config, *, own_mixed_precision: bool) -> str:
    """Changes with the content of the reference's weights, its dtypes, and the code that computes
    with them."""
    model = config.model
    archive = model.reference_archive or model.archive
    files = [
        path
        for path in model_files(model.name_or_path)
        if not archive or path.name == "config.json"
    ]
    files += archive_files(archive) if archive else []
    hashes = []
    for path in files:
        with open(path, "rb") as f:
            hashes.append(hashlib.file_digest(f, "sha256").hexdigest())
    mixed = ""
    if model.fsdp_policy_mp:  # autocast keeps more in float32
        mixed = f"{model.fsdp_policy_mp} {own_mixed_precision}"
    return content_hash(
        f"reference {VERSION}", transformers.__version__, _weights_dtype(model), mixed, *hashes
    )


def _weights_dtype(model) -> str:
    """That of the reference's weights; with LoRA they are the policy's."""
    return (
        model.policy_dtype
        if model.lora.r and not model.reference_archive
        else model.reference_dtype
    )


def attach_reference(
    config,
    data: dict[str, PreferenceData],
    needed: dict[str, np.ndarray],
    scorer: Callable[[], Scorer],
    layout: Layout,
    tokens: int,
    world: World,
    *,
    own_mixed_precision: bool,
) -> None:
    """Give the stores of `data` the reference's log-probs of the `needed` examples, computing those
    that are not on disk.

    needed: indices of examples by split. scorer: builds the reference, or what equals it. tokens:
    of a forward pass.
    """
    scorer = functools.cache(scorer)
    root = Path(config.cache_dir) / "reference"
    key = world.agree(lambda: reference_key(config, own_mixed_precision=own_mixed_precision))
    stores = {store.key: store for split in data.values() for store in split.stores}
    wanted = _responses_of(data, needed)
    folders = {name: root / content_hash(key, name) for name in stores}
    dtype = "float64" if _weights_dtype(config.model) == "float64" else "float32"
    world.agree(
        lambda: [_create(folders[name], stores[name], np.dtype(dtype).itemsize) for name in stores]
    )
    lock = FileLock(root / f"{content_hash(key, *sorted(stores))}.lock")
    told = False
    while not world.agree(lambda: _acquire(lock, 20.0 if told else 0.1)):
        if not told:
            print("another run computes the reference's log-probs; waiting for it")
        told = True
    try:
        kept = (
            {name: ReferenceLogps(folders[name], stores[name], dtype, "r+") for name in stores}
            if world.rank == 0
            else {}
        )
        # As rank 0 saw it: another rank may look when the first values are there already.
        found, missing = world.agree(
            lambda: [
                {name: wanted[name][kept[name].known[wanted[name]] == known] for name in stores}
                for known in (1, 0)
            ]
        )
        if any(map(len, missing.values())):
            _fill(stores, missing, kept, scorer(), layout, tokens, world)
        world.barrier()
    finally:
        lock.release()
    n_found, n_all = (sum(map(len, lists.values())) for lists in (found, wanted))
    print(
        f"reference: log-probs of {n_all:,} responses, {n_found:,} of them found on disk; it does"
        " not run in the training steps"
    )
    for store in (store for split in data.values() for store in split.stores):
        there = (folders[store.key] / "known").is_file()
        store.reference = ReferenceLogps(folders[store.key], store, dtype) if there else None
        if not there or not store.reference.known[wanted[store.key]].all():
            raise ConfigError(
                f"cache_dir={config.cache_dir} is not the same folder on every machine; put it on a"
                " shared disk, or use reference.cache=false"
            )
    if n_found:
        _spot_check(stores, found, scorer(), layout)


def _responses_of(
    data: dict[str, PreferenceData], needed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The responses of some examples by the key of their store, each once, in order."""
    wanted: dict[str, list[np.ndarray]] = {}
    for split, examples in needed.items():
        for store, rows in data[split].by_store(examples):
            wanted.setdefault(store.key, []).append(
                np.asarray(store.pairs if data[split].kind == "pairs" else store.targets)[
                    rows
                ].ravel()
            )
    return {name: np.unique(np.concatenate(parts)) for name, parts in wanted.items()}


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


def _fill(
    stores,
    missing: dict[str, np.ndarray],
    kept: dict[str, ReferenceLogps],
    scorer: Scorer,
    layout: Layout,
    tokens: int,
    world: World,
) -> None:
    """Compute what is missing, a prompt with all its responses at a time; rank 0 writes it down."""
    trees: dict[tuple[str, int], list[int]] = {}
    for name, responses in missing.items():
        for r in responses.tolist():
            trees.setdefault((name, int(stores[name].response_prompt[r])), []).append(r)
    work = [
        (name, prompt, responses, _tokens_of(stores[name], prompt, responses))
        for (name, prompt), responses in trees.items()
    ]
    work.sort(key=lambda item: -item[3])
    batches = [[]]
    for item in work:
        if batches[-1] and sum(other[3] for other in batches[-1]) + item[3] > tokens:
            batches.append([])
        batches[-1].append(item)
    bar = tqdm(
        total=sum(map(len, missing.values())),
        desc="reference",
        unit=" responses",
        delay=2.0,
        disable=world.no_bar,
    )
    for [batch], n_real in world.batches(batches, 1):
        logps = iter(
            _logps(
                scorer,
                [_tree(stores[name], prompt, responses) for name, prompt, responses, _ in batch],
                layout,
            )
        )
        done = [
            (name, responses, [next(logps) for _ in responses]) for name, _, responses, _ in batch
        ]
        found: dict[str, dict[int, np.ndarray]] = {}
        for name, responses, values in world.gather(done if n_real else []):
            _check_finite(stores[name], responses, values)
            found.setdefault(name, {}).update(zip(responses, values))
            bar.update(len(responses))
        for name in kept.keys() & found.keys():
            kept[name].write(found[name])
    bar.close()


def _tokens_of(store: TokenStore, prompt: int, responses: list[int]) -> int:
    return int(
        np.diff(store.prompts[prompt])[0] + np.diff(store.responses[responses], axis=1).sum()
    )


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
            raise DataError(
                "the reference's log-probs of a response of"
                f" {store.sources[store.response_prompt[response]]} are not finite"
            )


def _spot_check(stores, found: dict[str, np.ndarray], scorer: Scorer, layout: Layout) -> None:
    """Compute a few of the log-probs found on disk again. Raises DataError where they differ beyond
    rounding."""
    bound = 1e-3 if scorer.is_full_precision() else 0.05
    for name, r in (
        (name, int(r)) for name, responses in found.items() for r in _spread(responses, SPOT_CHECKS)
    ):
        store = stores[name]
        [now] = _logps(scorer, [_tree(store, int(store.response_prompt[r]), [r])], layout)
        error = np.abs(now - store.reference.logps(r)).mean()
        if not error < bound:
            raise DataError(
                f"the reference's log-probs in {store.reference.folder} are off by {error:.3g} a"
                f" token at response {r}: delete that folder, and they are computed anew"
            )


def _spread(items: np.ndarray, n: int) -> np.ndarray:
    return items[np.unique(np.linspace(0, len(items) - 1, n).astype(int))] if len(items) else items
