"""``python -m eval.text_scores`` on a small language model: scores, their cache, and errors."""

import os
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError
from eval import text_scores
from eval.results import table
from eval.text_scores import harness, models
from eval.text_scores.benchmarks import PAPER
from tests.eval.text_score_models import judge, save_tasks
from tests.scripts.runs import copied, run_python
from tests.text.text_builders import (
    ADAPTER,
    material,
    save_llama,
    train_text,
    train_text_once,
    write_rows,
)

LM: Any = pytest.importorskip("lm_eval.api.model").LM

TOY = "toy_choice,toy_text"
HIGH_RATE = {"learning_rate": 0.1}
"""Learning rate at which two steps change the answers."""
WATCHED_COMMAND = """
import sys
from eval.text_scores import main
calls = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        calls.append((event, arguments))
sys.addaudithook(watch)
code = main(sys.argv[1:])
sys.exit(code or (f"the network was asked: {calls}" if calls else 0))
"""
"""Program that runs the command and fails if the command opens a connection."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Create a base model, runs of two methods with two seeds each, and two harness tasks."""
    root = tmp_path_factory.mktemp("text")
    base = save_llama(root / "base", max_position_embeddings=4096)  # for long prompts
    options = {**material("causal"), "model_name_or_path": base, **HIGH_RATE}
    for method in ("lora", "bilora"):
        for seed in (0, 1):
            train_text(root / f"{method}-{seed}", **options, method=method, seed=seed)
    save_tasks(root / "tasks")
    return root


@pytest.fixture
def score(folder, tmp_path):
    """Return ``score(*words, benchmarks=...)``, which scores models and returns the result."""

    def run(*words, benchmarks=TOY):
        command = list(map(str, words))
        command += f"--benchmarks {benchmarks} --output_dir {tmp_path / 'out'}".split()
        command += ["--include_path", str(folder / "tasks")]
        assert text_scores.main(command) == 0
        return table.read(tmp_path / "out")

    return run


@pytest.mark.slow
def test_local_tasks_are_scored_without_the_network(folder, tmp_path):
    """The command opens no connection, even if it may use the hub."""
    out = tmp_path / "out"
    runs = [folder / name for name in ("lora-0", "lora-1", "bilora-0", "bilora-1")]
    # The environment of the tests forbids the hub, so this environment allows it.
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    flags = (
        f"base --include_path {folder / 'tasks'} --benchmarks {TOY} --output_dir {out}"
        " --control LoRA"
    )
    run_python(["-c", WATCHED_COMMAND, *runs, *flags.split()], environment=online)
    result = table.read(out)
    groups = [subject.group for subject in result.subjects]
    assert groups == ["LoRA", "LoRA", "Bi-LoRA", "Bi-LoRA", "base"]
    settings = result.settings["benchmarks"].values()
    assert [entry["metric"] for entry in settings] == ["acc,none", "exact_match,digits"]
    assert len(result.select("toy_choice", "base")) == 1 + 12  # the score and its items
    assert {line.over for line in result.summaries if line.control} == {"seed", "item"}
    effects = result.select("toy_text effect of adapter")
    assert len(effects) == 4
    assert all(row.value for row in effects)
    assert str(tmp_path) not in (out / "result.json").read_text(encoding="utf-8")


def answers(result, subject):
    """Return a subject's score and answer for each item."""
    rows = [row for row in result.rows if row.item and row.subject == subject]
    return {(row.metric, row.item): (row.value, row.note) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_adapter_changes_the_answers_and_an_adapter_of_zeros_does_not(kind, score, tmp_path):
    """A fully fine-tuned model changes the answers too."""
    options = {**HIGH_RATE, "template": None} if kind == "seq2seq" else HIGH_RATE
    bilora = train_text_once(kind, "bilora", method="bilora", **options)
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    shutil.copy(bilora / "adapter_config.json", zeros)
    weights = load_file(bilora / ADAPTER)
    for name, weight in weights.items():
        if "lora_B" in name:
            weight.zero_()
    save_file(weights, zeros / ADAPTER)
    runs = [bilora, zeros]
    # Full fine-tuning uses other code: it has a model folder instead of a base and an adapter.
    if kind == "causal":
        runs.append(train_text_once(kind, "full", method="full", **HIGH_RATE))
    result = score(*runs, "base")
    effects = {row.subject: row.value for row in result.select("toy_text effect of adapter")}
    assert effects.pop("bilora")
    assert effects == {"zeros": 0}
    assert answers(result, "zeros") == answers(result, "base")
    assert answers(result, "bilora") != answers(result, "base")
    if kind == "causal":
        assert answers(result, "full")
        assert answers(result, "full") not in (answers(result, "base"), answers(result, "bilora"))


def test_a_finished_score_is_not_repeated(score, folder, monkeypatch):
    run = folder / "lora-0"
    loaded_models = []
    load_base = models.load_base

    def watched_load(base, *arguments):
        loaded_models.append(base.name)
        return load_base(base, *arguments)

    first = score(run, benchmarks="toy_choice")
    monkeypatch.setattr(models, "load_base", watched_load)
    assert score(run, benchmarks="toy_choice").rows == first.rows
    assert loaded_models == []
    larger_result = score(run, "base")
    assert len(loaded_models) == 1
    assert [row for row in larger_result.rows if row in first.rows] == list(first.rows)
    score(run, "--limit", "3", benchmarks="toy_choice")  # other settings: scored again
    assert len(loaded_models) == 2


class Adder(LM):
    """Language model that completes every function with a sum."""

    def generate_until(self, requests):
        return ["    return a + b\n" for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


CODE_EVAL = """
import os
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    def _info(self):
        texts = datasets.Value("string")
        features = {"predictions": datasets.Sequence(texts), "references": texts}
        return evaluate.MetricInfo("", "", datasets.Features(features))

    def _compute(self, predictions, references, k):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        try:
            exec(predictions[0][0] + "\\n" + references[0], {})
        except AssertionError:
            return {"pass@1": 0.0}, {}
        return {"pass@1": 1.0}, {}
"""


def test_humaneval_runs_code_only_where_it_is_allowed(tmp_path, monkeypatch):
    """The data set and the metric that runs programs are local replacements for the hub's."""
    data = tmp_path / "openai" / "openai_humaneval"
    data.mkdir(parents=True)
    metric = tmp_path / "code_eval"
    metric.mkdir()
    problems = []
    # The answer is always a sum, which is right only for the first problem.
    for name, value in (("add", 3), ("subtract", -1)):
        test = f"def check(f):\n    assert f(1, 2) == {value}\n"
        problems.append({"prompt": f"def {name}(a, b):\n", "entry_point": name, "test": test})
    write_rows(data / "test.jsonl", problems)
    (metric / "code_eval.py").write_text(CODE_EVAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "_harness_model", lambda *_: Adder())

    manager = harness.task_manager(["humaneval"], [])
    with pytest.raises(UserError, match=r"humaneval runs programs .*--allow_code_execution"):
        harness.Harness(PAPER["humaneval"], manager, None, [])
    engine = harness.Harness(PAPER["humaneval"], manager, None, [], allow_code=True)
    model: Any = SimpleNamespace(effective_template=str)
    no_cache: Any = None
    measurement = engine.measure(model, "none", 2, no_cache)
    assert measurement.value == 0.5
    assert [item.score for item in measurement.items] == [1, 0]
    assert measurement.items[0].answer == "def add(a, b):\n    return a + b\n"
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_mtbench_has_the_judge_s_scores_and_keeps_its_key_secret(
    score, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    rows = []
    for number, category in enumerate(["math", "writing", "coding"]):
        question = f"Question {number}?"
        rows.append({"question_id": number, "category": category, "turns": [question]})
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    flags = f"--judge_model j --max_new_tokens 6 --mtbench_questions {questions}"
    with judge("[[8]]", "[[5]]", "[[2]]", "[[1]]") as endpoint:
        flags += f" --judge_base_url {endpoint.url}"
        result = score(folder / "lora-0", "base", *flags.split(), benchmarks="mtbench")
    scores = {row.subject: row.value for row in result.select("mtbench") if not row.item}
    assert scores == {"lora-0": 5, "base": 1}
    assert len(endpoint.asked) == 6  # 3 questions for each of 2 subjects
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer sk-very-secret"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or "sk-very-secret" not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_models_and_tasks_that_cannot_be_scored_are_refused(folder, tmp_path, capsys):
    def refusal(run, flags):
        argv = f"{run} {flags} --output_dir {tmp_path / 'out'}".split()
        assert text_scores.main(argv) == 2
        *progress, sentence = capsys.readouterr().err.strip().splitlines()
        assert "Traceback" not in "".join(progress)
        return sentence

    lora = folder / "lora-0"
    assert '"nowhere"' in refusal(lora, "--benchmarks mmlu --include_path nowhere")
    assert 'the data of "mmlu"' in refusal(lora, "--benchmarks mmlu")

    toy_tasks = f"--benchmarks {TOY} --include_path {folder / 'tasks'}"
    assert "is a classifier" in refusal(train_text_once("classification"), toy_tasks)
    adapter = copied(lora, tmp_path / "adapter")
    weights = load_file(adapter / ADAPTER)
    # The model has two layers, so there is no layer 7.
    other_layer = {name.replace("layers.1", "layers.7"): value for name, value in weights.items()}
    save_file(other_layer, adapter / ADAPTER)
    assert "does not fit the model" in refusal(adapter, toy_tasks)
    save_file({name: torch.zeros(3, 3) for name in weights}, adapter / ADAPTER)
    assert "can't be put on" in refusal(adapter, toy_tasks)
    (adapter / ADAPTER).write_bytes(b"damaged")
    assert "adapter_model.safetensors is not a whole" in refusal(adapter, toy_tasks)
