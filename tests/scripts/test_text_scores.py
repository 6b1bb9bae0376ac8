"""``python -m eval.text_scores`` on a small language model: what it scores, keeps and refuses."""

import os
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilora_diffusion.core.errors import UserError
from eval import table, text_scores
from eval.text_scores import harness, models
from eval.text_scores.benchmarks import PAPER
from tests.eval.text_score_models import judge, save_tasks
from tests.scripts.runs import copied, process
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
CHANGED = {"learning_rate": 0.1}
"""A rate at which two steps change the answers."""
WATCHED = """
import sys
from eval.text_scores import main
met = []
sys.addaudithook(
    lambda event, given: met.append((event, given)) if event in
    ("socket.connect", "socket.getaddrinfo", "urllib.Request") else None
)
code = main(sys.argv[1:])
sys.exit(code or (f"the network was asked: {met}" if met else 0))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, runs of two methods and two seeds, and two harness tasks."""
    root = tmp_path_factory.mktemp("text")
    base = save_llama(root / "base", max_position_embeddings=4096)  # room for long prompts
    given = {**material("causal"), "model_name_or_path": base, **CHANGED}
    for method in ("lora", "bilora"):
        for seed in (0, 1):
            train_text(root / f"{method}-{seed}", **given, method=method, seed=seed)
    save_tasks(root / "tasks")
    return root


@pytest.fixture
def look(folder, tmp_path):
    """``look("lora-0", "base", benchmarks=...)`` scores and reads the result."""

    def run(*words, benchmarks=TOY):
        runs = [path.name for path in folder.iterdir() if path.name != "base"]
        given = [str(folder / word) if word in runs else word for word in words]
        where = ["--output_dir", str(tmp_path / "out"), "--include_path", str(folder / "tasks")]
        assert text_scores.main([*given, "--benchmarks", benchmarks, *where]) == 0
        return table.read(tmp_path / "out")

    return run


def values(found):
    """(Subject, benchmark) -> score."""
    names = found.settings["benchmarks"]
    rows = [row for row in found.rows if row.metric in names and not row.item]
    return {(row.subject, row.metric): row.value for row in rows}


@pytest.mark.slow
def test_local_tasks_without_the_network(folder, tmp_path):
    """In a process of its own that may use the hub: nothing of it is asked."""
    out, runs = tmp_path / "out", [folder / f"{m}-{n}" for m in ("lora", "bilora") for n in (0, 1)]
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    words = ["--include_path", folder / "tasks", "--benchmarks", TOY, "--output_dir", out]
    process("-c", WATCHED, *runs, "base", *words, "--control", "LoRA", **online)
    found = table.read(out)
    assert [one.group for one in found.subjects] == ["LoRA", "LoRA", "Bi-LoRA", "Bi-LoRA", "base"]
    asked = found.settings["benchmarks"]
    assert [asked[name]["metric"] for name in asked] == ["acc,none", "exact_match,digits"]
    assert [asked[name]["num_fewshot"] for name in asked] == [0, 0]
    assert len(found.select("toy_choice", "base")) == 1 + 12
    assert {line.over for line in found.summaries if line.control} == {"seed", "item"}
    effects = found.select("toy_text effect of adapter")
    assert len(effects) == 4
    assert all(row.value and row.value > 0 for row in effects)
    assert str(tmp_path) not in (out / "result.json").read_text(encoding="utf-8")


def answers(found):
    """Subject -> what it answered to each item."""
    told: dict[str, dict[tuple[str, str], Any]] = {}
    for row in found.rows:
        if row.item:
            told.setdefault(row.subject, {})[row.metric, row.item] = row.value, row.note
    return told


def zero_of(run, folder):
    """The run's adapter, as a folder of its own that adds nothing."""
    folder.mkdir()
    shutil.copy(run / "adapter_config.json", folder)
    weights = load_file(run / ADAPTER)
    save_file({k: v * 0 if "lora_B" in k else v for k, v in weights.items()}, folder / ADAPTER)
    return folder


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_an_adapter_acts_and_one_of_zeros_does_not(kind, look, tmp_path):
    """And a model trained whole."""
    template = {"template": None} if kind == "seq2seq" else {}
    bilora = train_text_once(kind, "bilora", method="bilora", **CHANGED, **template)
    runs = [bilora, zero_of(bilora, tmp_path / "none")]
    if kind == "causal":
        runs.append(train_text_once(kind, "full", method="full", **CHANGED))
    found = look(*map(str, runs), "base")
    changed = {row.subject: row.value for row in found.select("toy_text effect of adapter")}
    assert changed.pop("bilora")
    assert changed == {"none": 0}
    told = answers(found)
    assert told["none"] == told["base"]
    assert told["bilora"] != told["base"]
    assert told.get("full") not in (told["base"], told["bilora"])


def test_what_is_finished_is_not_repeated(look, tmp_path, monkeypatch):
    first = look("lora-0", benchmarks="toy_choice")
    loaded: list[str] = []
    whole = models.load_base
    monkeypatch.setattr(models, "load_base", lambda *a: loaded.append(a[0].name) or whole(*a))
    again = look("lora-0", benchmarks="toy_choice")
    assert loaded == []
    assert again.rows == first.rows
    more = look("lora-0", "base", benchmarks="toy_choice,toy_text")
    assert len(loaded) == 1
    assert values(more)[("lora-0", "toy_choice")] == values(first)[("lora-0", "toy_choice")]
    look("lora-0", "--limit", "3", benchmarks="toy_choice")  # another setting is measured anew
    assert len(loaded) == 2


class Solver(LM):
    """Completes every function with the body of a sum."""

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
        passed = 0
        for (program,), test in zip(predictions, references):
            try:
                exec(program + "\\n" + test, {})
                passed += 1
            except AssertionError:
                pass
        return {"pass@1": passed / len(references)}, {}
"""


def test_humaneval_is_the_harness_task_and_runs_code_only_where_it_is_allowed(
    tmp_path, monkeypatch
):
    """The hub's two parts are stand-ins here: the data set, and the metric that runs programs."""
    problems = []
    for name, total in (("add", 3), ("subtract", -1)):
        test = f"\ndef check(f):\n    assert f(1, 2) == {total}\n"
        problem = {"prompt": f"def {name}(a, b):\n", "entry_point": name, "test": test}
        problems.append(problem | {"task_id": name, "canonical_solution": ""})
    for folder in ("openai/openai_humaneval", "code_eval"):
        (tmp_path / folder).mkdir(parents=True)
    write_rows(tmp_path / "openai" / "openai_humaneval" / "test.jsonl", problems)
    (tmp_path / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "_harness_model", lambda *_: Solver())

    benchmark = PAPER["humaneval"]
    manager = harness.task_manager([benchmark.task], [])
    with pytest.raises(UserError, match=r"humaneval runs programs .*--allow_code_execution"):
        harness.Harness(benchmark, manager, None, [])
    engine = harness.Harness(benchmark, manager, None, [], allow_code=True)
    measurement = engine.measure(SimpleNamespace(effective_template=str), "none", 2, None)
    assert measurement.value == 0.5
    assert [(item.id, item.score) for item in measurement.items] == [
        ("humaneval/0", 1.0),
        ("humaneval/1", 0.0),
    ]
    assert measurement.items[0].answer == "def add(a, b):\n    return a + b\n"
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_mtbench(look, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    categories = enumerate(["math", "writing", "coding"])
    rows = [{"question_id": n, "category": c, "turns": [f"Question {n}?"]} for n, c in categories]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    flags = ["--judge_model", "j", "--max_new_tokens", "6", "--mtbench_questions", str(questions)]
    with judge("[[8]]", "[[5]]", "[[2]]", "[[1]]") as endpoint:
        flags += ["--judge_base_url", endpoint.url]
        found = look("lora-0", "base", *flags, benchmarks="mtbench")
    assert values(found) == {("lora-0", "mtbench"): 5, ("base", "mtbench"): 1}
    assert len(endpoint.asked) == 6
    assert {one["authorization"] for one in endpoint.headers} == {"Bearer sk-very-secret"}
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or "sk-very-secret" not in path.read_text(encoding="utf-8")


def refuse(capsys, *words):
    assert text_scores.main([str(word) for word in words]) == 2
    *progress, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("error: ")
    assert "Traceback" not in "".join(progress)
    return said


def test_what_can_not_be_scored_is_refused(folder, tmp_path, capsys):
    lora, out = folder / "lora-0", ["--output_dir", tmp_path / "out", "--benchmarks"]
    for name, said in {
        "mmlu --include_path nowhere": '"nowhere"',
        "mmlu": 'the data of "mmlu"',
        "gsm8": 'did you mean "gsm8k"',
    }.items():
        assert said in refuse(capsys, lora, *out, *name.split())
    local = ["--benchmarks", "toy_choice", "--include_path", folder / "tasks"]
    local += ["--output_dir", tmp_path / "out"]
    adapter = copied(folder / "lora-0", tmp_path / "adapter")
    file = adapter / ADAPTER
    whole = load_file(file)
    renamed = {name.replace("layers.1", "layers.7"): value for name, value in whole.items()}
    reshaped = {name: torch.zeros(3, 3) for name in whole}
    for tensors, told in ((renamed, "does not fit the model"), (reshaped, "can't be put on")):
        save_file(tensors, file)
        assert told in refuse(capsys, adapter, *local)
    file.write_bytes(b"damaged")
    assert "adapter_model.safetensors is not a whole" in refuse(capsys, adapter, *local)
    assert "is a classifier" in refuse(capsys, train_text_once("classification"), *local)
