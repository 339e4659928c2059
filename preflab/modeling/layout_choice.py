"""The choice of a layout: what an architecture supports, and what a trial of the model shows."""

import torch

from preflab.batching.packed_attention import Support, block_table, check_flex
from preflab.batching.packed_models import by_segments_only, window_of
from preflab.batching.packing import LAYOUTS, Batch, Layout, lay_out
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.architecture_trial import (
    is_tested,
    merge_responses,
    supports_packed_rows,
)
from preflab.modeling.logprobs import Scorer
from preflab.settings.schema import Settings
from utils import ConfigError, first_line

BY_SEGMENTS = "attention segment by segment, slower"


def known_layouts(config: Settings, model) -> tuple[tuple[str, ...], str]:
    """The layouts that an architecture supports, the fastest first; and the reason where it
    supports only the padded one, else "".

    model: its transformers config. `choose_layout` also tries the model itself.
    """
    if config.model.attn_implementation:
        return ("padded",), (
            f"model.attn_implementation={config.model.attn_implementation} takes no packed rows"
        )
    supported = supports_packed_rows(model, config.model.trust_remote_code)
    return (LAYOUTS if supported.ok else ("padded",)), supported.reason


def choose_layout(
    config: Settings, policy: Scorer, world: World = ALONE, **details
) -> tuple[Layout, str]:
    """The layout of `config.layout`; and the reason where it is not the fastest of all, else "".

    "auto" is the fastest layout that gives this model the hidden states of the padded one.
    details: more fields of `Layout`. Raises ConfigError where the requested layout gives others.
    """
    requested = config.layout
    known, reason = known_layouts(config, policy.causal_lm.config)
    if requested == "padded":
        return Layout("padded", **details), reason
    if not reason:
        trusted = config.model.trust_remote_code
        longest = None if is_tested(policy.causal_lm.config, trusted) else config.max_length
        flex = flex_support(config, policy, world)
        sharing = check_sharing(policy, flex=flex.ok, longest=longest)
        if flex.ok and not sharing.ok:
            flex = Support(False, f"{BY_SEGMENTS}: {sharing.reason}")
            sharing = check_sharing(policy, longest=longest)
        if sharing.ok:
            name = known[0] if requested == "auto" else requested
            return Layout(name, flex=flex.ok, **details), flex.reason
        reason = sharing.reason
    if requested == "auto":
        return Layout("padded", **details), reason
    raise ConfigError(f"layout={requested} cannot be used: {reason}; use layout=padded")


def flex_support(config: Settings, policy: Scorer, world: World) -> Support:
    """Whether attention over packed rows can be FlexAttention.

    Never on a CPU, where attention segment by segment is faster; the reason is empty then.
    """
    if policy.device.type == "cpu":
        return Support(False)
    problem = _flex_problem(config, policy, world)
    return Support(False, f"{BY_SEGMENTS}: {problem}") if problem else Support(True)


def _flex_problem(config: Settings, policy: Scorer, world: World) -> str:
    """What prevents FlexAttention on a GPU; empty if nothing does."""
    if problem := by_segments_only(policy.causal_lm):
        return problem
    model = policy.causal_lm.config.get_text_config()
    window = window_of(model)
    if window is not None and window < config.max_length:
        return (
            f"attention windows of {window} tokens, texts of up to max_length={config.max_length}"
        )
    parameters = list(policy.model.parameters())
    if len({parameter.device for parameter in parameters}) > 1:
        return "the model is spread over several GPUs"
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    head_size = getattr(model, "head_dim", None) or model.hidden_size // heads
    dtype = policy.mixed or parameters[0].dtype
    flex = check_flex(heads, kv_heads, head_size, dtype, policy.device)
    if world.max([float(not flex.ok)])[0]:  # all ranks must use the same kernels
        return flex.reason or "another rank cannot use FlexAttention"
    return ""


@torch.no_grad()
def check_sharing(scorer: Scorer, flex: bool = False, longest: int | None = None) -> Support:
    """Whether packed rows give this model the hidden states of padded rows.

    longest: tokens of the longest text of the run. The texts of the trial are as long, so that they
    pass every window that a text of the run passes. None: a few tokens, which do for an
    architecture whose windows are tested.

    The trial is one or two random prompts with several responses. The control is the same packed
    row with a wrong mask, which lets responses see each other: the error of the right mask must be
    small compared with the error of the wrong one.
    """
    padded, shared, wrong = _trial_batches(scorer, flex, longest)
    hidden = []
    try:
        for batch in (padded, shared, wrong):
            batch = batch.to(scorer.device)
            states = scorer.run(lambda batch=batch: scorer.hidden(batch, batch.positions))
            hidden.append(states.double())
    except Exception as failure:  # kernels have no common exception class
        reason = f"attention over packed rows fails here ({first_line(failure)})"
        # After an interrupted forward pass the layers of a sharded model stay gathered.
        if scorer.placed_on is not None:
            raise ConfigError(f"{reason}; use layout=padded") from failure
        return Support(False, reason)
    expected, actual, control = hidden
    error = (actual - expected).abs().max().item()
    control_error = (control - expected).abs().max().item()
    if error < control_error * (0.02 if scorer.is_full_precision() else 0.2):
        return Support(True)
    return Support(
        False,
        f"hidden states of packed rows of {type(scorer.causal_lm).__name__} are off by {error:.2g}"
        f" (a wrong mask: by {control_error:.2g})",
    )


def _trial_batches(scorer: Scorer, flex: bool, longest: int | None) -> tuple[Batch, Batch, Batch]:
    """Random prompts and responses in padded rows, in a shared row, and in a shared row with a
    wrong mask."""
    generator = torch.Generator().manual_seed(0)  # the run's own random state does not change
    vocabulary = scorer.causal_lm.config.get_text_config().vocab_size

    def draw(n: int):
        return torch.randint(vocabulary, (n,), generator=generator).numpy()

    lengths = [(7, (5, 1, 3)), (1, (4, 6))]
    if longest is not None and longest > 16:  # two rows, because they cost what the run's do
        lengths = [(longest - 7, (5, 3))]
    trees = [(draw(prompt), [draw(n) for n in responses]) for prompt, responses in lengths]
    padded = lay_out(trees, Layout("padded", flex=flex))
    shared, wrong = (lay_out(trees, Layout("prefix_shared", flex=flex)) for _ in range(2))
    # All responses of a prompt as one long response: each sees those before it.
    wrong.segments = merge_responses(wrong.segments)
    wrong.blocks = block_table(wrong.segments, wrong.input_ids.shape[1]) if flex else None
    return padded, shared, wrong
