"""results/paper.md: its experiments have the paper's radii and rates, and its commands run.

The walk through the page takes place in one folder, with these differences to a reader's:

- The runs of a sweep are records of their configurations with the weights of one run; those of
  `accelerate launch` are trained in this process, on the miniature and two images.
- The harness's tasks have no rows here: they give every model the same score. A local judge takes
  the place of the one that the page names.
- Scorer and captioner of images are tiny; steps are timed on one narrow layer.
"""

import importlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from bilora_diffusion.image import script as image_script
from bilora_diffusion.text.config import TextConfig
from eval import sweep_plan as plan
from eval import sweep_runs as runs
from eval import table
from eval.text_scores import harness
from eval.text_scores.benchmarks import Item, Measurement
from tests.docs.pages import commands, scripts
from tests.eval.clip_models import save_blip, save_open_clip
from tests.eval.text_score_models import judge
from tests.run import recorded_runs
from tests.scripts.runs import two_icons, words
from tests.text.text_builders import ADAPTER, material, train_text_once, write_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "results" / "paper.md"
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


OUTPUT = ("--output_dir", "run")
OUTPUTS = ("--output_dir", "--json")


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


@pytest.mark.slow
def test_every_variant_has_the_paper_s_radius_rate_and_number_of_runs(folder, hub):
    radii: dict[tuple[str, str], Any] = {}
    rates: dict[str, float] = {}
    seeds: dict[str, int] = {}
    for planned in itertools.chain.from_iterable(map(plan.load, EXPERIMENTS)):
        group = family(planned.recipe)
        if group == "superglue":
            seeds[planned.recipe.stem] = len(planned.seeds)
        if "rho" in planned.experiment.axes:
            assert set(planned.experiment.axes["rho"]) == TABLE_A1
            continue
        for run in planned.runs[: len(planned.variants)]:
            config = TextConfig.resolve(["--config", str(planned.recipe), *run.flags, *OUTPUT])
            if config.method == "full":
                rates[group] = config.learning_rate
            elif (group, config.method) in RADII:
                radius = radii.setdefault((group, config.method), config.rho)
                assert config.rho == radius, f"{planned.recipe}, {config.method}: two radii"
            else:
                assert config.method in ("lora", "lora-obar", "lora-nbar")  # without a radius
    assert radii == RADII
    assert rates == RATES_OF_FULL
    assert seeds == RUNS_OF_TABLE_2


def test_every_experiment_is_on_the_page_and_no_command_writes_where_another_does(folder):
    paths, places = [], []
    for command in itertools.chain.from_iterable(commands(s, folder) for s in scripts(PAGE)):
        paths += [ROOT / word for word in command if word.startswith("eval/experiments/")]
        places += [command[n] for n, word in enumerate(["", *command]) if word in OUTPUTS]
    assert sorted(paths) == EXPERIMENTS
    assert len(set(places)) == len(places)


NARROW = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4}
NARROW |= {"num_hidden_layers": 2, "vocab_size": 256}
SHORT = {"max_train_steps": 2, "num_validation_images": 0, "resolution": 64}
LOSSES = {0: (2.0, 2.0), 1: (1.5, 1.6), 2: (1.0, 1.4)}
SCORES = {"heldout_accuracy": 0.5, "heldout_matthews_correlation": 0.25}


class RecordedRun:
    """A run of a sweep that is over when it was started: a record and the weights of another."""

    def __init__(self, runner: runs.Runner, run: plan.Run) -> None:
        self.run, self.popen = run, None
        folder = runner.runs_dir / run.name
        base = material("causal")["model_name_or_path"]
        config = TextConfig.resolve(runner.command(run)[4:])
        options = config.to_dict() | {"model_name_or_path": str(base), "task_type": "causal"}
        recorded_runs.make(folder, config.method, run.seed, (0, 1, 2), options, losses=LOSSES)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 2, **SCORES}) + "\n")
        if config.method == "full":
            source = train_text_once("causal", "full", method="full")
            shutil.copytree(source / "model", folder / "model")
        else:
            source = train_text_once("causal", "lora", method="lora")
            for name in (ADAPTER, "adapter_config.json"):
                shutil.copy(source / name, folder)

    def is_running(self) -> bool:
        return False

    def outcome(self) -> runs.Outcome:
        return runs.Outcome(self.run.name, self.run.variant, self.run.seed, runs.FINISHED)


def measure_two_items(self: harness.Harness, *_: Any) -> Measurement:
    """A score of two items in the place of a task's."""
    return Measurement(0.5, [Item("0", 1.0), Item("1", 0.0)])


@pytest.fixture
def further_flags(folder, hub, monkeypatch):
    """Further flags of each command; what can not be here is replaced."""
    monkeypatch.setattr(runs, "RunProcess", RecordedRun)
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
    question = {"question_id": 1, "category": "math", "turns": ["What is 2 + 3?"]}
    questions = write_rows(folder / "questions.jsonl", [question])
    with judge("[[8]]") as endpoint:
        text = f"--limit 1 --max_new_tokens 2 --mtbench_questions {questions}"
        two_images = "--seeds 0 --max_prompts 2 --num_inference_steps 1 --general_prompts none"
        flags = {
            "eval.sweep": "--seeds 0",
            "eval.text_scores": f"{text} --judge_base_url {endpoint.url}",
            "eval.clip_scores": f"{two_images} --scorer open_clip:{clip} --captioner blip:{blip}",
            "eval.landscape": "--directions 1 --points 3 --grid 0 --max_images 1 --levels 1"
            " --ascent_steps 1",
        }
        further = {name: text.split() for name, text in flags.items()}
        further["accelerate"] = words(two_icons(folder / "icons") | SHORT)  # prompts have spaces
        yield further


def execute(command: Sequence[str], further_flags: dict[str, list[str]]) -> None:
    """Run one command of the page."""
    program, *arguments = command
    if program == "accelerate":
        AcceleratorState._reset_state()  # accelerate keeps one precision for a whole process
        image_script.train([*arguments[2:], *further_flags[program]])
    elif arguments[0] == "-m":
        main = importlib.import_module(arguments[1]).main
        assert not main([*arguments[2:], *further_flags.get(arguments[1], [])]), command
    else:
        importlib.import_module(Path(arguments[0]).stem).main(arguments[1:])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page_run_one_after_another_in_one_folder(folder, further_flags):
    for script in scripts(PAGE):
        for place in itertools.count():
            # Expanded anew, since a command's globs are to match what those before it have made.
            expanded = commands(script, folder)
            if place == len(expanded):
                break
            execute(expanded[place], further_flags)

    glue = table.read(folder / "runs" / "scores" / "glue")
    assert set(glue.groups) == {"LoRA", "LoRA-SAM", "Bi-LoRA", "Full FT"}
    assert all(len(glue.members(group)) == 5 for group in glue.groups)
    report = folder / "runs" / "scores" / "glue" / "report.md"
    assert "## Average" in report.read_text(encoding="utf-8")
    for path in (folder / "runs").rglob("result.json"):
        assert table.read(path.parent).rows
    costs = json.loads((folder / "runs" / "step_cost_mini.json").read_text())
    assert len(costs["arms"]) > 5
