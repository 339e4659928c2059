"""Linear layers that decode with weights in oneDNN's blocked format, on a CPU."""

import contextlib
import functools

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from preflab.modeling.logprobs import Scorer


@contextlib.contextmanager
def packed_weights(policy: Scorer):
    """Inside, the linear layers of a float32 model on a CPU use weights in oneDNN's blocked format.

    A decoding step multiplies them with a few rows only, which takes up to three times as long with
    plain weights. It costs a second copy of the weights. Models that are placed over ranks or
    devices stay as they are.
    """
    model, changed = policy.causal_lm, []
    usable = (
        policy.placed_on is None
        and policy.autocast is None
        and torch.backends.mkldnn.is_available()
    )
    try:
        for module in model.modules() if usable else ():
            if not _can_pack(module):
                continue
            weight = module.weight.detach()
            if isinstance(module, Conv1D):  # GPT-2's layers store the transposed weight
                weight = weight.t()
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
            module.forward = functools.partial(_packed_linear, packed, module.bias)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


def _can_pack(module: nn.Module) -> bool:
    return (
        type(module) in (nn.Linear, Conv1D)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _packed_linear(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
