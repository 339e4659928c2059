"""Which layout a model supports, and the checks that find out."""

import torch

from preflab.batching.packed_attention import SHARING, block_table, flex_problem, window_of
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.logprobs import Scorer
from utils import ConfigError, first_line


def known_layouts(config, model) -> tuple[tuple[str, ...], str]:
    """The layouts that an architecture is known to support, the fastest first, and why there are no
    more.

    model: its transformers config. What only a run of the model can tell is left to
    `choose_layout`.
    """
    why = ""
    if config.model.attn_implementation:
        why = f"model.attn_implementation={config.model.attn_implementation} takes no packed rows"
    elif model.model_type not in SHARING:
        why = (
            f"{model.model_type} is not among the architectures tested with packed rows, SHARING in"
            " attention.py"
        )
    return ("padded",) if why else LAYOUTS, why


def choose_layout(config, policy: Scorer, world: World = ALONE, **details) -> tuple[Layout, str]:
    """The layout of `config.layout`, or the fastest that gives this model the padded layout's
    log-probs; and why not a faster one.

    details: more fields of the layout. Raises ConfigError where the layout that was asked for is
    wrong for the model.
    """
    known, why = known_layouts(config, policy.causal_lm.config)
    asked = config.layout
    if asked == "padded" or (asked == "auto" and known == ("padded",)):
        return Layout("padded", **details), why
    if not why:
        slower = why_not_flex(config, policy, world)
        why = sharing_problem(policy, flex=slower is None) or ""
        if why and slower is None:
            slower, why = (
                f"attention segment by segment, slower: {why}",
                sharing_problem(policy) or "",
            )
    if not why:
        return (
            Layout(asked if asked != "auto" else LAYOUTS[0], flex=slower is None, **details),
            slower or "",
        )
    if asked != "auto":
        raise ConfigError(f"layout={asked} cannot be had: {why}; use layout=padded")
    return Layout("padded", **details), why


def why_not_flex(config, policy: Scorer, world: World) -> str | None:
    """Why attention over packed rows goes segment by segment, as is best on a CPU (""); None if it
    goes by FlexAttention."""
    model = policy.causal_lm.config.get_text_config()
    if policy.device.type == "cpu":
        return ""
    window = window_of(model)
    if window is not None and window < config.max_length:
        problem = (
            f"attention windows of {window} tokens, texts of up to max_length={config.max_length}"
        )
    elif len({p.device for p in policy.model.parameters()}) > 1:
        problem = "the model is spread over several GPUs"
    else:
        heads = model.num_attention_heads
        sizes = (
            heads,
            getattr(model, "num_key_value_heads", None) or heads,
            getattr(model, "head_dim", None) or model.hidden_size // heads,
        )
        problem = flex_problem(
            *sizes, policy.mixed or next(policy.model.parameters()).dtype, policy.device
        )
        if world.max([float(problem is not None)])[0]:  # all ranks attend alike
            problem = problem or "another rank cannot use FlexAttention"
    return problem and f"attention segment by segment, slower: {problem}"


@torch.no_grad()
def sharing_problem(scorer: Scorer, flex: bool = False) -> str | None:
    """What is wrong with packed rows in this model, seen on two made-up prompts with several
    responses each; None if nothing.

    The control is the same row with responses that see each other: a model that cannot tell them
    apart proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = scorer.causal_lm.config.get_text_config().vocab_size
    trees = [(7, (5, 1, 3)), (1, (4, 6))]
    draw = lambda n: torch.randint(vocabulary, (n,), generator=generator).numpy()  # noqa: E731
    tokens = [(draw(prompt), [draw(n) for n in responses]) for prompt, responses in trees]
    padded, shared, wrong = (
        lay_out(tokens, Layout(name, flex=flex))
        for name in ("padded", "prefix_shared", "prefix_shared")
    )
    wrong.segments = torch.tensor([[[[0, 7, 7, 6], [13, 1, 14, 8]]]])  # one long response a prompt
    wrong.blocks = block_table(wrong.segments, wrong.input_ids.shape[1]) if flex else None
    found = []
    try:
        for batch in (batch.to(scorer.device) for batch in (padded, shared, wrong)):
            found.append(
                scorer.run(lambda batch=batch: scorer.hidden(batch, batch.positions)).double()
            )
    except Exception as failure:  # kernels fail in ways of their own
        told = f"attention over packed rows fails here ({first_line(failure)})"
        if (
            scorer.placed_on is not None
        ):  # a forward pass that broke off leaves a sharded model half gathered
            raise ConfigError(f"{told}; use layout=padded") from failure
        return told
    error, control = ((other - found[0]).abs().max().item() for other in found[1:])
    if error < control * (0.02 if scorer.is_full_precision() else 0.2):
        return None
    return (
        f"hidden states of packed rows of {type(scorer.causal_lm).__name__} are off by {error:.2g}"
        f" (a wrong mask: by {control:.2g})"
    )
