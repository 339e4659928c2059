"""The trial of an architecture that no test here covers: packed rows against every response alone,
in float64 and with gradients, on a small model of the same class.

Whether packed rows are right depends on the code of an architecture and on the switches of its
config, not on its weights and widths. The small model has the class and the config of the real one:
every kind of layer, the same rotary embeddings, biases and caps. Fewer are its layers, heads,
experts and tokens, and shorter its windows and its positions, so that the texts of the trial are
longer than the windows and its packed rows longer than the positions. `choose_layout` then tries
the real model too.
"""

import contextlib
import copy
import logging

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from preflab.batching.packed_attention import Support
from preflab.batching.packed_models import SHARING, enable
from preflab.batching.packing import LAYOUTS, Batch, Layout, lay_out
from preflab.modeling.logprobs import Scorer, score_responses
from utils import first_line

# Lengths of prompts and their responses. A prompt with all its responses has no more tokens than
# POSITIONS, and a row has more. Prompts of one token, responses of one, and single responses are
# among them.
TRIALS = [
    [(3, (5, 1)), (20, (25, 10, 2)), (9, (6,))],
    [(1, (12, 1)), (31, (9, 20)), (8, (20, 3, 20))],
]
POSITIONS, WINDOW, VOCABULARY = 64, 8, 64

# Names of the number of experts that a token is sent to.
TOP_K = {"num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"}

# Parameters of a model that is still small: less than a second in each direction.
SMALL = 50_000_000

# Largest difference of a log-prob in nats, and of a gradient relative to the largest one: softmax
# and norms are in float32 in many models. A wrong mask must give CONTROL.
BOUND, CONTROL = 1e-4, 1e-2

logger = logging.getLogger(__name__)
_results: dict[str, Support] = {}


def supports_packed_rows(config, trust_remote_code: bool = False) -> Support:
    """Whether an architecture can read packed rows: the tests say so, or its trial passes.

    config: of transformers. An architecture is tried once in a process, in a second or a few.
    """
    if is_tested(config, trust_remote_code):
        return Support(True)
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _results:
        _results[key] = _try_architecture(config, trust_remote_code)
        if _results[key].ok:  # else the choice of the layout says why
            logger.info(f"packed rows of {config.model_type} pass their trial in a small model")
    return _results[key]


def is_tested(config, trust_remote_code: bool) -> bool:
    """Whether the tests cover an architecture: it is in SHARING, and its code is transformers'."""
    has_own_code = trust_remote_code and getattr(config, "auto_map", None)
    return config.model_type in SHARING and not has_own_code


def merge_responses(segments: Tensor) -> Tensor:
    """Segments with all responses of a prompt as one, in which each sees those before it: a wrong
    mask, as a control."""
    rows: dict[int, list[int]] = {}
    for begin, prompt, response_begin, length in segments.flatten(0, 2).tolist():
        rows.setdefault(begin, [begin, prompt, response_begin, 0])[3] += length
    return torch.tensor(list(rows.values()))[None, None]


def _try_architecture(config, trust_remote_code: bool) -> Support:
    untested = (
        f"{config.model_type} is not among the architectures tested with packed rows, SHARING in"
        " preflab/batching/packed_models.py, and its trial"
    )
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            plain = _build(small_config(config), trust_remote_code)
            model = copy.deepcopy(plain)
            enable(model)
            problem = _compare(plain, model)
    except Exception as failure:  # code of any kind
        return Support(False, f"{untested} fails ({first_line(failure)})")
    return Support(False, f"{untested} {problem}") if problem else Support(True)


def small_config(config):
    """The config of a small model with every kind of layer that `config` describes.

    Raises ValueError for a model that has parts beside its text model.
    """
    if config.get_text_config() is not config:
        raise ValueError("the model reads more than text")
    small = copy.deepcopy(config)
    _cut_layers(small)
    for name, value in vars(config).items():
        if isinstance(value, int) and not isinstance(value, bool):
            size = _small_size(name, value)
            if size != value:
                setattr(small, name, size)
    _cut_heads(small, config)
    for rotary in [getattr(small, "rope_parameters", None)]:
        for one in [rotary, *(rotary or {}).values()]:
            original = one.get("original_max_position_embeddings") if isinstance(one, dict) else 0
            if original:
                one["original_max_position_embeddings"] = min(original, POSITIONS)
    small._experts_implementation = "eager"  # torch's grouped products have no float64
    return small


def _small_size(name: str, value: int) -> int:
    """A number of a config, reduced by what its name says it is."""
    if name.endswith("_token_id"):
        return 0
    if name == "vocab_size":
        return VOCABULARY
    if ("window" in name or "chunk" in name) and "layers" not in name:
        return min(value, WINDOW)
    if "position" in name or name in ("max_seq_len", "max_sequence_length", "seq_length"):
        return min(value, POSITIONS)
    if name.endswith(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")):
        return min(value, 64)
    if name in TOP_K:
        return min(value, 2)
    if name.endswith("experts"):
        return min(value, 4)
    if name in ("n_group", "topk_group"):
        return 1
    return value


def _cut_layers(small) -> None:
    """Keep the first six layers and the first of each kind that the lists of the config tell."""
    n = small.num_hidden_layers
    lists = {k: v for k, v in vars(small).items() if isinstance(v, list) and len(v) == n}
    kinds = list(zip(*(map(str, values) for values in lists.values()), strict=True))
    kept = sorted({*range(min(n, 6)), *(kinds.index(kind) for kind in kinds)})
    small.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(small, name, [values[i] for i in kept])


def _cut_heads(small, config) -> None:
    """Two heads, or four that share keys and values in pairs; as wide as those of `config`, because
    rotary embeddings may be written for that width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = {
        name: getattr(config, name)
        for name in ("num_key_value_heads", "num_kv_heads")
        if getattr(config, name, None) not in (None, heads, 1)
    }
    for name in shared:
        setattr(small, name, 2)
    small.num_attention_heads = 4 if shared else 2
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) == heads:
            setattr(small, name, small.num_attention_heads)
    small.hidden_size = small.num_attention_heads * width


def _build(config, trust_remote_code: bool) -> nn.Module:
    """A random model in float64 whose attention is far from uniform.

    Raises ValueError for a model that is not small, whose config has sizes of other names.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if (n := empty.num_parameters()) > SMALL:
        raise ValueError(f"its small model has {n} parameters")
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, trust_remote_code=trust_remote_code
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # norms, biases and sinks are often all equal
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _compare(plain: nn.Module, model: nn.Module) -> str:
    """What differs between each response alone in an untouched model and all rows of one that
    `enable` has changed; empty if nothing does."""
    generator = torch.Generator().manual_seed(0)
    for lengths in TRIALS:
        trees = [
            (_draw(prompt, generator), [_draw(n, generator) for n in responses])
            for prompt, responses in lengths
        ]
        alone = [(prompt, [response]) for prompt, responses in trees for response in responses]
        expected, gradients = _values_and_gradients(
            plain, [lay_out([tree], Layout("padded")) for tree in alone]
        )
        for name in LAYOUTS:
            actual, ours = _values_and_gradients(model, [lay_out(trees, Layout(name))])
            error = _largest(actual - expected)
            if not error < BOUND:
                return f"gives other log-probs in {name} rows, by {error:.2g}"
            scale = max(map(_largest, gradients.values()))
            if ours.keys() != gradients.keys():
                return f"gives other parameters a gradient in {name} rows"
            error = max(_largest(ours[key] - gradients[key]) for key in gradients) / scale
            if not error < BOUND:
                return f"gives other gradients in {name} rows, by {error:.2g} relative"
        wrong = lay_out(trees, Layout("prefix_shared"))
        wrong.segments = merge_responses(wrong.segments)
        with torch.no_grad():
            control = score_responses(Scorer(model), wrong).token_logps
        if not _largest(control - expected) > CONTROL:
            return "cannot tell a right mask from a wrong one"
    return ""


def _draw(n: int, generator: torch.Generator):
    return torch.randint(VOCABULARY, (n,), generator=generator).numpy()


def _values_and_gradients(
    model: nn.Module, batches: list[Batch]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the response tokens, and every parameter's gradient of their weighted sum."""
    logps = torch.cat([score_responses(Scorer(model), batch).token_logps for batch in batches])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    gradients = torch.autograd.grad(
        (logps * weights).sum(), list(trained.values()), allow_unused=True
    )
    pairs = zip(trained, gradients, strict=True)
    return logps.detach(), {name: g for name, g in pairs if g is not None}


def _largest(values: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    return values.abs().max().item()


@contextlib.contextmanager
def _quiet():
    """Without the warnings of transformers, which the real model has given already."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
