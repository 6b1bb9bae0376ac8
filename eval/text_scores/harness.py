"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is loaded already.

Nothing is downloaded for a task whose data set is local. See
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bilora_diffusion.config.machine import require
from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.tokenizing import context_text, resolve_template

from ..digests import of_folders
from .benchmarks import NONE, SHOWN, Benchmark, Item, Measured
from .models import CacheOf, Loaded

INVALID = "[invalid]"
"""Result of the harness's filters where they find no answer."""
FOLDERS = ("gsm8k", "mmlu", "drop", "bbh")
"""Folders of the harness that hold the paper's benchmarks."""
FEWSHOT_SEED = 1234


def manager(tasks: Sequence[str], include_path: Sequence[Path]) -> Any:
    """The harness's own tasks and those of further folders.

    Args:
        tasks: that are to be found; only if one is not among the paper's and those of the folders,
            the harness's thousands of files are read too, which takes ten seconds.
        include_path: the folders.
    """
    for folder in include_path:
        if not folder.is_dir():
            raise UserError(f'--include_path "{folder}" is not a folder: give one with task YAMLs.')
    require("lm_eval>=0.4.13,<0.5", "--benchmarks")
    import lm_eval.tasks as shipped

    root = Path(shipped.__file__).parent
    few = [*(root / name for name in FOLDERS), *include_path]
    small = shipped.TaskManager(include_path=list(few), include_defaults=False)
    if set(tasks) <= set(small.all_tasks):
        return small
    return shipped.TaskManager(include_path=list(include_path))


@dataclass(frozen=True)
class Harness:
    """A task or group, ready to be asked."""

    benchmark: Benchmark
    manager: Any
    limit: int | None
    include_path: Sequence[Path]

    def __post_init__(self) -> None:
        task = self.benchmark.task
        if task in self.manager.all_tags:
            members = ", ".join(sorted(self.manager.task_index[task].tags)[:5])
            raise UserError(
                f'"{task}" is a tag of the harness, which has no score of its own: name some of its'
                f" tasks ({members}, ...)."
            )

    def settings(self) -> dict[str, Any]:
        """All that a score depends on beside the model."""
        benchmark = self.benchmark
        return {
            "task": benchmark.task,
            "num_fewshot": benchmark.num_fewshot,
            "metric": benchmark.metric,
            "generation": dict(benchmark.generation),
            "lm_eval": metadata.version("lm_eval"),
            "include_path": of_folders(*self.include_path) if self.include_path else None,
        }

    def measure(self, loaded: Loaded, template: str, batch_size: int, cache: CacheOf) -> Measured:
        """Ask and score."""
        from lm_eval.evaluator import evaluate

        tasks = _tasks(self.manager, self.benchmark)
        _set(tasks["tasks"], self.benchmark)
        template = loaded.template_used(template)
        with _quiet():
            result = evaluate(
                _model(loaded, template, batch_size),
                tasks,
                limit=self.limit,
                bootstrap_iters=0,
                apply_chat_template=template != NONE,
                fewshot_as_multiturn=False,
            )
        return _measured(dict(result or {}), self.benchmark)


def _tasks(manager: Any, benchmark: Benchmark) -> dict[str, Any]:
    fix = "load it once with a connection to the hub, or give a task of your own by --include_path"
    with translated(f'the data of "{benchmark.name}" can\'t be had', fix), _quiet():
        tasks = manager.load([benchmark.task])
    for name, task in tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"{name} of the harness would run code that the model writes, without a sandbox:"
                " use --benchmarks humaneval."
            )
    return tasks


def _set(tasks: Mapping[str, Any], benchmark: Benchmark) -> None:
    for task in tasks.values():
        own = task.get_config("num_fewshot") or 0
        shots = own if benchmark.num_fewshot is None else benchmark.num_fewshot
        task.set_config(key="num_fewshot", value=shots)
        if benchmark.generation and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=dict(benchmark.generation), update=True)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _model(loaded: Loaded, template: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Templated(HFLM):
        """Prompts under the template that the run was trained with."""

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """One prompt; the harness puts its examples into it."""
            if not add_generation_prompt:
                raise UserError("this task begins the model's answer itself: leave it out.")
            turns = tuple((turn["role"], turn["content"]) for turn in chat_history)
            example = Example("", "", turns=(*turns, ("assistant", "")))
            settled = resolve_template(template, loaded.tokenizer)
            return context_text(example, loaded.tokenizer, settled)

    with _quiet():
        # the decorated base is taken for an abstract one
        made: Any = Templated
        return made(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="seq2seq" if loaded.kind == "seq2seq" else "causal",
            batch_size=batch_size,
        )


def _measured(result: dict[str, Any], benchmark: Benchmark) -> Measured:
    figures = {
        name: float(value)
        for name, value in result["results"][benchmark.task].items()
        if "," in name and "_stderr," not in name and isinstance(value, int | float)
    }
    if not figures:
        raise UserError(
            f'"{benchmark.name}" has no score of its own in the harness: name its tasks.'
        )
    metric = benchmark.metric or next(iter(figures))
    if metric not in figures:
        raise UserError(
            f'"{benchmark.name}" gives no {metric} ({", ".join(figures)}): another version of the'
            " harness is installed."
        )
    name, _, chosen = metric.partition(",")
    items = [
        _item(task, sample, name)
        for task, samples in result["samples"].items()
        for sample in samples
        if sample["filter"] == chosen
    ]
    value = figures.pop(metric)
    shots = sorted({int(number) for number in result["n-shot"].values()})
    directions = [of_task.get(name) for of_task in result["higher_is_better"].values()]
    settings = {
        "metric": metric,
        "num_fewshot": shots[0] if len(shots) == 1 else shots,
        "versions": {k: v for k, v in result["versions"].items() if v is not None},
        "higher_is_better": False not in directions,
    }
    return Measured(value, items, figures, settings)


def _item(task: str, sample: Mapping[str, Any], metric: str) -> Item:
    score, answers = sample.get(metric), sample["filtered_resps"]
    parsed = True
    if all(isinstance(one, str) for one in answers):
        answer = answers[0] if answers else ""
        parsed = bool(answer.strip()) and answer != INVALID
        answer = answer if parsed else str(sample["resps"][0][0])
    else:  # the number of the choice that the model finds likeliest
        values = [float(one[0] if isinstance(one, list | tuple) else one) for one in answers]
        answer = str(values.index(max(values)))
    number = float(score) if isinstance(score, int | float) else None
    return Item(f"{task}/{sample['doc_id']}", number, parsed, answer[:SHOWN])


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of what is meant here, such as a model that is loaded already; and
    ``datasets`` tells a server of every set that it opens, local files included.
    """
    from datasets import config

    logger = logging.getLogger("lm_eval")
    level, counts = logger.level, config.HF_UPDATE_DOWNLOAD_COUNTS
    logger.setLevel(logging.ERROR)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        logger.setLevel(level)
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
