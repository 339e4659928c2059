"""Log-probs of a frozen reference: computed once for each response, stored on disk, and shared by
all runs with the same reference and data.

The log-probs of one token store under one reference are a folder under `cache_dir`/reference, named
by a hash of the weights, tokens, dtypes and versions. Runs of a sweep that start together wait for
the one that computes.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from filelock import FileLock, Timeout
from torch import Tensor

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout, lay_out
from preflab.batching.token_store import TokenStore
from preflab.distributed.process_group import World
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.modeling.model_source import weight_files
from preflab.modeling.reference_files import (
    CHECKSUMS,
    ReferenceLogps,
    make_files,
    repair_sizes,
    wrong_sizes,
)
from preflab.objective.types import NEEDS
from utils import (
    ConfigError,
    DataError,
    Progress,
    atomic_directory,
    check_writable,
    content_hash,
    say_without_locks,
)

logger = logging.getLogger(__name__)

# Raise it with any change that gives other log-probs for the same weights and tokens.
VERSION = 1

# Responses of each data set whose log-probs are computed again when a run reads them from disk.
SPOT_CHECKS = 4

FOLDER = "reference"  # in cache_dir


# ------------------------------------------------------------------- whether a run has a reference


@dataclass(frozen=True)
class ReferencePlan:
    """How a run uses the reference.

    cached: training steps read its log-probs from disk. built: its model is loaded, to run in
    training steps or to draw samples. not_cached_because: the reason where training steps run it,
    else empty. moves: it follows the policy. compared: evaluations sample from the initial one.
    read: whether the loss reads it.
    """

    cached: bool
    built: bool
    not_cached_because: str = ""
    moves: bool = False
    compared: bool = False
    read: bool = True


def plan_reference(
    reads: Collection[str],
    *,
    loss_name: str,
    function: str,
    cache: bool | str,
    from_scratch: bool,
    draws_samples: bool,
    update: str = "frozen",
    compare: bool = False,
) -> ReferencePlan:
    """How a run with a loss that reads `reads` uses the reference.

    function, cache, from_scratch, update, compare: the settings `function`, `reference.cache`
    (true, false or auto), `model.from_scratch`, `reference.update` and `reference.compare`.
    draws_samples: whether its evaluations draw samples. Raises ConfigError for
    `reference.cache=true` where the log-probs cannot be cached.
    """
    if function == "atlas":
        return ReferencePlan(cached=False, built=True)
    if function == "eval":
        return ReferencePlan(cached=False, built=draws_samples)
    if not any(NEEDS[name].reference for name in reads):
        compared = compare and draws_samples
        return ReferencePlan(cached=False, built=compared, compared=compared, read=False)
    moves = update != "frozen"
    obstacle = f"reference.update={update} changes the reference" if moves else ""
    obstacle = obstacle or _obstacle(reads, loss_name, function, from_scratch)
    if obstacle and cache is True:
        raise ConfigError(
            f"reference.cache=true: {obstacle}, so its log-probs cannot be cached; use"
            " reference.cache=auto"
        )
    if obstacle or cache is False:
        reason = obstacle or "reference.cache=false"
        return ReferencePlan(False, True, reason, moves, compared=draws_samples)
    return ReferencePlan(cached=True, built=draws_samples)


def _obstacle(reads: Collection[str], loss_name: str, function: str, from_scratch: bool) -> str:
    """What prevents computing the log-probs before the first step; empty if nothing does."""
    if "token_kl" in reads:
        return f"loss={loss_name} reads the reference's whole distribution at every token"
    if "mismatched" in reads:
        return f"loss={loss_name} reads log-probs of responses to other prompts of the batch"
    if from_scratch:
        return "model.from_scratch=true draws new weights for the reference"
    if function == "online":
        return "each round trains on new samples of the policy"
    return ""


# ------------------------------------------------------------------------- which reference it is


def reference_key(model, *, own_mixed_precision: bool) -> str:
    """A hash of the reference's weights, its dtypes, and the versions of the code that runs it.

    model: the settings of the model. own_mixed_precision: whether FSDP casts the weights, where
    other placements use autocast, which runs some operations in float32.
    """
    files = weight_files(model, model.reference_archive or model.archive)
    hashes = [_file_hash(path) for path in files]
    mixed = f"{model.fsdp_policy_mp} {own_mixed_precision}" if model.fsdp_policy_mp else ""
    rounding = f"{model.quantization} {model.quantization_args}" if model.quantization else ""
    return content_hash(
        f"reference {VERSION}",
        transformers.__version__,
        _weights_dtype(model),
        mixed + rounding,
        *hashes,
    )


def _file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _weights_dtype(model) -> str:
    """Dtype of the reference's weights; with LoRA they are the weights of the policy."""
    shares_weights = model.lora.r and not model.reference_archive
    return model.policy_dtype if shares_weights else model.reference_dtype


# ----------------------------------------------------------------------- what a run reads and adds


def cannot_write(cache_dir: Path) -> str:
    """Why the log-probs in `cache_dir` can only be read; empty where more can be written to it.
    Raises ConfigError where there are none either."""
    try:
        check_writable(cache_dir, "cache_dir")
    except ConfigError as error:
        if not (cache_dir / FOLDER).is_dir():
            raise
        return str(error)
    return ""


def attach_reference(
    data: dict[str, PreferenceData],
    needed: dict[str, np.ndarray],
    *,
    cache_dir: str | Path,
    model,
    own_mixed_precision: bool,
    build_scorer: Callable[[], Scorer],
    layout: Layout,
    microbatch_tokens: int,
    world: World,
) -> None:
    """Compute the log-probs of the `needed` examples that are not on disk, and give the stores of
    `data` all of them as `reference`.

    needed: indices of examples by split. model, own_mixed_precision: as in `reference_key`.
    build_scorer: returns the reference, or a model that equals it; called only if something is
    computed. microbatch_tokens: input tokens of a forward pass. Raises ConfigError where the ranks
    see different folders, and DataError where log-probs are NaN, infinite, or wrong on disk.
    """
    build_scorer = functools.cache(build_scorer)
    key = world.agree(lambda: reference_key(model, own_mixed_precision=own_mixed_precision))
    stores = {store.key: store for split in data.values() for store in split.stores}
    responses = _responses_of(data, needed)
    dtype = "float64" if _weights_dtype(model) == "float64" else "float32"
    cache = _Cache(Path(cache_dir) / FOLDER, key, stores, dtype)
    with cache.locked(world):
        # Rank 0 decides: a later look of another rank could already see new values.
        on_disk, missing = world.agree(lambda: cache.split_by_known(responses))
        if any(map(len, missing.values())):
            world.agree(lambda: cache.refuse_to_write(missing))
            _compute(missing, cache, build_scorer(), layout, microbatch_tokens, world)
        world.barrier()
    n_responses, n_on_disk = (sum(map(len, lists.values())) for lists in (responses, on_disk))
    logger.info(
        f"reference: log-probs of {n_responses:,} responses, {n_on_disk:,} of them from disk;"
        " it does not run in the training steps"
    )
    for store in (store for split in data.values() for store in split.stores):
        store.reference = cache.open(store)
        if store.reference is None or not store.reference.known(responses[store.key]).all():
            raise ConfigError(
                f"cache_dir={cache_dir} is not the same folder on every machine; put it on a"
                " shared disk, or use reference.cache=false"
            )
    if n_on_disk:
        _spot_check(stores, on_disk, build_scorer(), layout)


def _responses_of(
    data: dict[str, PreferenceData], needed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The responses of some examples, sorted and without duplicates, by the key of their store."""
    parts: dict[str, list[np.ndarray]] = {}
    for split, examples in needed.items():
        for store, rows in data[split].by_store(examples):
            parts.setdefault(store.key, []).append(data[split].responses_at(store, rows))
    return {key: np.unique(np.concatenate(responses)) for key, responses in parts.items()}


class _Cache:
    """The folders of one reference's log-probs, one for each token store, by the store's key."""

    def __init__(self, root: Path, key: str, stores: dict[str, TokenStore], dtype: str):
        self.root, self.stores, self.dtype = root, stores, dtype
        self.folders = {name: root / content_hash(key, name) for name in stores}
        self.obstacle = ""

    @contextlib.contextmanager
    def locked(self, world: World) -> Iterator[None]:
        """Keep other runs from computing the same log-probs. Rank 0 holds a lock for each store, in
        one order in all runs: runs may share some of their stores. Where this run cannot write, it
        needs no lock: a reader takes nothing that is half written."""
        self.obstacle = world.agree(lambda: cannot_write(self.root.parent))
        if not self.obstacle:
            world.agree(lambda: self.root.mkdir(parents=True, exist_ok=True))
        with contextlib.ExitStack() as stack:
            for folder in () if self.obstacle else sorted(self.folders.values()):
                stack.enter_context(
                    _locked(FileLock(folder.with_name(f"{folder.name}.lock")), world)
                )
            yield

    def open(self, store: TokenStore, mode: str = "rb") -> ReferenceLogps | None:
        """The log-probs of a store; None if its folder is not visible on this machine."""
        folder = self.folders[store.key]
        if not (folder / CHECKSUMS).is_file():
            return None
        return ReferenceLogps(folder, store, self.dtype, mode)

    def split_by_known(
        self, responses: dict[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Those of some responses whose log-probs are on disk, and the others.

        Makes the files that are not there yet, repairs their sizes, and says of each folder what is
        damaged in it.
        """
        on_disk, missing = {}, {}
        for name, store in self.stores.items():
            if self.obstacle and not self._is_whole(name):
                on_disk[name], missing[name] = responses[name][:0], responses[name]
                continue
            folder = self.folders[name]
            if not folder.is_dir():
                with atomic_directory(folder) as temporary:
                    make_files(temporary, store, self.dtype)
            damages = [] if self.obstacle else repair_sizes(folder, store, self.dtype)
            files, needed = self.open(store), responses[name]
            known, intact = files.known(needed), files.intact(needed)
            if changed := int((known & ~intact).sum()):
                damages.append(f"{changed:,} responses differ from their checksums")
            on_disk[name], missing[name] = needed[intact], needed[~intact]
            if damages and not self.obstacle:
                logger.warning(
                    f"{folder}: {', '.join(damages)}; the reference's log-probs of"
                    f" {len(missing[name]):,} of {len(needed):,} responses are computed again"
                )
        return on_disk, missing

    def _is_whole(self, name: str) -> bool:
        """Whether the files of a store have their sizes."""
        return not wrong_sizes(self.folders[name], self.stores[name], self.dtype)

    def refuse_to_write(self, missing: dict[str, np.ndarray]) -> None:
        """Raise ConfigError where log-probs are missing, and this run cannot write them."""
        if self.obstacle:
            n = sum(map(len, missing.values()))
            raise ConfigError(
                f"{self.obstacle}, or use reference.cache=false: the reference's log-probs of"
                f" {n:,} responses are not there, or damaged"
            )


@contextlib.contextmanager
def _locked(lock: FileLock, world: World) -> Iterator[None]:
    if not world.agree(lambda: _acquire(lock, 0.1)):
        logger.info("another run computes the reference's log-probs; waiting for it")
        while not world.agree(lambda: _acquire(lock, 1.0)):
            world.stop_if_asked()
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except NotImplementedError:
        say_without_locks(Path(lock.lock_file).parent)
    return True


# --------------------------------------------------------------------------------------- computing


class _PromptGroup(NamedTuple):
    """A prompt and those of its responses whose log-probs are computed together."""

    store: str  # its key
    prompt: int
    responses: list[int]
    n_tokens: int


def _compute(
    missing: dict[str, np.ndarray],
    cache: _Cache,
    scorer: Scorer,
    layout: Layout,
    microbatch_tokens: int,
    world: World,
) -> None:
    """Compute the missing log-probs over all ranks; rank 0 writes them."""
    stores = cache.stores
    files = (
        {name: cache.open(store, "r+b") for name, store in stores.items()}
        if world.rank == 0
        else {}
    )
    batches = _batches(_prompt_groups(stores, missing), microbatch_tokens)
    bar = Progress(
        total=sum(map(len, missing.values())),
        desc="reference",
        unit=" responses",
        delay=2.0,
        disable=world.no_bar,
    )
    for [batch], n_real in world.batches(batches, 1):
        world.stop_if_asked()
        computed = _logps_of_groups(scorer, stores, batch, layout)
        by_store: dict[str, dict[int, np.ndarray]] = {}
        for group, logps in world.gather(computed if n_real else []):
            _check_finite(stores[group.store], group.responses, logps)
            by_response = dict(zip(group.responses, logps, strict=True))
            by_store.setdefault(group.store, {}).update(by_response)
            bar.update(len(group.responses))
        for name in files.keys() & by_store.keys():
            files[name].write(by_store[name])
    bar.close()


def _prompt_groups(
    stores: dict[str, TokenStore], missing: dict[str, np.ndarray]
) -> list[_PromptGroup]:
    """The missing responses by prompt, the longest group first."""
    by_prompt: dict[tuple[str, int], list[int]] = {}
    for name, responses in missing.items():
        for response in responses.tolist():
            prompt = int(stores[name].response_prompt[response])
            by_prompt.setdefault((name, prompt), []).append(response)
    groups = [
        _PromptGroup(name, prompt, responses, _count_tokens(stores[name], prompt, responses))
        for (name, prompt), responses in by_prompt.items()
    ]
    return sorted(groups, key=lambda group: -group.n_tokens)


def _count_tokens(store: TokenStore, prompt: int, responses: list[int]) -> int:
    of_prompt = np.diff(store.prompts[prompt])[0]
    of_responses = np.diff(store.responses[responses], axis=1).sum()
    return int(of_prompt + of_responses)


def _batches(groups: list[_PromptGroup], max_tokens: int) -> list[list[_PromptGroup]]:
    """Split groups into batches of at most `max_tokens` tokens, or of a single group."""
    batches: list[list[_PromptGroup]] = [[]]
    n_tokens = 0
    for group in groups:
        if batches[-1] and n_tokens + group.n_tokens > max_tokens:
            batches.append([])
            n_tokens = 0
        batches[-1].append(group)
        n_tokens += group.n_tokens
    return batches


def _logps_of_groups(
    scorer: Scorer, stores: dict[str, TokenStore], groups: list[_PromptGroup], layout: Layout
) -> list[tuple[_PromptGroup, list[np.ndarray]]]:
    """Each group with the log-probs of its responses."""
    trees = [_tree(stores[group.store], group.prompt, group.responses) for group in groups]
    logps = iter(_logps(scorer, trees, layout))
    return [(group, [next(logps) for _ in group.responses]) for group in groups]


def _tree(store: TokenStore, prompt: int, responses: list[int]) -> tuple:
    """(prompt tokens, [response tokens, ...])"""
    spans = [store.prompts[prompt], *(store.responses[r] for r in responses)]
    prompt_tokens, *response_tokens = (store.tokens[begin:end] for begin, end in spans)
    return prompt_tokens, response_tokens


@torch.no_grad()
def _logps(scorer: Scorer, trees: list[tuple], layout: Layout) -> list[np.ndarray]:
    """Log-probs (tokens,) of each response of some trees, in order."""
    batch = lay_out(trees, layout).to(scorer.device)
    values: Tensor = score_responses(scorer, batch).token_logps.cpu()
    return [piece.numpy() for piece in values.split(batch.lengths.tolist())]


def _check_finite(store: TokenStore, responses: list[int], logps: list[np.ndarray]) -> None:
    for response, values in zip(responses, logps, strict=True):
        if not np.isfinite(values).all():
            raise DataError(
                "the reference's log-probs of a response of"
                f" {store.sources[store.response_prompt[response]]} are NaN or infinite; look at"
                " that record, or use another dtype with model.reference_dtype"
            )


def _spot_check(
    stores: dict[str, TokenStore], on_disk: dict[str, np.ndarray], scorer: Scorer, layout: Layout
) -> None:
    """Compute a few of the log-probs on disk again. Raises DataError if they differ by more than
    rounding errors."""
    bound = 1e-3 if scorer.is_full_precision() else 0.05
    for name, responses in on_disk.items():
        store = stores[name]
        for response in map(int, _evenly_spaced(responses, SPOT_CHECKS)):
            tree = _tree(store, int(store.response_prompt[response]), [response])
            [logps] = _logps(scorer, [tree], layout)
            error = np.abs(logps - store.reference.logps(response)).mean()
            if not error < bound:
                raise DataError(
                    f"the reference's log-probs in {store.reference.folder} are off by {error:.3g}"
                    f" per token at response {response}: delete that folder, and they are computed"
                    " again"
                )


def _evenly_spaced(items: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of some items, the first and the last among them."""
    if not len(items):
        return items
    return items[np.unique(np.linspace(0, len(items) - 1, n).astype(int))]
