"""Compare the losses with the code of their authors, and write the table of docs/parity.md.

    python scripts/parity.py docs/parity.md

tests/parity.json has the inputs, and for each row the losses and gradients that the authors' code
computed from them in float64. Code of others is no part of the repository, its numbers are. Where
the code could not be had, the numbers are those of the formula in the paper, in plain Python.

A row has `loss` and `settings` of ours, `source` (a repository on GitHub, or a paper), its
`commit`, `where` in it, and what is `compared`: "each" pair, the "mean" of the batch, the "list",
or pairs with log-probs of "tokens". `factor` times their numbers are to be ours. `running`: running
means before the batch. `note`: what was done to compare. `reason`: that of a difference.
"""

import argparse
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import list_losses  # noqa: F401  registers losses
import losses  # noqa: F401  registers losses
import pair_losses  # noqa: F401  registers losses
import token_losses  # noqa: F401  registers losses
from preflab.objective.registry import bind_loss
from preflab.objective.types import Pair, Ranking, Side
from preflab.settings.keys import CONFIG_DIR
from utils import atomic_write, path_argument

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "parity.json"
LEAVES = (
    "policy_logps",
    "kl",
    "values",
    "token_logps",
)  # what the published numbers have gradients of
SMALLEST = 1e-12  # differences below this are rounding, which differs between processors

HEAD = """# Parity with published code

`python scripts/parity.py docs/parity.md` writes this page from `tests/parity.json`, and
`python -m pytest tests/test_parity.py` compares the two. The file has the losses and gradients that
the code of the authors computes from the same float64 inputs: six pairs, four pairs with log-probs
of tokens, or a list of four responses. The code itself is not part of this repository. A row whose
source is a paper has the numbers of its formula, in plain Python: no code of its authors was found.

The differences are the largest of the loss and of its gradient by the log-probs, relative to their
number where that is above 1, and rounded up to a power of ten. Differences of 1e-12 and less are
rounding. A note says what was done to compare, or explains a difference.

{summary}

| `loss=` | settings | source | where | loss | gradient | note |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=path_argument, help="the Markdown file to write")
    path = parser.parse_args().output
    with atomic_write(path, "w") as f:
        f.write(render(read_fixtures()))
    print(f"wrote {path}")


def read_fixtures(path: Path = FIXTURES) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def batch_of(fixtures: dict) -> tuple[Pair, dict[str, Tensor]]:
    """The pairs, and the tensors of theirs by which the gradients are taken, by name."""
    values = {key: torch.tensor(v, dtype=torch.float64) for key, v in fixtures["pairs"].items()}
    leaves: dict[str, Tensor] = {}

    def side(name: str) -> Side:
        filled = {}
        for field in fields(Side):
            key = f"{name}_{field.name}"
            if field.name in ("policy_logps", "reference_logps"):
                model, _, rest = field.name.partition("_")
                key = f"{model}_{name}_{rest}"
            if key in values:
                filled[field.name] = values[key]
                if field.name in LEAVES:
                    leaves[key] = values[key].requires_grad_()
        return Side(**filled)

    columns = {key: torch.tensor(v, dtype=torch.float64) for key, v in fixtures["columns"].items()}
    norms = torch.tensor(fixtures["head_norms"], dtype=torch.float64)
    return Pair(side("chosen"), side("rejected"), columns, head_norms=norms), leaves


def tokens_of(fixtures: dict) -> tuple[Pair, dict[str, Tensor]]:
    """The pairs with log-probs of tokens, as `batch_of` returns the others."""
    leaves: dict[str, Tensor] = {}

    def side(name: str) -> Side:
        own = {
            key.removeprefix(f"{name}_"): torch.tensor(values)
            for key, values in fixtures["tokens"].items()
            if key.startswith(f"{name}_")
        }
        own |= {key: own[key].double() for key in own if key not in ("tokens", "lengths")}
        leaf = leaves[f"{name}_token_logps"] = own["token_logps"].requires_grad_()
        sums = {key.replace("token_", ""): own[key].sum(1) for key in own if "logps" in key}
        return Side(**own, policy_logps=leaf.sum(1), reference_logps=sums["reference_logps"])

    return Pair(side("chosen"), side("rejected")), leaves


def list_of(fixtures: dict) -> tuple[Ranking, dict[str, Tensor]]:
    """The one list of responses, as `batch_of` returns the pairs."""
    values = {key: torch.tensor([v], dtype=torch.float64) for key, v in fixtures["list"].items()}
    leaf = values["policy_logps"].requires_grad_()
    return Ranking(**values, mask=torch.ones_like(leaf, dtype=torch.bool)), {"policy_logps": leaf}


BATCHES = {"list": list_of, "tokens": tokens_of}


def differences(row: dict, fixtures: dict) -> tuple[float, float]:
    """The largest relative difference of the losses, and of the gradients."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "loss" / f"{row['loss']}.yaml"))
    loss = bind_loss(config | row["settings"])
    data, leaves = BATCHES.get(row["compared"], batch_of)(fixtures)
    running = {
        key: torch.tensor(v, dtype=torch.float64) for key, v in row.get("running", {}).items()
    }
    ours = loss.after(data, running).losses
    if row["compared"] == "mean":
        ours = ours.mean().reshape(1)
    factor = row.get("factor", 1.0)
    tensors = [leaves[name] for name in row["gradients"]]
    gradients = torch.autograd.grad(ours.sum(), tensors, allow_unused=True)
    of_gradients = [
        _difference(torch.zeros(len(theirs)) if own is None else own.reshape(-1), factor, theirs)
        for own, theirs in zip(gradients, row["gradients"].values(), strict=True)
    ]
    return _difference(ours.detach(), factor, row["losses"]), max(of_gradients)


def _difference(ours: Tensor, factor: float, theirs: list[float]) -> float:
    expected = factor * torch.tensor(theirs, dtype=torch.float64)
    if expected.shape != ours.shape:
        raise ValueError(f"{len(expected)} published numbers for {len(ours)} of ours")
    return ((ours - expected).abs() / expected.abs().clamp(min=1)).max().item()


def _bound(difference: float) -> str:
    exponent = math.ceil(math.log10(max(difference, SMALLEST)) - 1e-9)
    return f"1e{exponent}"


def _source(row: dict) -> str:
    if row["commit"] is None:
        arxiv = row["source"].removeprefix("arXiv:")
        return f"[{arxiv}](https://arxiv.org/abs/{arxiv})"
    return f"[{row['source']}](https://github.com/{row['source']}) {row['commit']}"


def render(fixtures: dict) -> str:
    """The page."""
    lines, unexplained = [], 0
    rows = sorted(fixtures["rows"], key=lambda row: (row["loss"], row["source"]))
    for row in rows:
        of_loss, of_gradient = differences(row, fixtures)
        unexplained += max(of_loss, of_gradient) > 1e-6 and "reason" not in row
        settings = " ".join(
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row["settings"].items()
        )
        cells = (
            f"`{row['loss']}`",
            settings.replace("True", "true"),
            _source(row),
            row["where"],
            _bound(of_loss),
            _bound(of_gradient),
            row.get("reason", row.get("note", "")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    from_code = sum(row["commit"] is not None for row in rows)
    summary = (
        f"There are {len(rows)} rows for {len({row['loss'] for row in rows})} losses,"
        f" {from_code} of them with code.\n{unexplained} of them have a difference above 1e-6 that"
        " is not explained."
    )
    return HEAD.format(summary=summary) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
