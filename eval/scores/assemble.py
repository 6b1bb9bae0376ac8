"""The typed result of a comparison, from what was planned and what was measured."""

from __future__ import annotations

from dataclasses import asdict

from bilora_diffusion.run import provenance

from ..provenance import of_runs, without_paths
from . import compare
from .measure import Measured
from .plan import Plan
from .schema import AdapterEntry, ModelEntry, ScoresResult


def assemble(
    plan: Plan,
    measured: Measured,
    scorer: ModelEntry,
    captioner: ModelEntry | None,
    *,
    images: str,
    command: str,
    device: str,
) -> ScoresResult:
    """The result, compared; still without figures.

    Args:
        images: folder of the images, relative to the result's.
        command: for the provenance.
        device: that the images were made on.
    """
    commit, changes = provenance.commit()
    record = {
        "versions": provenance.versions(),
        "commit": commit,
        "uncommitted_changes": changes,
        "device": provenance.device(device),
    }
    result = ScoresResult(
        scorer=scorer,
        captioner=captioner,
        sampling=asdict(plan.sampling) | {"base_model": without_paths(plan.sampling.base_model)},
        seeds=plan.seeds,
        prompt_set=plan.prompt_set,
        adapters=[_entry(plan, position, images) for position in range(len(plan.adapters))],
        prompts=measured.prompts,
        images=measured.images,
        summaries=[],
        comparisons=[],
        diversity=measured.diversity,
        provenance=asdict(of_runs(command, [record])),
        notes=plan.notes,
    )
    return compare.compared(result, plan.control)


def _entry(plan: Plan, position: int, images: str) -> AdapterEntry:
    adapter = plan.adapters[position]
    return AdapterEntry(
        label=adapter.label,
        kind=adapter.kind,
        source=without_paths(adapter.source),
        method=adapter.method,
        digest=adapter.digest,
        images=f"{images}/{plan.adapters[plan.first(adapter)].slug}",
    )
