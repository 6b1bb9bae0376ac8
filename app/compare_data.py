"""What the Compare tab shows, as plain data: scores per prompt, order, one view, its link.

Pure functions on a ``Scored``; no files and no widgets. Adapters and prompts are positions in
the result's lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from urllib.parse import urlencode

from scipy import stats

from eval.clip_scores.names import METRICS
from eval.table import Summary

from .scored import Scored, ScoredImage

ORDERS = {
    "gain": "Largest gain first",
    "loss": "Largest loss first",
    "name": "By name",
    "list": "As in the prompt set",
}
"""How the prompts are sorted, by the change from the first adapter to the second."""
IMAGE_METRICS = tuple(name for name in METRICS if name != "diversity")


@dataclass(frozen=True)
class View:
    """One comparison on the screen.

    Args:
        scores: path of the score folder.
        a, b: adapters of the pair; the change is b minus a.
        also: adapters that are shown beside them.
        prompt, seed: of the images.
        metric: by which the prompts are listed.
        order: key of :data:`ORDERS`.
        words: only prompts that contain all of these are listed.
    """

    scores: str
    a: int
    b: int
    also: tuple[int, ...]
    prompt: int
    seed: int
    metric: str
    order: str = "gain"
    words: str = ""

    @property
    def adapters(self) -> tuple[int, ...]:
        """All that are shown, each once, the pair first."""
        return tuple(dict.fromkeys((self.a, self.b, *self.also)))


@dataclass(frozen=True)
class Row:
    """A prompt in the list; scores are means over the seeds that both adapters have.

    Args:
        name: what the prompt names, where the prompt set says, else its text.
        certain: whether the 95 % interval (Student's t over the seeds) of the change leaves out 0.
    """

    prompt: int
    name: str
    text: str
    a: float | None
    b: float | None
    certain: bool = False

    @property
    def change(self) -> float | None:
        """b minus a."""
        return None if self.a is None or self.b is None else self.b - self.a


def metrics(result: Scored) -> list[str]:
    """Scores that any image has, in their usual order."""
    return [name for name in IMAGE_METRICS if any(name in image.scores for image in result.images)]


def times_100(value: float | None) -> str:
    """A cosine as it is shown; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.2f}"


def rows(result: Scored, a: int, b: int, metric: str) -> list[Row]:
    """All prompts with the pair's scores, in the prompt set's order."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for image in result.images:
        if metric in image.scores:
            found.setdefault((image.prompt, image.adapter), {})[image.seed] = image.scores[metric]

    def row(prompt: int) -> Row:
        one, other = found.get((prompt, a), {}), found.get((prompt, b), {})
        # A seed that one of the two lacks would make the difference one of noise.
        seeds = one.keys() & other.keys() or one.keys() | other.keys()
        means = [
            fmean(scores[seed] for seed in sorted(seeds) if seed in scores) if scores else None
            for scores in (one, other)
        ]
        entry = result.prompts[prompt]
        differences = [other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())]
        name = entry.instance or entry.text
        return Row(prompt, name, entry.text, *means, certain=_leaves_out_zero(differences))

    return [row(prompt) for prompt in sorted({image.prompt for image in result.images})]


def _leaves_out_zero(differences: Sequence[float]) -> bool:
    count = len(differences)
    if count < 2:
        return False
    half = stats.t.ppf(0.975, count - 1) * stdev(differences) / sqrt(count)
    return bool(abs(fmean(differences)) > half)


def comparison(result: Scored, a: int, b: int, metric: str) -> Summary | None:
    """Adapter b minus adapter a over all prompts, where the scoring compared the two."""
    control, group = (result.adapters[at].label for at in (a, b))
    for line in result.summaries:
        if (line.metric, line.control, line.group) == (metric, control, group):
            return line
    return None


def arranged(found: Sequence[Row], metric: str, order: str, words: str = "") -> list[Row]:
    """The rows as they are listed.

    A gain is a change for the better: for memorization, where lower is better, a decrease. Prompts
    without a score come last.

    Args:
        found: see :func:`rows`.
        metric: of the rows.
        order: key of :data:`ORDERS`.
        words: case is ignored.
    """
    wanted = words.casefold().split()
    kept = [row for row in found if all(word in row.text.casefold() for word in wanted)]
    if order == "name":
        return sorted(kept, key=lambda row: row.name.casefold())
    if order == "list":
        return kept
    known = METRICS.get(metric)
    sign = -1 if known is not None and known.higher_is_better is False else 1
    sign = -sign if order == "gain" else sign
    return sorted(
        kept,
        key=lambda row: (row.change is None, sign * (row.change or 0.0), row.name.casefold()),
    )


def neighbour(listed: Sequence[Row], prompt: int, step: int) -> int:
    """The prompt ``step`` rows on, at most the last or first; the first when it is not listed."""
    order = [row.prompt for row in listed]
    if not order:
        return prompt
    if prompt not in order:
        return order[0]
    return order[min(max(order.index(prompt) + step, 0), len(order) - 1)]


def find(result: Scored, adapter: int, prompt: int, seed: int) -> ScoredImage | None:
    """One image's record."""
    for image in result.images:
        if (image.adapter, image.prompt, image.seed) == (adapter, prompt, seed):
            return image
    return None


def best(images: Sequence[ScoredImage]) -> dict[str, float]:
    """Metric -> the best score among images; without those that do not judge and ties of all."""
    found: dict[str, float] = {}
    for name in IMAGE_METRICS:
        values = [image.scores[name] for image in images if name in image.scores]
        direction = METRICS[name].higher_is_better
        if direction is None or len({round(value, 6) for value in values}) < 2:
            continue
        found[name] = max(values) if direction else min(values)
    return found


def first_view(scores: str, result: Scored) -> View:
    """What is shown before anything is chosen: the first two adapters, the largest gain."""
    there = sorted({image.adapter for image in result.images})
    a, b = (there * 2)[:2] if there else (0, 0)
    metric = next(iter(metrics(result)), "i2t")
    listed = arranged(rows(result, a, b, metric), metric, "gain")
    prompt = listed[0].prompt if listed else 0
    seeds = result.seeds or [0]
    return View(scores, a, b, tuple(there[2:4]), prompt, seeds[0], metric)


def link(view: View, result: Scored) -> str:
    """The query that reopens a view, such as ``?scores=...&a=...&b=...&prompt=...&seed=...``.

    Labels and texts stand in it and not positions, so that it survives scoring again.
    """
    labels = [adapter.label for adapter in result.adapters]
    words: list[tuple[str, str]] = [
        ("scores", view.scores),
        ("a", labels[view.a]),
        ("b", labels[view.b]),
        ("also", ",".join(labels[at] for at in view.also)),
        ("prompt", result.prompts[view.prompt].text),
        ("seed", str(view.seed)),
        ("metric", view.metric),
        ("order", view.order),
        ("words", view.words),
    ]
    return "?" + urlencode([(key, value) for key, value in words if value])


def opened(query: Mapping[str, str], scores: str, result: Scored) -> tuple[View, list[str]]:
    """The view that a link asks for.

    Args:
        query: see :func:`link`; every part may be missing.
        scores, result: the score folder that it names.

    Returns:
        The view, and a sentence for each part that is not there (any more).
    """
    first, missing = first_view(scores, result), []
    labels = [adapter.label for adapter in result.adapters]
    texts = [prompt.text for prompt in result.prompts]

    def at(key: str, names: Sequence[str], otherwise: int) -> int:
        if key not in query:
            return otherwise
        if query[key] in names:
            return names.index(query[key])
        missing.append(f'The link names "{query[key]}" as {key}, which is not there.')
        return otherwise

    def one_of(key: str, names: Sequence[str], otherwise: str) -> str:
        return names[at(key, names, names.index(otherwise))]

    a, b = at("a", labels, first.a), at("b", labels, first.b)
    also = first.also
    if "a" in query:
        # Labels may hold commas, so they are looked for and the text is not cut apart.
        named = f",{query.get('also', '')},"
        also = tuple(at for at, label in enumerate(labels) if f",{label}," in named)
    seeds = [str(seed) for seed in result.seeds or [0]]
    view = View(
        scores,
        a,
        b,
        tuple(at for at in also if at not in (a, b)),
        at("prompt", texts, first.prompt),
        int(one_of("seed", seeds, str(first.seed))),
        one_of("metric", metrics(result) or [first.metric], first.metric),
        one_of("order", list(ORDERS), first.order),
        query.get("words", ""),
    )
    return view, missing
