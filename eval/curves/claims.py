"""What the paper says, beside what these runs show: verdicts come from intervals over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..statistics import Interval
from .bands import Estimate

AGREES, DISAGREES, IN_PART, UNCLEAR = "agrees", "disagrees", "in part", "unclear"
_WORDS = {
    AGREES: "These runs agree",
    DISAGREES: "These runs disagree",
    IN_PART: "These runs agree in part",
    UNCLEAR: "These runs do not decide it",
}


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper, judged.

    Args:
        group: label of the runs it was judged by.
        source: figure.
        claim: what the paper says, in our words.
        verdict: "agrees", "disagrees", "in part", or "unclear" (the interval leaves both open, or
            there is one seed only).
        evidence: the figures that decide.
    """

    group: str
    source: str
    claim: str
    verdict: str
    evidence: str

    def sentence(self) -> str:
        """For the report."""
        judged = f"{_WORDS[self.verdict]} ({self.group})"
        return f"{self.source}: {self.claim}. {judged}: {self.evidence}."


def above(estimate: Estimate, limit: float) -> str:
    """Whether a figure lies above ``limit``, by its whole interval; one seed leaves it unclear."""
    interval = estimate.interval
    if interval is None:
        return UNCLEAR
    return AGREES if interval.low > limit else DISAGREES if interval.high < limit else UNCLEAR


def below(estimate: Estimate, limit: float) -> str:
    """Whether it lies below."""
    return {AGREES: DISAGREES, DISAGREES: AGREES, UNCLEAR: UNCLEAR}[above(estimate, limit)]


def both(verdicts: Sequence[str]) -> str:
    """Agreement on every count, disagreement on any, else unclear."""
    if DISAGREES in verdicts:
        return DISAGREES
    return AGREES if set(verdicts) == {AGREES} else UNCLEAR


def shown(estimate: Estimate, form: str = ".3g", unit: str = "") -> str:
    """Mean and interval in words."""
    if estimate.mean is None:
        return "n/a"
    return f"{estimate.mean:{form}}{unit} {interval_shown(estimate.interval, form)}"


def interval_shown(interval: Interval | None, form: str) -> str:
    """An interval in brackets; a single seed has none."""
    if interval is None:
        return "[one seed]"
    return f"[{interval.low:{form}}, {interval.high:{form}}]"


def bullets(claims: Sequence[Claim]) -> list[str]:
    """A Markdown list of the judged claims, what disagrees first."""
    order = (DISAGREES, IN_PART, UNCLEAR, AGREES)
    return [f"- {c.sentence()}" for c in sorted(claims, key=lambda c: order.index(c.verdict))]
