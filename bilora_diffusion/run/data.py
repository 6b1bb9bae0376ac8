"""Records of a run's training samples and held-out samples.

Checkpoints contain the record, and ``run.json`` a summary of it, so that a resumed run can check
that its data are the same. Held-out samples that are copies of training samples are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..core.errors import UserError
from ..core.seeds import digest_texts, seed_of

# Names of the two sets in a record.
TRAINING = "training"
HELDOUT = "held-out"
# Maximum number of samples that a record lists individually, so that checkpoints stay small.
MAX_LISTED = 1000
# Maximum number of sample names in a message.
MAX_NAMED = 3
# Hexadecimal digits of the hash of a listed sample. The hash of the whole set detects a change;
# these digits only show which sample changed.
LISTED_DIGITS = 8
# Name of each sample, with a key that identifies its content.
Contents = Sequence[tuple[str, Hashable]]
logger = logging.getLogger(__name__)


class SampleContent(NamedTuple):
    """A sample's name and the hashes of its parts."""

    name: str
    hashes: Mapping[str, str]  # by part, such as "picture" or "caption"


def record_content(
    training: Sequence[SampleContent], heldout: Sequence[SampleContent]
) -> dict[str, Any]:
    """Return the record of a run's data, as JSON values."""
    return {TRAINING: _record_set(training), HELDOUT: _record_set(heldout)}


def hash_samples(samples: Iterable[SampleContent]) -> str:
    """Return a hash of the samples' names and parts, in order, as 32 hexadecimal digits."""
    texts: list[str] = []
    for sample in samples:
        texts.append(sample.name)
        for part, part_hash in sample.hashes.items():
            texts.append(f"{part} {part_hash}")
    return digest_texts(texts)


def _record_set(samples: Sequence[SampleContent]) -> dict[str, Any]:
    """Return the record of one set of samples."""
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
    """Return the number and the hash of the samples in each set, without the list of samples."""
    return {
        name: {"count": samples["count"], "hash": samples["hash"]}
        for name, samples in record.items()
    }


def require_same_content(
    saved: Mapping[str, Any], current: Mapping[str, Any], depends_on_heldout: bool
) -> None:
    """Check that a run resumes with the same data as before.

    Args:
        saved: record in the checkpoint.
        current: record of this run.
        depends_on_heldout: whether the held-out samples decide which weights the run exports.
            Otherwise a change of the held-out samples only gives a warning.

    Raises:
        UserError: the data changed; the message names the change.
    """
    for name in (TRAINING, HELDOUT):
        difference = describe_difference(saved[name], current[name])
        if difference is None:
            continue
        if name == HELDOUT and not depends_on_heldout:
            logger.warning(
                "in the held-out data, %s: losses from here on are measured on other samples",
                difference,
            )
            continue
        raise UserError(
            f"in the {name} data, {difference}: restore the data to resume, or start a new run in"
            " another --output_dir."
        )


def describe_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Describe the change from one record of a set to another; return None if there is none."""
    if saved["hash"] == current["hash"]:
        return None
    # A record of more than `MAX_LISTED` samples has no list, and a list has only one of several
    # samples with the same name.
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
    # Rows are named by their numbers, so an inserted row renames all rows that follow it.
    renamed: list[tuple[str, str]] = []  # earlier and new names
    for name in list(added):
        for earlier_name in removed:
            if before[earlier_name] == after[name]:
                renamed.append((earlier_name, name))
                # Each name is paired only once, since two samples may have the same content.
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
        # The same names have other contents: rows were put in another order.
        if before.keys() == after.keys():
            return f"{_count(renamed)} put in another order"
        pairs = [f"{earlier_name} to {name}" for earlier_name, name in renamed]
        return f"{_count(renamed)} renamed ({_enumerate(pairs)})"
    return " and ".join(phrases) or "the samples were put in another order"


def _describe_changes(
    names: Sequence[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """Describe which parts changed in samples that kept their names."""
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
    """Return the positions of the samples to measure, in the order of the set.

    They are the first samples of a shuffled order that depends only on the names. Therefore all
    runs that are compared measure the same samples, and a larger limit only adds samples.

    Args:
        names: name of each sample.
        limit: maximum number of samples; None for all.
    """
    sort_keys = [(seed_of("part", name), name, number) for number, name in enumerate(names)]
    order = [number for _, _, number in sorted(sort_keys)]
    # Every fourth sample comes first. Recorded results measured a quarter or a half of the samples
    # that was chosen in this way, so 32 of 128 samples are the same as the recorded quarter.
    order = [*order[0::4], *order[2::4], *order[1::4], *order[3::4]]
    return sorted(order[:limit])


def describe_copies(noun: str, training: Contents, heldout: Contents) -> str | None:
    """Return a sentence on held-out samples that are also trained on; None if there are none.

    Args:
        noun: plural noun for the samples, such as "images".
        training: the training samples.
        heldout: the held-out samples.
    """
    first_names: dict[Hashable, str] = {}  # first training sample of each content
    for name, content in training:
        first_names.setdefault(content, name)
    # Pairs of a held-out sample and the training sample that it equals.
    pairs = [(name, first_names[content]) for name, content in heldout if content in first_names]
    if not pairs:
        return None
    heldout_name, training_name = pairs[0]
    count = f"{len(heldout)} held-out {noun}"
    return (
        f"{len(pairs)} of the {count} are also trained on, such as {heldout_name}, which equals"
        f" {training_name}, so the held-out loss is too low: drop one of the two."
    )
