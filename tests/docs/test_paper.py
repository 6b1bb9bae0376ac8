"""docs/paper.md: its experiments have the paper's radii and rates, and its commands run.

The walk through the page takes place in one folder, with these differences to a reader's:

- The recipes train for two steps on short rows, with the first seed. One run per recipe is trained,
  in this process; the other variants and methods of a sweep are copies of it with records of their
  own. `tests/text` and `tests/contract` train the methods.
- Folders with the names of the hub's models and data sets lie in it: tiny random models, the
  miniature for SDXL, and made-up rows with the columns of each set.
- The harness's tasks have no rows here: they give every model the same score. A local judge takes
  the place of the one that the page names.
- Scorer and captioner of images are tiny; steps are timed on one narrow layer.
"""

import importlib
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState

from bilora_diffusion import mini
from bilora_diffusion.image import script as image_script
from bilora_diffusion.text import catalog
from bilora_diffusion.text import script as text_script
from bilora_diffusion.text.config import TextConfig
from eval import table
from eval.sweep import experiment, runs
from eval.sweep.experiment import Plan, Run
from eval.text_scores import harness
from eval.text_scores.benchmarks import Item, Measurement
from tests.docs.pages import commands, scripts
from tests.eval.clip_models import save_blip, save_open_clip
from tests.eval.text_score_models import judge
from tests.text.text_builders import save_llama, save_t5, write_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "paper.md"
EXPERIMENTS = sorted((ROOT / "eval" / "experiments" / "paper").glob("*.yaml"))
GLUE = ("mnli", "sst2", "cola", "qnli", "mrpc")

RADII: dict[tuple[str, str], float] = {
    ("glue", "lora-sam"): 0.01,  # Appendix H.1, for Table 1
    ("glue", "bilora"): 0.05,
    ("superglue", "lora-sam"): 0.05,  # Appendix H.1, for Table 2
    ("superglue", "bilora"): 0.1,
    ("llama2_7b", "lora-sam"): 0.01,  # Appendix H.2, for Tables 3 and A2
    ("llama2_7b", "bilora"): 0.1,
    ("llama2_7b", "flat-lora"): 0.05,  # Appendix H.4, for Table 5: that of Li et al. 2024b
    ("llama31_8b", "lora-sam"): 0.01,  # Appendix H.2, for Table 3
    ("llama31_8b", "bilora"): 0.05,
}
TABLE_A1 = {"0.01", "0.05", "0.1", "0.2"}
RATES_OF_FULL = {"glue": 1e-4, "superglue": 1e-4, "llama2_7b": 5e-5, "llama31_8b": 5e-5}
"""Full FT's learning rates, Appendices H.1 and H.2."""
RUNS_OF_TABLE_2 = {"boolq": 3, "wic": 3, "rte": 5, "cb": 20, "copa": 20}  # Section 5.2


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of a reader, with the repository's experiments and recipes."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "experiments").symlink_to(ROOT / "eval" / "experiments")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def family(recipe: Path) -> str:
    """The group of recipes that share the paper's radii."""
    if recipe.parent.name != "t5_base":
        return recipe.parent.name
    return "glue" if recipe.stem in GLUE else "superglue"


def configs(plan: Plan) -> list[Any]:
    """The configuration of each variant, as the training script has it."""
    flags = [run.flags for run in plan.runs[: len(plan.variants)]]
    return [
        experiment.resolve("", plan.experiment, plan.recipe, plan.script, words) for words in flags
    ]


def test_every_variant_has_the_paper_s_radius_rate_and_number_of_runs(folder, hub):
    radii: dict[tuple[str, str], float] = {}
    rates: dict[str, float] = {}
    seeds: dict[str, int] = {}
    for plan in itertools.chain.from_iterable(map(experiment.load, EXPERIMENTS)):
        group = family(plan.recipe)
        if group == "superglue":
            seeds[plan.recipe.stem] = len(plan.seeds)
        if "rho" in plan.experiment.axes:
            assert set(plan.experiment.axes["rho"]) == TABLE_A1
            continue
        for config in configs(plan):
            if config.method == "full":
                rates[group] = config.learning_rate
            elif (group, config.method) in RADII:
                radius = radii.setdefault((group, config.method), config.rho)
                assert config.rho == radius, f"{plan.recipe}, {config.method}: two radii"
            else:
                assert config.method in ("lora", "lora-obar", "lora-nbar")  # without a radius
    assert radii == RADII
    assert rates == RATES_OF_FULL
    assert seeds == RUNS_OF_TABLE_2


def test_every_experiment_is_on_the_page_and_no_command_writes_where_another_does(folder):
    words = [words for script in scripts(PAGE) for words in commands(script, folder)]
    used = [word for command in words for word in command if word.startswith("eval/experiments/")]
    assert sorted(ROOT / word for word in used) == EXPERIMENTS
    flags = ("--output_dir", "--json")
    places = [w[w.index(flag) + 1] for w in words for flag in flags if flag in w]
    assert len(set(places)) == len(places)


SHORT: dict[str, Any] = {
    "max_train_steps": 2,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "report_to": "none",
    "mixed_precision": "no",
}
SHORT_TEXT = SHORT | {
    "max_length": 32,
    "max_target_length": 4,
    "max_train_samples": 4,
    "max_eval_samples": 4,
    "max_predictions": 1,
    "generation_max_new_tokens": 2,
}
SHORT_IMAGES = SHORT | {"resolution": 64, "num_validation_images": 0}
MODELS: dict[str, Callable[[Path], object]] = {
    "google-t5/t5-base": save_t5,
    "meta-llama/Llama-2-7b-hf": partial(save_llama, max_position_embeddings=4096),
    "meta-llama/Llama-3.1-8B": partial(save_llama, max_position_embeddings=4096),
}
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
ICONS = "linoyts/3d_icon"
QUESTIONS = [{"question_id": 1, "category": "math", "turns": ["What is 2 + 3?"]}]
NARROW = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
NARROW |= {"num_hidden_layers": 2, "vocab_size": 256}


def save_recipes(folder: Path) -> None:
    """The repository's recipes, made short."""
    for path in (ROOT / "recipes").rglob("*.yaml"):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe.pop("num_train_epochs", None)
        recipe |= SHORT_TEXT if "model_name_or_path" in recipe else SHORT_IMAGES
        place = folder / path.relative_to(ROOT / "recipes")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def made_up(task: catalog.CatalogTask, count: int) -> list[dict[str, Any]]:
    """Rows with the columns that a task reads."""
    columns = [column for _, column, _, _ in Formatter().parse(task.prompt) if column]
    columns += [task.group, *([task.extra] if task.extra else [])]
    rows = []
    for number in range(count):
        row: dict[str, Any] = dict.fromkeys(columns, f"apple {number} is red")
        answer = f"{task.answer_marker or ''} 2".strip()
        row[task.target] = number % len(task.label_words) if task.label_words else answer
        rows.append(row)
    return rows


def save_tasks(folder: Path) -> None:
    """The hub's sets of all tasks, each in a folder with the set's name."""
    configs: dict[str, list[dict[str, Any]]] = {}
    for task in catalog.TASKS.values():
        if task.package:
            continue
        splits = {"train": task.holdout + 6}
        if task.validation:
            splits[task.validation] = 6
        name, data = task.config_name or "default", []
        for split, count in splits.items():
            file = folder / task.dataset / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, made_up(task, count))
            data.append({"split": split, "path": f"{name}/{file.name}"})
        configs.setdefault(task.dataset, []).append({"config_name": name, "data_files": data})
    for dataset, entries in configs.items():
        head = yaml.safe_dump({"configs": entries})
        (folder / dataset / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")


class CopiedRun:
    """A run of a sweep that is over when it was started: trained, or a copy of one that was."""

    trained: dict[Any, Path]
    """Recipe, or whatever else the weights depend on -> a run."""

    def __init__(self, runner: runs.Runner, run: Run) -> None:
        self.run, self.popen = run, None
        folder, command = runner.runs_dir / run.name, runner.command(run)
        config = TextConfig.resolve(command[4:])
        metrics = self.trained.get(runner.recipe)
        source: Any = runner.recipe
        if config.method == "full":  # it leaves a whole model
            source = config.model_name_or_path
        elif config.log_dynamics:  # the terms of Eq. 5 are the method's own
            source = run.flags
        if source not in self.trained:
            self.trained[source] = folder
            train(Path(command[3]).name, command[4:])
            return
        shutil.copytree(self.trained[source], folder)
        if metrics is not None and not config.log_dynamics:
            shutil.copy(metrics / "metrics.jsonl", folder)
        record = json.loads((folder / "run.json").read_text())
        record |= {"config": config.to_dict(), "method": config.method, "seed": config.seed}
        (folder / "run.json").write_text(json.dumps(record))

    def is_running(self) -> bool:
        return False

    def outcome(self) -> runs.Outcome:
        return runs.Outcome(self.run.name, self.run.variant, self.run.seed, runs.FINISHED)


def train(script: str, argv: Sequence[str]) -> None:
    # accelerate keeps one precision for a whole process.
    AcceleratorState._reset_state()
    main = text_script.main if script == "train_text_bilora.py" else image_script.main
    main(list(argv))


def measure_two_items(self: harness.Harness, *_: Any) -> Measurement:
    """A score of two items in the place of a task's."""
    return Measurement(0.5, [Item("0", 1.0), Item("1", 0.0)])


@pytest.fixture
def world(folder, monkeypatch):
    """Models, data and recipes in the folder; further flags for each command."""
    (folder / "recipes").unlink()
    save_recipes(folder / "recipes")
    save_tasks(folder)
    for name, save in MODELS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save(folder / name)
    (folder / SDXL).parent.mkdir()
    shutil.copytree(mini.pipeline_dir(), folder / SDXL)
    (folder / ICONS).mkdir(parents=True)
    for picture in sorted(mini.train_dir().glob("*.png"))[:2]:
        shutil.copy(picture, folder / ICONS)
    write_rows(folder / "questions.jsonl", QUESTIONS)

    monkeypatch.setattr(CopiedRun, "trained", {}, raising=False)
    monkeypatch.setattr(runs, "RunProcess", CopiedRun)
    monkeypatch.setattr(runs, "_end", lambda _: None)
    manager = SimpleNamespace(all_tasks=[], all_tags=[])
    monkeypatch.setattr(harness, "task_manager", lambda *_: manager)
    monkeypatch.setattr(harness.Harness, "measure", measure_two_items)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    step_cost = importlib.import_module("step_cost")
    narrow = partial(importlib.import_module("random_models").llama_7b, **NARROW)
    shape = replace(step_cost.SHAPES["llama-7b-layer"], build=narrow, steps=1)
    for name in step_cost.SHAPES:
        monkeypatch.setitem(step_cost.SHAPES, name, shape)
    monkeypatch.setattr(step_cost, "memory_of", lambda *_: 0)
    clip, blip = save_open_clip(folder / "clip"), save_blip(folder / "blip")
    two_images = "--seeds 0 --max_prompts 2 --num_inference_steps 1 --general_prompts none"
    with judge("[[8]]") as endpoint:
        text = f"--limit 1 --max_new_tokens 2 --mtbench_questions {folder / 'questions.jsonl'}"
        further = {
            "eval.sweep": "--seeds 0 --set validation_loss_steps=1",
            "eval.text_scores": f"{text} --judge_base_url {endpoint.url}",
            "eval.clip_scores": f"{two_images} --scorer open_clip:{clip} --captioner blip:{blip}",
            "eval.landscape": "--directions 1 --points 3 --grid 0 --max_images 1 --levels 1"
            " --ascent_steps 1",
        }
        yield {name: flags.split() for name, flags in further.items()}


def execute(words: Sequence[str], further: dict[str, list[str]]) -> None:
    """Run one command of the page."""
    program, *arguments = words
    if program == "accelerate":
        assert arguments[0] == "launch"
        train(arguments[1], arguments[2:])
    elif arguments[0] == "-m":
        main = importlib.import_module(arguments[1]).main
        assert not main([*arguments[2:], *further.get(arguments[1], [])]), " ".join(words)
    else:
        importlib.import_module(Path(arguments[0]).stem).main(arguments[1:])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_run_one_after_another_in_one_folder(folder, world):
    for script in scripts(PAGE):
        for place in itertools.count():
            # Expanded anew, since a command's globs are to match what those before it have made.
            expanded = commands(script, folder)
            if place == len(expanded):
                break
            execute(expanded[place], world)

    glue = table.read(folder / "runs" / "scores" / "glue")
    assert set(glue.groups) == {"LoRA", "LoRA-SAM", "Bi-LoRA", "Full FT"}
    assert all(len(glue.members(group)) == 5 for group in glue.groups)
    report = folder / "runs" / "scores" / "glue" / "report.md"
    assert "## Average" in report.read_text(encoding="utf-8")
    for path in (folder / "runs").rglob("result.json"):
        assert table.read(path.parent).rows
    costs = json.loads((folder / "runs" / "step_cost_mini.json").read_text())
    assert len(costs["arms"]) > 5
