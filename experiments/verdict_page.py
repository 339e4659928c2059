"""The results of an experiment on disk, and its verdict in experiments/README.md."""

import json
import re

from experiments.claims import CLAIMS, OF_STUDIES
from experiments.workspace import ROOT
from preflab.reports import plot_style
from utils import atomic_write

RESULTS = ROOT / "experiments" / "results"
REDRAWN = " with language, SFT model, data and prompts drawn again for each seed"


def write_results(name: str, result: dict, figures: dict, *, redrawn: bool = False) -> None:
    """The numbers, the pictures, and the verdict in the README. redrawn: beside the verdict of
    seeds that share a model and data."""
    ending = "-redrawn" if redrawn else ""
    with atomic_write(RESULTS / f"{name}{ending}.json") as f:
        # Paths are written relative to the repository.
        f.write(json.dumps(result, indent=1).replace(f"{ROOT}/", "") + "\n")
    for picture, figure in figures.items():
        if figure is not None:
            with atomic_write(RESULTS / f"{picture}{ending}.png", "wb") as f:
                f.write(plot_style.png(figure))
    page = ROOT / "experiments" / "README.md"
    with atomic_write(page) as f:
        f.write(with_verdict(page.read_text(encoding="utf-8"), name, result, redrawn=redrawn))


def with_verdict(page: str, name: str, result: dict, *, redrawn: bool = False) -> str:
    """A page with the claim, the criterion and the verdict of an experiment between its marks; that
    of redrawn seeds follows the other one."""
    claim, criterion = (CLAIMS | OF_STUDIES)[name]
    holds = "holds" if result["holds"] else "does not hold"
    verdict = f"**It {holds} here{REDRAWN * redrawn}.**"
    if redrawn:
        mark, seeds = f"{name}-redrawn", ", ".join(map(str, result["seeds"]))
        body = f"{verdict} (Seeds {seeds}.) {result['found']}"
        if f"<!-- {mark} -->" not in page:
            after = f"<!-- end {name} -->"
            page = page.replace(after, f"{after}\n\n<!-- {mark} -->\n<!-- end {mark} -->", 1)
    else:
        mark = name
        body = (
            f"*Claim.* {claim}\n\n*Criterion, fixed before the run.* {criterion}\n\n"
            f"{verdict} {result['found']}"
        )
    section = f"<!-- {mark} -->\n{body}\n<!-- end {mark} -->"
    pattern = rf"<!-- {mark} -->.*<!-- end {mark} -->"
    return re.sub(pattern, lambda _: section, page, flags=re.DOTALL)
