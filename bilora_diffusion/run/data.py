"""The samples that a run learns from and those that it is measured on.

Checkpoints and ``run.json`` have a record of both, by which a resumed run knows whether its data
are still the same. Copies of training samples among the held-out ones are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.errors import UserError
from ..core.seeds import digest_texts, seed_of

# The two sets of a record.
TRAINING = "training"
HELDOUT = "held-out"
# Largest number of samples that a record lists one by one, so that checkpoints stay small.
MAX_LISTED = 1000
# Maximum number of sample names in a sentence.
MAX_NAMED = 3
# Hexadecimal digits of a listed hash, which only explains a change that the full hash shows.
LISTED_DIGITS = 8
# The name of each sample, and a key of its content.
Contents = Sequence[tuple[str, Hashable]]
logger = logging.getLogger(__name__)


class SampleContent(NamedTuple):
    """A sample by the hashes of its parts."""

    name: str
    hashes: Mapping[str, str]  # by part, such as "picture" or "caption"


def record_content(
    training: Sequence[SampleContent], heldout: Sequence[SampleContent]
) -> dict[str, Any]:
    """Make the record of a run's data, as JSON can hold it."""
    return {TRAINING: _record_set(training), HELDOUT: _record_set(heldout)}


def hash_samples(samples: Iterable[SampleContent]) -> str:
    """Hash names and parts of samples in their order; 32 hexadecimal digits."""
    texts: list[str] = []
    for sample in samples:
        texts.append(sample.name)
        for part, part_hash in sample.hashes.items():
            texts.append(f"{part} {part_hash}")
    return digest_texts(texts)


def _record_set(samples: Sequence[SampleContent]) -> dict[str, Any]:
    """Make the record of one set of samples."""
    record: dict[str, Any] = {"count": len(samples), "hash": hash_samples(samples)}
    if len(samples) <= MAX_LISTED:
        listed: dict[str, dict[str, str]] = {}
        for sample in samples:
            short_hashes: dict[str, str] = {}
            for part, part_hash in sample.hashes.items():
                short_hashes[part] = part_hash[:LISTED_DIGITS]
            listed[sample.name] = short_hashes
        record["samples"] = listed
    return record


def summarize(record: Mapping[str, Any]) -> dict[str, Any]:
    """Number and hash of the samples of each set, without the list of samples."""
    return {
        name: {"count": samples["count"], "hash": samples["hash"]}
        for name, samples in record.items()
    }


def require_same_content(
    saved: Mapping[str, Any], current: Mapping[str, Any], depends_on_heldout: bool
) -> None:
    """Refuse to resume with other data than before.

    Args:
        saved: record of the checkpoint.
        current: record of this run.
        depends_on_heldout: whether the held-out samples decide what the run exports. Otherwise
            a change of them is only a warning.

    Raises:
        UserError: it names what changed.
    """
    for name in (TRAINING, HELDOUT):
        difference = describe_difference(saved[name], current[name])
        if difference is None:
            continue
        if name == HELDOUT and not depends_on_heldout:
            logger.warning(
                "in the held-out data, %s: losses from here on are not those of the same samples",
                difference,
            )
            continue
        raise UserError(
            f"in the {name} data, {difference}: restore them to resume, or start a new run in"
            " another --output_dir."
        )


def describe_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Describe the change from one record of a set to another; None where there is none."""
    if saved["hash"] == current["hash"]:
        return None
    # A record of many samples does not list them, nor can it list two of one name.
    lists_all = all(len(r.get("samples", ())) == r["count"] for r in (saved, current))
    if not lists_all:
        if saved["count"] == current["count"]:
            return f"some of the {saved['count']} samples changed"
        return f"the number of samples was {saved['count']} and is {current['count']}"

    before = saved["samples"]
    after = current["samples"]
    # At first a changed sample counts as both removed and added.
    removed = [name for name in before if after.get(name) != before[name]]
    added = [name for name in after if before.get(name) != after[name]]
    # Rows are named by their numbers, so that an inserted row renames all rows that follow it.
    renamed: list[tuple[str, str]] = []  # earlier and new names
    for name in list(added):
        for earlier_name in removed:
            if before[earlier_name] == after[name]:
                renamed.append((earlier_name, name))
                # Each is paired once: two samples may have one content.
                removed.remove(earlier_name)
                added.remove(name)
                break
    changed = [name for name in removed if name in added]
    added = [name for name in added if name not in changed]
    removed = [name for name in removed if name not in changed]

    phrases: list[str] = []
    if added:
        phrases.append(f"{_count(added)} added ({_enumerate(added)})")
    if removed:
        phrases.append(f"{_count(removed)} removed ({_enumerate(removed)})")
    if changed:
        phrases.append(_describe_changes(changed, before, after))
    if renamed and not phrases:
        # The same names for other contents: rows were put in another order.
        if before.keys() == after.keys():
            return f"{_count(renamed)} put in another order"
        pairs = [f"{earlier_name} to {name}" for earlier_name, name in renamed]
        return f"{_count(renamed)} renamed ({_enumerate(pairs)})"
    return " and ".join(phrases) or "the samples were put in another order"


def _describe_changes(
    names: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """Describe which parts changed, of samples that kept their names."""
    changed_parts: list[str] = []
    for name in names:
        for part in {**before[name], **after[name]}:
            is_changed = before[name].get(part) != after[name].get(part)
            if is_changed and part not in changed_parts:
                changed_parts.append(part)
    if len(names) == 1:
        return f"the {' and '.join(changed_parts)} of {names[0]} changed"
    return f"the {' or '.join(changed_parts)} of {len(names)} samples changed ({_enumerate(names)})"


def _count(samples: Sequence[Any]) -> str:
    if len(samples) == 1:
        return "1 sample was"
    return f"{len(samples)} samples were"


def _enumerate(names: Sequence[str]) -> str:
    text = ", ".join(names[:MAX_NAMED])
    if len(names) > MAX_NAMED:
        text += ", ..."
    return text


def choose_samples(names: Sequence[str], limit: int | None) -> list[int]:
    """The positions of the samples that are measured, in the order of the set.

    They are the first ones of a shuffled order that depends on the names alone. So all runs that
    are compared measure the same samples, and a larger limit adds samples.

    Args:
        names: name of each sample.
        limit: number of samples at most; None for all.
    """
    sort_keys = [(seed_of("part", name), name, number) for number, name in enumerate(names)]
    order = [number for _, _, number in sorted(sort_keys)]
    # Every fourth sample comes first: recorded results measure a quarter or a half that was dealt
    # out in this way, so that 32 of 128 samples are those of the recorded quarter.
    order = [*order[0::4], *order[2::4], *order[1::4], *order[3::4]]
    return sorted(order[:limit])


def describe_copies(noun: str, training: Contents, heldout: Contents) -> str | None:
    """A sentence on held-out samples that are trained on too; None where there is none.

    Args:
        noun: what the samples are, in the plural, such as "images".
        training: samples that are trained on.
        heldout: samples that are held out.
    """
    first_names: dict[Hashable, str] = {}  # first training sample of each content
    for name, content in training:
        first_names.setdefault(content, name)
    # A held-out sample, and the training sample that it equals.
    pairs = [(name, first_names[content]) for name, content in heldout if content in first_names]
    if not pairs:
        return None
    heldout_name, training_name = pairs[0]
    count = f"{len(heldout)} held-out {noun}"
    return (
        f"{len(pairs)} of the {count} are also trained on, such as {heldout_name}, which is"
        f" {training_name}, so the held-out loss is too low: drop one of the two."
    )
