"""The page of evidence: its figures, verdicts and claims."""

from math import inf

import pytest

from docs import evidence
from docs.evidence import FAILS, HOLDS, NO_DIFFERENCE, OPEN, Check, Figure
from eval.results.compare import summaries
from eval.results.table import Entry, Result, Row, read, write

RESULTS = sorted((evidence.ROOT / "results").rglob("result.json"))

BELOW_ZERO = Check("", "", "", "", upper=0.0)
ABOVE_TWO = Check("", "", "", "", lower=2.0)
NEAR_ZERO = Check("", "", "", "", tolerance=0.1)  # relative to the size, which is 5 below


@pytest.mark.parametrize(
    ("check", "low", "high", "verdict"),
    [
        (BELOW_ZERO, -2.0, -1.0, HOLDS),
        (BELOW_ZERO, -1.0, 1.0, OPEN),
        (BELOW_ZERO, 0.0, 1.0, FAILS),
        (BELOW_ZERO, 0.0, 0.0, NO_DIFFERENCE),
        (ABOVE_TWO, 0.0, 0.0, FAILS),
        (ABOVE_TWO, 2.5, 3.0, HOLDS),
        (ABOVE_TWO, 1.0, 3.0, OPEN),
        (NEAR_ZERO, -0.4, 0.4, HOLDS),
        (NEAR_ZERO, 0.0, 0.0, HOLDS),
        (NEAR_ZERO, -0.6, 0.4, OPEN),
        (NEAR_ZERO, 0.6, 0.7, FAILS),
    ],
)
def test_a_verdict_depends_on_where_the_whole_interval_is(check, low, high, verdict):
    assert evidence.verdict(check, Figure((low + high) / 2, low, high, 5, size=5.0)) == verdict


def test_a_figure_is_the_mean_paired_difference_with_its_interval(tmp_path):
    rows = []
    for group, losses in (("LoRA", (3.0, 5.0, 4.0)), ("Bi-LoRA", (2.0, 4.5, 3.0))):
        for seed, loss in enumerate(losses):
            rows.append(Row(f"{group}{seed}", group, seed, "loss", value=loss))
    entries = [Entry(row.subject, row.group) for row in rows]
    write(Result("sweep", entries, rows=rows), tmp_path, "")
    figure = evidence.figure(Check("", str(tmp_path), "Bi-LoRA", "loss", control="LoRA", upper=0.0))
    assert figure.mean == pytest.approx((-1 - 0.5 - 1) / 3)
    assert (figure.count, figure.size) == (3, 4.0)  # the size is the control's mean
    # Student's t for the differences -1, -0.5 and -1: 4.302653 with 2 degrees of freedom
    half_width = 4.302653 * (0.25 / 3) ** 0.5 / 3**0.5
    assert figure.high - figure.mean == pytest.approx(half_width)
    assert figure.mean - figure.low == pytest.approx(half_width)
    with pytest.raises(ValueError, match="lossy of LoRA"):
        evidence.figure(Check("", str(tmp_path), "LoRA", "lossy"))


def test_a_claim_has_the_verdict_of_its_checks_or_their_counts():
    assert evidence.overall([HOLDS, HOLDS]) == HOLDS
    assert evidence.overall([HOLDS, FAILS]) == f"1 of 2: {HOLDS}, 1 of 2: {FAILS}"


def test_every_claim_of_the_paper_has_an_entry_and_each_check_has_one_bound():
    names = [claim.name for claim in evidence.claims()]  # C1 to C13 are the paper's
    assert names[:13] == [f"C{number}" for number in range(1, 14)]
    numbers = [int(name.removeprefix("F")) for name in names[13:]]
    assert numbers == sorted(set(numbers)), "a number is not reused: F2 was withdrawn"
    for claim in evidence.claims():
        assert claim.where
        assert claim.command
        assert claim.checks
        for check in claim.checks:
            assert (check.upper < inf) + (check.lower > -inf) + (check.tolerance is not None) == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.parent.name)
def test_the_intervals_of_every_recorded_result_follow_from_its_rows(file):
    result = read(file.parent)
    lines = {}
    for over in {line.over for line in result.summaries}:
        for line in summaries(result.rows, result.control, over):
            lines[over, line.group, line.metric, line.item, line.step] = line
    for line in result.summaries:
        expected = lines.get((line.over, line.group, line.metric, line.item, line.step))
        if line.interval is not None:
            assert line.interval == pytest.approx(expected.interval)
        if line.difference_interval is not None:
            interval = expected.difference_interval
            assert line.difference_interval == pytest.approx(interval, rel=1e-6, abs=1e-12)
