"""How prompts and responses become rows: padded, packed, or packed with each prompt written once.

Every batch says, for each scored token, where its hidden state sits, which token it is and which
response owns it, so that losses and log-probs never see rows.
"""

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from preflab.batching.packed_attention import block_table


@dataclass(frozen=True)
class Layout:
    """How responses become rows.

    padded: a row for each response, its prompt in front, padding behind. packed: the same one after
    the other in a single row, without padding. prefix_shared: packed, with each prompt written once
    and all its responses behind it. last_tokens: also feed the last token of each response, which
    nothing is predicted from (a scalar head reads it). flex: attention over packed rows by
    FlexAttention; otherwise segment by segment, see attention.py.
    """

    name: str = "padded"
    pad_id: int = 0
    last_tokens: bool = False
    flex: bool = False


LAYOUTS = ("prefix_shared", "packed", "padded")  # the fastest first


@dataclass
class Batch:
    """Examples as a model sees them, and the map from scored tokens back to responses.

    input_ids (rows, width). Padded: attention_mask (rows, width). Packed: one row, position_ids (1,
    width), segments (1, 1, responses, 4), see attention.py. For every scored token: `positions`
    (tokens,), where in rows*width the hidden state sits that predicts it; `targets` (tokens,), its
    id; `owners` (tokens,), the response it belongs to, in order. `ends` (responses,): where the
    last token of each response sits, if the layout feeds it. lengths (responses,) in scored tokens.
    chosen, rejected (examples,): responses of each example; rejected is None for targets. scores
    (responses,), NaN where the data has none. columns: (examples,) by name. examples: indices into
    the data. reference_logps (tokens,): log-probs under the frozen reference, where they are known
    already.
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
    blocks: tuple[Tensor, ...] | None = (
        None  # the same as a table of blocks, where layers get a block mask
    )
    columns: dict[str, Tensor] = field(default_factory=dict)
    examples: list[int] = field(default_factory=list)
    n_tokens: int = 0  # input tokens, padding excluded

    def to(self, device) -> "Batch":
        device = torch.device(device)

        def move(value):
            if isinstance(value, tuple):
                return tuple(map(move, value))
            if not isinstance(value, Tensor):
                return value
            return (value.pin_memory() if device.type == "cuda" else value).to(
                device, non_blocking=True
            )

        moved = {f.name: move(getattr(self, f.name)) for f in fields(self)}
        moved["segments"] = self.segments  # read on the CPU
        moved["columns"] = {name: move(value) for name, value in self.columns.items()}
        return Batch(**moved)


def lay_out(trees: list[tuple], layout: Layout) -> Batch:
    """[(prompt tokens, [response tokens, ...])] as a batch in which each response, in that order,
    is its own example."""
    if layout.name != "prefix_shared":
        trees = [(prompt, [response]) for prompt, responses in trees for response in responses]
    prompts = np.array([len(prompt) for prompt, _ in trees])
    counts = np.array([len(responses) for _, responses in trees])
    lengths = np.array([len(response) for _, responses in trees for response in responses])
    fed = lengths if layout.last_tokens else lengths - 1  # tokens of each response that are inputs
    tree_of = np.repeat(np.arange(len(trees)), counts)
    before = np.cumsum(fed) - fed  # inputs of the responses in front
    if layout.name == "padded":
        width = int((prompts + fed).max())
        row_begins = np.arange(len(trees)) * width
    else:
        width = int(prompts.sum() + fed.sum())
        row_begins = (np.cumsum(prompts) - prompts) + before[np.cumsum(counts) - counts]
    firsts = (
        row_begins + prompts - 1
    )  # the last position of each prompt: it predicts the first token of every response
    begins = (
        firsts[tree_of] + 1 + before - before[(np.cumsum(counts) - counts)[tree_of]]
    )  # where each response begins
    flat = np.full(
        len(trees) * width if layout.name == "padded" else width, layout.pad_id, dtype=np.int64
    )
    responses = [response for _, of_tree in trees for response in of_tree]
    for (prompt, _), begin in zip(trees, row_begins):
        flat[begin : begin + len(prompt)] = prompt
    for response, begin, n in zip(responses, begins, fed):
        flat[begin : begin + n] = response[:n]
    owners = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(owners)) - (np.cumsum(lengths) - lengths)[owners]
    positions = np.where(within == 0, firsts[tree_of[owners]], begins[owners] + within - 1)
    batch = Batch(
        input_ids=torch.from_numpy(flat.reshape(-1, width)),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(np.concatenate(responses).astype(np.int64)),
        owners=torch.from_numpy(owners),
        ends=torch.from_numpy(begins + lengths - 1) if layout.last_tokens else None,
        lengths=torch.from_numpy(lengths),
        chosen=torch.arange(len(lengths)),
        rejected=None,
        scores=torch.full((len(lengths),), float("nan"), dtype=torch.float64),
        examples=list(range(len(lengths))),
        n_tokens=int(prompts.sum() + fed.sum()),
    )
    if layout.name == "padded":
        batch.attention_mask = torch.from_numpy(
            (np.arange(width) < (prompts + fed)[:, None]).astype(np.int64)
        )
        return batch
    place = np.arange(width)
    place -= np.repeat(
        row_begins, prompts + np.add.reduceat(fed, np.cumsum(counts) - counts)
    )  # the prompt's positions ...
    for begin, n, tree in zip(begins, fed, tree_of):  # ... from which each response goes on
        place[begin : begin + n] = np.arange(prompts[tree], prompts[tree] + n)
    batch.position_ids = torch.from_numpy(place[None])
    segments = np.stack([row_begins[tree_of], prompts[tree_of], begins, fed], axis=1)
    batch.segments = torch.from_numpy(segments)[None, None]
    batch.blocks = block_table(batch.segments, width) if layout.flex else None
    return batch
