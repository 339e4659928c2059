"""docs/parity.md is what scripts/parity.py writes, and says what it must."""

import copy
import re

import pytest
from conftest import ROOT

from preflab.objective.registry import LOSSES
from scripts import parity

FIXTURES = parity.read_fixtures()


@pytest.fixture(scope="module")
def page() -> str:
    return parity.render(FIXTURES)


def test_the_page_is_the_one_that_the_script_writes(page):
    assert (ROOT / "docs" / "parity.md").read_text(encoding="utf-8") == page


def test_there_are_forty_rows_and_no_difference_is_unexplained(page):
    rows = [line for line in page.splitlines() if line.startswith("| `")][1:]  # without the head
    assert len(rows) == len(FIXTURES["rows"]) >= 40
    assert "\n0 of them have a difference above 1e-6 that is not explained" in page
    large = [row for row in rows if re.search(r"\| 1e-?[0-5] \|", row)]
    explained = [row for row in FIXTURES["rows"] if "reason" in row]
    assert len(large) == len(explained) == 1  # QRPO's constant


def test_every_loss_has_a_row_unless_it_is_made_of_others():
    # tdpo is the switch between two others; kto_unpaired is kto on responses of their own; sft is
    # the log-prob itself
    others = {"tdpo", "kto_unpaired", "sft", "weighted_sum"}
    modules = ("losses", "pair_losses", "list_losses", "token_losses")
    names = {name for name, spec in LOSSES.items() if spec.function.__module__ in modules}
    assert {row["loss"] for row in FIXTURES["rows"]} == names - others


@pytest.mark.parametrize("what", ["losses", "gradients"])
def test_a_number_that_is_wrong_in_the_fifth_digit_is_seen(what):
    for n in (0, len(FIXTURES["rows"]) - 1):
        row = copy.deepcopy(FIXTURES["rows"][n])
        numbers = row["losses"] if what == "losses" else next(iter(row["gradients"].values()))
        assert max(parity.differences(row, FIXTURES)) < 1e-12
        numbers[0] += 1e-5
        assert max(parity.differences(row, FIXTURES)) > 5e-6
