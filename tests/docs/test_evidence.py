"""The page of evidence: what a figure says of a claim, and where the figure comes from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from docs import evidence
from docs.evidence import FAILS, HOLDS, MISSING, OPEN, Check, Claim, Figure
from eval.table import Entry, Result, Row, write

BELOW = Check("", "", "", "", below=0.0)
ABOVE = Check("", "", "", "", above=2.0)
WITHIN = Check("", "", "", "", within=0.1)


@pytest.mark.parametrize(
    ("check", "low", "high", "said"),
    [
        (BELOW, -2.0, -1.0, HOLDS),
        (BELOW, -1.0, 1.0, OPEN),
        (BELOW, 1.0, 2.0, FAILS),
        (BELOW, 0.0, 0.0, FAILS),
        (ABOVE, 2.5, 3.0, HOLDS),
        (ABOVE, 1.0, 3.0, OPEN),
        (WITHIN, -0.4, 0.4, HOLDS),
        (WITHIN, -0.6, 0.4, OPEN),
        (WITHIN, 0.6, 0.7, FAILS),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(
    check: Check, low: float, high: float, said: str
) -> None:
    found = Figure((low + high) / 2, low, high, count=5, size=5.0)
    assert evidence.verdict(check, found) == said
    assert evidence.verdict(check, None) == MISSING


def test_a_figure_is_the_mean_of_pairs_with_its_interval(tmp_path: Path) -> None:
    losses = {"LoRA": (3.0, 5.0, 4.0), "Bi-LoRA": (2.0, 4.5, 3.0)}
    rows = [
        Row(f"{group}{seed}", group, seed, "loss", value=value)
        for group, values in losses.items()
        for seed, value in enumerate(values)
    ]
    entries = [Entry(row.subject, row.group) for row in rows]
    write(Result("sweep", entries, rows=rows), tmp_path, "")
    check = Check("", str(tmp_path), "Bi-LoRA", "loss", control="LoRA", below=0.0)
    found = evidence.figure(check)
    assert found is not None
    assert (found.mean, found.count, found.size) == (pytest.approx(-2.5 / 3), 3, 4.0)
    assert -1 <= found.low < found.mean < found.high <= -0.5
    assert evidence.figure(Check("", str(tmp_path / "none"), "LoRA", "loss")) is None
    with pytest.raises(ValueError, match="lossy of LoRA"):
        evidence.figure(Check("", str(tmp_path), "LoRA", "lossy"))


def test_a_claim_is_what_its_checks_agree_in() -> None:
    claim = Claim("C1", "", "", "")
    assert evidence.overall(claim, [HOLDS, MISSING, HOLDS]) == HOLDS
    assert evidence.overall(claim, [HOLDS, FAILS]) == f"1 of 2: {HOLDS}, 1 of 2: {FAILS}"
    assert evidence.overall(claim, [MISSING]) == MISSING


def test_every_claim_says_where_the_paper_has_it_and_asks_for_one_side() -> None:
    claims = evidence.claims()
    names = [claim.name for claim in claims]
    assert names == [
        *(f"C{number}" for number in range(1, 14)),
        *(f"F{number}" for number in range(1, len(names) - 12)),
    ]
    for claim in claims:
        assert claim.where
        assert claim.command
        assert bool(claim.checks) != bool(claim.untested)
        for check in claim.checks:
            sides = (check.below, check.above, check.within)
            assert sum(side is not None and math.isfinite(side) for side in sides) == 1
