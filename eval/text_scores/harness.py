"""Tasks of EleutherAI's lm-evaluation-harness, run on a model that is already in memory.

A task with a local dataset downloads nothing. See
https://github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bilora_diffusion.config.machine import require
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.text.examples import Example
from bilora_diffusion.text.tokenizing import context_text, resolve_template

from ..cache import hash_of_folders
from .base_models import NO_TEMPLATE
from .benchmarks import ANSWER_LETTERS, Benchmark, Item, Measurement
from .models import CacheFor, LoadedModel

# Output of the harness's filters if they find no answer
INVALID = "[invalid]"
# Folders of the harness that contain the paper's benchmarks
FOLDERS = ("gsm8k", "mmlu", "drop", "bbh", "humaneval")
# Seed of the examples in prompts; the harness's own default
FEWSHOT_SEED = 1234
# Environment variable that must be "1" before the harness runs programs
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"


def task_manager(tasks: Sequence[str], include_path: Sequence[Path]) -> Any:
    """Make a manager of the harness's own tasks and the tasks in other folders.

    Args:
        tasks: names of the required tasks. The thousands of files in the harness take ten seconds
            to read, so they are read only if a task is neither among the paper's nor in a folder.
        include_path: the other folders.

    Raises:
        UserError: one of the folders does not exist, or the harness is not installed.
    """
    for folder in include_path:
        if not folder.is_dir():
            raise UserError(f'--include_path "{folder}" is not a folder: give one with task YAMLs.')
    require("lm_eval>=0.4.13,<0.5", "--benchmarks")
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in FOLDERS] + list(include_path)
    manager = lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False)
    if set(tasks) <= set(manager.all_tasks):
        return manager
    return lm_eval.tasks.TaskManager(include_path=list(include_path))


@dataclass(frozen=True)
class Harness:
    """A task or group of the harness as an `Engine`."""

    benchmark: Benchmark
    # The harness's task manager
    manager: Any
    # Maximum number of items of each task; None for all
    limit: int | None
    # Folders with tasks that the harness does not have
    include_path: Sequence[Path]
    # Whether the user allows running programs that the model writes
    allow_code: bool = False

    def __post_init__(self) -> None:
        # A tag is a list of tasks, and the harness does not average their scores.
        task = self.benchmark.task
        if task in self.manager.all_tags:
            members = ", ".join(sorted(self.manager.task_index[task].tags)[:5])
            raise UserError(
                f'"{task}" is a tag of the harness and has no score of its own: name some of its'
                f" tasks ({members}, ...)."
            )
        if self.benchmark.runs_code and not self.allow_code:
            raise refuse_code(self.benchmark.name)

    def settings(self) -> dict[str, Any]:
        """Return everything that a score depends on, except the model."""
        benchmark = self.benchmark
        return {
            "task": benchmark.task,
            "num_fewshot": benchmark.num_fewshot,
            "metric": benchmark.metric,
            "generation": dict(benchmark.generation),
            "lm_eval": metadata.version("lm_eval"),
            "include_path": hash_of_folders(*self.include_path) if self.include_path else None,
        }

    def measure(
        self, model: LoadedModel, template: str, batch_size: int, cache_for: CacheFor
    ) -> Measurement:
        """Ask the questions and score the answers; for code tasks, the harness runs programs."""
        from lm_eval.evaluator import evaluate

        template = model.effective_template(template)
        # The harness's code metric runs a program as soon as a code task is loaded.
        with _quiet(), _code_switch(self.allow_code):
            tasks = self._load_tasks()
            result = evaluate(
                _harness_model(model, template, batch_size),
                tasks,
                limit=self.limit,
                bootstrap_iters=0,  # intervals are computed here, from paired differences
                apply_chat_template=template != NO_TEMPLATE,
                fewshot_as_multiturn=False,
                confirm_run_unsafe_code=self.allow_code,
            )
        return _read_result(dict(result or {}), self.benchmark)

    def _load_tasks(self) -> dict[str, Any]:
        """Load the harness's tasks with their data, and apply the benchmark's settings."""
        benchmark = self.benchmark
        with as_user_error(
            f'the data of "{benchmark.name}" can\'t be loaded',
            "load it once with a connection to the hub, or give a task of your own with"
            " --include_path",
        ):
            tasks_by_group = self.manager.load([benchmark.task])
        # A group has several entries, a single task only one.
        for name, task in tasks_by_group["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self.allow_code:
                raise refuse_code(name)
            shots = benchmark.num_fewshot
            if shots is None:
                shots = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=shots)
            # `update` keeps the task's own stop words.
            if benchmark.generation and task.get_config("output_type") == "generate_until":
                generation = dict(benchmark.generation)
                task.set_config(key="generation_kwargs", value=generation, update=True)
            # With a fixed seed, every model gets the same examples in its prompts.
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return tasks_by_group


def refuse_code(name: str) -> UserError:
    """Return the error for a code task without --allow_code_execution."""
    return UserError(
        f"{name} runs programs that the model writes, with all permissions of this process: start"
        " it in a container without network access and add --allow_code_execution."
    )


def _harness_model(model: LoadedModel, template: str, batch_size: int) -> Any:
    """Wrap the model for the harness, and format prompts with the template of training."""
    from lm_eval.models.huggingface import HFLM

    class TemplatedModel(HFLM):
        """A model of the harness that formats prompts with the template of training."""

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Format a prompt; the harness has already put the examples into it."""
            if not add_generation_prompt:
                raise UserError(
                    "this task writes the beginning of the answer into the prompt, which the"
                    " template does not allow: remove the task."
                )
            # The answer is empty, because the model generates it.
            turns = [(turn["role"], turn["content"]) for turn in chat_history]
            example = Example("", "", turns=(*turns, ("assistant", "")))
            resolved = resolve_template(template, model.tokenizer)
            return context_text(example, model.tokenizer, resolved)

    # HFLM's decorator makes the type checker treat it as abstract.
    model_class: Any = TemplatedModel
    return model_class(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        backend="seq2seq" if model.kind == "seq2seq" else "causal",
        batch_size=batch_size,
    )


def _read_result(result: dict[str, Any], benchmark: Benchmark) -> Measurement:
    """Read a benchmark's score, items and further metrics from the harness's result.

    Raises:
        UserError: the result has no score, or lacks the benchmark's metric.
    """
    # The results also contain standard errors and counts; only metrics are named "metric,filter".
    metrics = {}
    for name, value in result["results"][benchmark.task].items():
        if "," in name and "_stderr," not in name and isinstance(value, int | float):
            metrics[name] = float(value)
    if not metrics:
        raise UserError(
            f'"{benchmark.name}" has no score of its own in the harness: name its tasks.'
        )
    metric = benchmark.metric or next(iter(metrics))
    if metric not in metrics:
        raise UserError(
            f'"{benchmark.name}" has the metrics {", ".join(metrics)}, but not {metric}: install'
            " another version of the harness."
        )
    value = metrics.pop(metric)
    metric_name, _, filter_name = metric.partition(",")

    # A task may apply several filters to an answer; the score belongs to one of them.
    items = []
    for task, samples in result["samples"].items():
        for sample in samples:
            if sample["filter"] == filter_name:
                items.append(_read_item(task, sample, metric_name))

    # The tasks of a group may have different numbers of examples.
    shots: Any = sorted({int(number) for number in result["n-shot"].values()})
    if len(shots) == 1:
        (shots,) = shots
    versions = {}
    for task, version in result["versions"].items():
        if version is not None:
            versions[task] = version
    directions = [by_metric.get(metric_name) for by_metric in result["higher_is_better"].values()]
    settings = {
        "metric": metric,
        "num_fewshot": shots,
        "versions": versions,
        "higher_is_better": False not in directions,
    }
    return Measurement(value, items, metrics, settings)


def _read_item(task: str, sample: Mapping[str, Any], metric: str) -> Item:
    """Read a question's score and the model's answer from a sample of the harness."""
    # The filtered responses: texts, a list of programs, or the log-likelihood of each choice
    responses = sample["filtered_resps"]
    if responses and isinstance(responses[0], list) and isinstance(responses[0][0], str):
        responses = responses[0]
    is_parsed = True
    if all(isinstance(response, str) for response in responses):
        answer = responses[0] if responses else ""
        is_parsed = bool(answer.strip()) and answer != INVALID
        if not is_parsed:  # show the unfiltered answer
            answer = str(sample["resps"][0][0])
    else:  # the index of the choice with the highest likelihood
        likelihoods = []
        for response in responses:
            is_pair = isinstance(response, list | tuple)
            likelihoods.append(float(response[0] if is_pair else response))
        answer = str(likelihoods.index(max(likelihoods)))
    score = sample.get(metric)
    number = float(score) if isinstance(score, int | float) else None
    return Item(f"{task}/{sample['doc_id']}", number, is_parsed, answer[:ANSWER_LETTERS])


@contextmanager
def _code_switch(allow_code: bool) -> Iterator[None]:
    """Let the harness's code metric run programs within the context, if they are allowed."""
    before = os.environ.get(CODE_SWITCH)
    if allow_code:
        os.environ[CODE_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(CODE_SWITCH, None)
        if before is not None:
            os.environ[CODE_SWITCH] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's warnings and the telemetry of ``datasets`` within the context.

    The harness warns about intended settings, such as a model that is already in memory.
    ``datasets`` reports every dataset that it opens to a server, including local files.
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
