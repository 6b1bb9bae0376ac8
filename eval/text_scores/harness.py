"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is loaded already.

Nothing is downloaded for a task whose data set is local. See
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

# Result of the harness's filters where they find no answer
INVALID = "[invalid]"
# Folders of the harness that hold the paper's benchmarks
FOLDERS = ("gsm8k", "mmlu", "drop", "bbh", "humaneval")
# The harness's own default
FEWSHOT_SEED = 1234
# Environment variable without which the harness's metric runs no program
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"


def task_manager(tasks: Sequence[str], include_path: Sequence[Path]) -> Any:
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
    import lm_eval.tasks

    # Reading a folder's YAML files is quick, reading all of the harness's is not.
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
    manager: Any
    # Number of items of each task; None for all
    limit: int | None
    include_path: Sequence[Path]
    # The user allows that programs of the model are run
    allow_code: bool = False

    def __post_init__(self) -> None:
        # A tag is a list of tasks without a mean of their scores.
        task = self.benchmark.task
        if task in self.manager.all_tags:
            members = ", ".join(sorted(self.manager.task_index[task].tags)[:5])
            raise UserError(
                f'"{task}" is a tag of the harness, which has no score of its own: name some of its'
                f" tasks ({members}, ...)."
            )
        if self.benchmark.runs_code and not self.allow_code:
            raise refuse_code(self.benchmark.name)

    def settings(self) -> dict[str, Any]:
        """All that a score depends on, except the model."""
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
        """Ask and score; the harness's own metric runs programs, where there are any."""
        from lm_eval.evaluator import evaluate

        template = model.effective_template(template)
        # The metric of programs runs one as soon as its task is loaded.
        with _quiet(), _code_switch(self.allow_code):
            tasks = self._load_tasks()
            result = evaluate(
                _harness_model(model, template, batch_size),
                tasks,
                limit=self.limit,
                bootstrap_iters=0,  # the intervals here come from pairs
                apply_chat_template=template != NO_TEMPLATE,
                fewshot_as_multiturn=False,
                confirm_run_unsafe_code=self.allow_code,
            )
        return _read_result(dict(result or {}), self.benchmark)

    def _load_tasks(self) -> dict[str, Any]:
        """The harness's tasks with their data, set as the benchmark says."""
        benchmark = self.benchmark
        with as_user_error(
            f'the data of "{benchmark.name}" can\'t be had',
            "load it once with a connection to the hub, or give a task of your own by"
            " --include_path",
        ):
            tasks_by_group = self.manager.load([benchmark.task])
        # A group has several tasks, a task only itself.
        for name, task in tasks_by_group["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self.allow_code:
                raise refuse_code(name)
            shots = benchmark.num_fewshot
            if shots is None:
                shots = task.get_config("num_fewshot") or 0
            task.set_config(key="num_fewshot", value=shots)
            # An update keeps the task's own words at which an answer ends.
            if benchmark.generation and task.get_config("output_type") == "generate_until":
                generation = dict(benchmark.generation)
                task.set_config(key="generation_kwargs", value=generation, update=True)
            # The examples of the prompt are the same for every model.
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return tasks_by_group


def refuse_code(name: str) -> UserError:
    """The sentence for a task that would run programs which nobody has allowed."""
    return UserError(
        f"{name} runs programs that the model writes, with all rights of this process: start it in"
        " a container without network and add --allow_code_execution."
    )


def _harness_model(model: LoadedModel, template: str, batch_size: int) -> Any:
    """The model as the harness takes it, with prompts under the template of training."""
    from lm_eval.models.huggingface import HFLM

    class TemplatedModel(HFLM):
        """Prompts under the template that the run was trained with."""

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """One prompt; the harness puts its examples into it."""
            if not add_generation_prompt:
                raise UserError("this task begins the model's answer itself: leave it out.")
            # The answer is empty: the model is to write it.
            turns = [(turn["role"], turn["content"]) for turn in chat_history]
            example = Example("", "", turns=(*turns, ("assistant", "")))
            resolved = resolve_template(template, model.tokenizer)
            return context_text(example, model.tokenizer, resolved)

    # The decorated base class is taken for an abstract one.
    model_class: Any = TemplatedModel
    return model_class(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        backend="seq2seq" if model.kind == "seq2seq" else "causal",
        batch_size=batch_size,
    )


def _read_result(result: dict[str, Any], benchmark: Benchmark) -> Measurement:
    """The score of a benchmark, its items and further metrics from the harness's result."""
    # The harness's metrics are named "metric,filter", next to standard errors and counts.
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
            f'"{benchmark.name}" gives no {metric} ({", ".join(metrics)}): another version of the'
            " harness is installed."
        )
    value = metrics.pop(metric)
    metric_name, _, filter_name = metric.partition(",")

    # A task may have several filters of one answer; the score is that of one of them.
    items = []
    for task, samples in result["samples"].items():
        for sample in samples:
            if sample["filter"] == filter_name:
                items.append(_read_item(task, sample, metric_name))

    # Tasks of a group can differ in their number of examples.
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
    """A question of the harness with its score and the model's answer."""
    # One response per filter: a text, a list of programs, or the log-likelihood of each choice.
    responses = sample["filtered_resps"]
    if responses and isinstance(responses[0], list) and isinstance(responses[0][0], str):
        responses = responses[0]
    is_parsed = True
    if all(isinstance(response, str) for response in responses):
        answer = responses[0] if responses else ""
        is_parsed = bool(answer.strip()) and answer != INVALID
        if not is_parsed:  # then the unfiltered answer is shown
            answer = str(sample["resps"][0][0])
    else:  # the number of the choice that the model finds likeliest
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
    """Context manager: lets the harness's metric run programs, if they are allowed."""
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
    """Context manager: silences the harness's warnings and the reports of ``datasets``.

    The harness warns of things that are intended here, such as a model that is loaded already;
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
