"""Records of a run's data, and the sentence that describes how two records differ."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import data
from bilora_diffusion.run.data import (
    SampleContent,
    choose_samples,
    describe_difference,
    record_content,
    require_same_content,
)

NAMES = st.lists(st.text(max_size=8), max_size=30)


@given(NAMES, st.integers(1, 40), st.randoms())
def test_the_chosen_samples_depend_only_on_their_names(names, limit, random):
    assert choose_samples(names, None) == list(range(len(names)))
    chosen = choose_samples(names, limit)
    assert len(chosen) == min(limit, len(names))
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(choose_samples(names, limit + 1))
    chosen_names = sorted(names[number] for number in chosen)
    random.shuffle(names)
    assert sorted(names[number] for number in choose_samples(names, limit)) == chosen_names


PICTURES = {
    "a.png": {"picture": "a" * 32, "caption": "1" * 32},
    "b.png": {"picture": "b" * 32, "caption": "2" * 32, "mask": "3" * 32},
    "c.png": {"picture": "c" * 32},
}
A, B, C = PICTURES.values()
D = {"picture": "d" * 32}


def contents(samples: dict[str, dict[str, str]]) -> list[SampleContent]:
    return [SampleContent(name, hashes) for name, hashes in samples.items()]


def record(samples: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Return the record of a training set."""
    return record_content(contents(samples), [])["training"]


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (PICTURES, None),
        ({**PICTURES, "b.png": {**B, "picture": "d" * 32}}, "the picture of b.png changed"),
        ({**PICTURES, "a.png": D}, "the picture and caption of a.png changed"),
        (
            {"a.png": A, "b.png": B, "d.png": D},
            "1 sample was added (d.png) and 1 sample was removed (c.png)",
        ),
        ({"a.png": A, "b.png": B, "d.png": C}, "1 sample was renamed (c.png to d.png)"),
        ({"b.png": B, "a.png": A, "c.png": C}, "the samples were put in another order"),
        (
            {"a.png": D, "b.png": D, "c.png": D},
            "the picture or caption or mask of 3 samples changed (a.png, b.png, c.png)",
        ),
    ],
)
def test_a_change_to_the_samples_is_described(samples, sentence):
    assert describe_difference(record(PICTURES), record(samples)) == sentence


def test_a_removed_row_does_not_count_as_a_change_to_later_rows():
    rows = {f"line {n} of rows.jsonl": {"text": str(n) * 32} for n in range(9)}
    # Rows are named by line number, so all rows after the removed one get another name.
    texts = list(rows.values())
    del texts[3]
    shorter = dict(zip(rows, texts, strict=False))
    difference = describe_difference(record(rows), record(shorter))
    assert difference == "1 sample was removed (line 3 of rows.jsonl)"


def test_the_record_of_a_large_set_is_small_and_detects_every_change(monkeypatch):
    monkeypatch.setattr(data, "MAX_LISTED", 2)
    large = record(PICTURES)
    assert set(large) == {"count", "hash"}
    for samples, words in (
        ({**PICTURES, "c.png": D}, "some of the 3 samples"),
        ({**PICTURES, "d.png": D}, "was 3 and is 4"),
    ):
        assert words in str(describe_difference(large, record(samples)))


def test_held_out_samples_may_change_if_nothing_depends_on_them(caplog):
    samples = contents(PICTURES)
    saved = record_content(samples, samples)
    current = record_content(samples, samples[1:])
    require_same_content(saved, current, depends_on_heldout=False)
    (line,) = caplog.records
    assert "a.png" in line.message
    with pytest.raises(UserError, match=r"held-out data, 1 sample was removed \(a\.png\)"):
        require_same_content(saved, current, depends_on_heldout=True)
