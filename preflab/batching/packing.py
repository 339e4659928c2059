"""Rows of prompts and responses: padded, packed, or packed with each prompt written once.

A batch holds, for each scored token, where its hidden state is, which token it is and which
response owns it, so that losses and log-probs never see rows.
"""

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from preflab.batching.packed_attention import block_table

LAYOUTS = ("prefix_shared", "packed", "padded")  # the fastest first


@dataclass(frozen=True)
class Layout:
    """A way to write responses as rows.

    name: "padded": a row for each response, its prompt in front, padding behind. "packed": the same
    one after the other in a single row, without padding. "prefix_shared": packed, with each prompt
    written once and all its responses behind it.
    pad_id: the token that fills padded rows.
    last_tokens: also feed the last token of each response, which a scalar head reads; no token is
    predicted from it.
    flex: attention over packed rows is FlexAttention's; else it runs segment by segment, see
    packed_attention.py.
    """

    name: str = "padded"
    pad_id: int = 0
    last_tokens: bool = False
    flex: bool = False


@dataclass
class Batch:
    """Examples as a model sees them, and the map from scored tokens back to responses.

    input_ids (rows, width).
    positions (tokens,): of every scored token, the place in rows*width whose hidden state predicts
    it. targets (tokens,): its id. owners (tokens,): the response it belongs to, ascending.
    ends (responses,): the place of each response's last token, where the layout feeds it.
    lengths (responses,): in scored tokens.
    chosen, rejected (examples,): the responses of each example; rejected is None for targets.
    lists (examples, longest list): the responses of each list, of which `chosen` is the first, with
    that one again behind a shorter list. listed: which are no repetition. None without lists.
    scores (responses,): NaN where the data have none.
    attention_mask (rows, width): of padded rows.
    position_ids (1, width) and segments (1, 1, responses, 4): of a packed row; blocks: the segments
    as a table for FlexAttention, where the layout uses it. See packed_attention.py.
    reference_logps (tokens,): log-probs under the frozen reference, where they are known already.
    token_weights (tokens,): float64 weights that came with the data; None where it has none.
    columns: (examples,) by name. examples: indices into the data. n_tokens: input tokens without
    padding. mismatched: for each response, in this order, its prompt with a response to another
    one; only for losses that read their log-probs.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor
    ends: Tensor | None
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor | None
    scores: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    segments: Tensor | None = None
    reference_logps: Tensor | None = None
    token_weights: Tensor | None = None
    blocks: tuple[Tensor, ...] | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    examples: list[int] = field(default_factory=list)
    n_tokens: int = 0
    lists: Tensor | None = None
    listed: Tensor | None = None
    mismatched: "Batch | None" = None

    def to(self, device) -> "Batch":
        """A copy on a device; `segments` stay on the CPU, where attention reads them."""
        device = torch.device(device)

        def move(value):
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if isinstance(value, Batch):
                return value.to(device)
            if not isinstance(value, Tensor):
                return value
            if device.type == "cuda":
                value = value.pin_memory()
            return value.to(device, non_blocking=True)

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        moved["segments"] = self.segments
        moved["columns"] = {name: move(value) for name, value in self.columns.items()}
        return Batch(**moved)


def lay_out(trees: list[tuple], layout: Layout) -> Batch:
    """[(prompt tokens, [response tokens, ...])] as a batch in which each response, in that order,
    is an example."""
    if layout.name != "prefix_shared":
        trees = [(prompt, [response]) for prompt, responses in trees for response in responses]
    responses = [response for _, of_prompt in trees for response in of_prompt]
    rows = _Rows.of(trees, layout)
    lengths = rows.lengths
    owners = np.repeat(np.arange(len(lengths)), lengths)
    batch = Batch(
        input_ids=torch.from_numpy(_input_ids(trees, responses, rows, layout.pad_id)),
        positions=torch.from_numpy(_positions(rows, owners)),
        targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)),
        owners=torch.from_numpy(owners),
        ends=torch.from_numpy(rows.begins + lengths - 1) if layout.last_tokens else None,
        lengths=torch.from_numpy(lengths),
        chosen=torch.arange(len(lengths)),
        rejected=None,
        scores=torch.full((len(lengths),), float("nan"), dtype=torch.float64),
        examples=list(range(len(lengths))),
        n_tokens=int(rows.prompts.sum() + rows.fed.sum()),
    )
    if layout.name == "padded":
        used = (rows.prompts + rows.fed)[:, None]
        batch.attention_mask = torch.from_numpy((np.arange(rows.width) < used).astype(np.int64))
        return batch
    batch.position_ids = torch.from_numpy(_position_ids(rows)[None])
    segments = np.stack(
        [rows.tree_begins[rows.tree_of], rows.prompts[rows.tree_of], rows.begins, rows.fed], axis=1
    )
    batch.segments = torch.from_numpy(segments)[None, None]
    batch.blocks = block_table(batch.segments, rows.width) if layout.flex else None
    return batch


def keep_scored(batch: Batch, scored: Tensor) -> None:
    """Leave out tokens of responses that no loss counts, such as a user's turn between two of the
    assistant's. scored (tokens,): whether each token of the batch is counted."""
    for name in ("positions", "targets", "owners", "reference_logps", "token_weights"):
        if (values := getattr(batch, name)) is not None:
            setattr(batch, name, values[scored])
    batch.lengths = torch.bincount(batch.owners, minlength=len(batch.lengths))


@dataclass
class _Rows:
    """Where trees (a prompt with its responses) lie in the flattened rows of a batch.

    Of each tree, (trees,): `prompts`, the prompt's length, and `tree_begins`, where it begins. Of
    each response, (responses,): `tree_of`, its tree; `lengths`, its tokens; `fed`, those that are
    inputs; `begins`, where it begins. A row has `width` places, and there are `n_rows`.
    """

    prompts: np.ndarray
    tree_begins: np.ndarray
    tree_of: np.ndarray
    lengths: np.ndarray
    fed: np.ndarray
    begins: np.ndarray
    width: int
    n_rows: int

    @classmethod
    def of(cls, trees: list[tuple], layout: Layout) -> "_Rows":
        prompts = np.array([len(prompt) for prompt, _ in trees])
        counts = np.array([len(responses) for _, responses in trees])
        lengths = np.array([len(response) for _, responses in trees for response in responses])
        # Nothing is predicted from the last token of a response.
        fed = lengths if layout.last_tokens else lengths - 1
        tree_of = np.repeat(np.arange(len(trees)), counts)
        first_responses = np.cumsum(counts) - counts  # of each tree
        fed_before = np.cumsum(fed) - fed  # inputs of all earlier responses
        if layout.name == "padded":
            width, n_rows = int((prompts + fed).max()), len(trees)
            tree_begins = np.arange(len(trees)) * width
        else:
            width, n_rows = int(prompts.sum() + fed.sum()), 1
            tree_begins = (np.cumsum(prompts) - prompts) + fed_before[first_responses]
        fed_before_in_tree = fed_before - fed_before[first_responses[tree_of]]
        begins = tree_begins[tree_of] + prompts[tree_of] + fed_before_in_tree
        return cls(prompts, tree_begins, tree_of, lengths, fed, begins, width, n_rows)


def _input_ids(trees: list[tuple], responses: list, rows: _Rows, pad_id: int) -> np.ndarray:
    """(rows, width)"""
    flat = np.full(rows.n_rows * rows.width, pad_id, dtype=np.int64)
    for (prompt, _), begin in zip(trees, rows.tree_begins, strict=True):
        flat[begin : begin + len(prompt)] = prompt
    for response, begin, n in zip(responses, rows.begins, rows.fed, strict=True):
        flat[begin : begin + n] = response[:n]
    return flat.reshape(rows.n_rows, rows.width)


def _positions(rows: _Rows, owners: np.ndarray) -> np.ndarray:
    """(tokens,): where in the flattened rows each scored token is predicted.

    The first token of every response is predicted from the last of its prompt.
    """
    prompt_ends = rows.tree_begins + rows.prompts - 1
    first_tokens = np.cumsum(rows.lengths) - rows.lengths
    within = np.arange(len(owners)) - first_tokens[owners]  # the token's place in its response
    return np.where(
        within == 0, prompt_ends[rows.tree_of[owners]], rows.begins[owners] + within - 1
    )


def _position_ids(rows: _Rows) -> np.ndarray:
    """(width,) of a packed row: each response continues from the positions of its prompt."""
    position_ids = np.zeros(rows.width, dtype=np.int64)
    for begin, n in zip(rows.tree_begins, rows.prompts, strict=True):
        position_ids[begin : begin + n] = np.arange(n)
    for begin, n, tree in zip(rows.begins, rows.fed, rows.tree_of, strict=True):
        prompt = rows.prompts[tree]
        position_ids[begin : begin + n] = np.arange(prompt, prompt + n)
    return position_ids
