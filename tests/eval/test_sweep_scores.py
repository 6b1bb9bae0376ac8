"""Scores of an experiment: keys, checks before training, recorded runs, step rules, the report."""

import json
from dataclasses import replace

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import ROOT
from eval import sweep
from eval.results import compare, table
from eval.results.table import Result
from eval.subjects import Subject
from eval.sweep import samples, scoring, step_rules
from eval.sweep.plan import Run, load
from eval.sweep.record import Record

EXPERIMENTS = ROOT / "eval" / "experiments"
ICONS = ROOT / "results" / "pictures_icons"
SCORES = {"prompts": "heldout", "steps": [4, 6], "guidances": ["adapter:4", "base:2"]}


@pytest.fixture
def plan(tmp_path):
    """Return ``plan(scores, ...)``, which plans an experiment with these scores."""

    def load_content(scores, keys=None, settings=(), **content):
        recipe = str(ROOT / "recipes" / "mini.yaml")
        path = tmp_path / "experiment.yaml"
        path.write_text(json.dumps({"recipe": recipe, "scores": scores, **content}))
        (sweep_plan,) = load(path, settings, scores_keys=keys)
        return sweep_plan

    return load_content


def flags_of(sweep_plan):
    return dict(flag.removeprefix("--").split("=") for flag in sweep_plan.runs[0].flags)


def test_runs_keep_the_checkpoints_that_are_sampled(plan):
    flags = flags_of(plan(SCORES))
    assert flags["max_train_steps"] == "6"
    assert flags["checkpointing_steps"] == "2"
    assert flags["checkpoints_total_limit"] == "0"
    assert flags["num_validation_images"] == "0"
    assert flags_of(plan(SCORES, {"steps": "20,50"}))["checkpointing_steps"] == "10"
    # The experiment's own options are kept.
    own_flags = flags_of(plan(SCORES, options={"max_train_steps": 12, "checkpointing_steps": 1}))
    assert (own_flags["max_train_steps"], own_flags["checkpointing_steps"]) == ("12", "1")
    for options in ({"max_train_steps": 5}, {"checkpointing_steps": 4}):
        with pytest.raises(UserError, match="has no checkpoint: leave max_train_steps"):
            plan(SCORES, options=options)


def test_the_held_out_prompts_belong_to_the_training_data(plan):
    def prompts(*settings):
        return plan(SCORES, settings=settings).experiment.scores.prompts

    assert prompts() == "mini-heldout"
    assert prompts("dataset=mini-animals") == "mini-animals-heldout"
    with pytest.raises(UserError, match="the runs have no held-out images"):
        prompts("validation_dataset=none")


def test_guidances_are_named_by_their_sources_and_scales(plan):
    """Strengths 0 and 1 are written as words, to keep earlier results comparable."""
    guidances = plan({**SCORES, "guidances": "1:4,0.5:4,0.25:2,0:2"}).experiment.scores.guidances
    assert [guidance.text for guidance in guidances] == ["adapter:4", "0.5:4", "0.25:2", "base:2"]
    assert [guidance.label for guidance in guidances] == [
        "guidance 4",
        "guidance 4 from strength 0.5",
        "guidance 2 from strength 0.25",
        "base's guidance 2",
    ]


REFUSED = {
    "steps": ([0], '"scores.steps.0" can\'t be 0'),
    "guidances": (
        ["best:4"],
        '"best:4" is not a kind of guidance: write adapter:4, base:2 or 0.5:4',
    ),
    "max_prompts": ("none", '"scores.max_prompts" can\'t be'),
    "options": ({"seeds": 1}, "scores.options: an option sets seeds: use the other keys"),
    "conditions": ({"a": {"prompts": "x"}}, "conditions.a: an option sets prompts: use the"),
    "promts": ("mini", r'no key "scores.promts" \(did you mean "prompts"\?\)'),
}


@pytest.mark.parametrize("key", REFUSED)
def test_bad_scores_are_refused(key, plan):
    value, sentence = REFUSED[key]
    with pytest.raises(UserError, match=f"experiment.yaml: .*{sentence}"):
        plan({**SCORES, key: value})


BAD_CONDITIONS = {
    "option": (
        {"a": {"scorer": "embedded"}},
        "conditions.a: scorer is not an option that changes images",
    ),
    "name": ({"a/b": {}}, '"scores.conditions.a/b" can\'t be'),
}


@pytest.mark.parametrize("problem", BAD_CONDITIONS)
def test_bad_conditions_are_refused(problem, plan):
    conditions, sentence = BAD_CONDITIONS[problem]
    with pytest.raises(UserError, match=f"experiment.yaml: .*{sentence}"):
        plan({**SCORES, "conditions": conditions})


CONDITIONS = {
    "plain": {},
    "int8": {"base_precision": "int8"},
    "5 steps": {"num-inference-steps": 5},
}


def conditional_scores(plan, **changes):
    """Plan the scores of one checkpoint in three conditions, with two prompts."""
    scores = {"prompts": "mini-heldout", "steps": [4], "guidances": ["adapter:4"]}
    scores |= {"conditions": CONDITIONS, "options": {"num_inference_steps": 9}, "max_prompts": 2}
    return plan({**scores, **changes}).experiment.scores


def test_each_condition_has_its_flags_and_folder(plan, tmp_path):
    scores = conditional_scores(plan, guidances=["adapter:4", "adapter:1"])
    conditioned = scoring.Scoring(scores, tmp_path)
    labels = [condition.label for condition in conditioned.conditions]
    assert labels[:3] == ["guidance 4 (plain)", "guidance 4 (int8)", "guidance 4 (5 steps)"]
    assert labels[3:] == ["guidance 1 (plain)", "guidance 1 (int8)", "guidance 1 (5 steps)"]
    folders = [condition.folder for condition in conditioned.conditions]
    assert folders[1:3] == ["scores-adapter-4-int8", "scores-adapter-4-5-steps"]
    assert len(set(folders)) == 6
    flags = [" ".join(conditioned.flags(condition)) for condition in conditioned.conditions]
    assert [("--base_precision int8" in words) for words in flags[:3]] == [False, True, False]
    steps = [int(words.split("--num_inference_steps ")[1].split()[0]) for words in flags[:3]]
    assert steps == [9, 9, 5]  # a condition's options have priority
    assert conditioned.num_images == 6 * 2
    assert conditioned.settings()["conditions"]["int8"] == {"base_precision": "int8"}
    # Without conditions, labels, folders and settings are as in earlier results.
    plain = scoring.Scoring(conditional_scores(plan, conditions={}), tmp_path)
    assert [condition.label for condition in plain.conditions] == ["guidance 4"]
    assert [condition.folder for condition in plain.conditions] == ["scores-adapter-4"]
    assert "conditions" not in plain.settings()


def test_base_precision_with_guidance_from_the_base_is_refused_before_training(plan, tmp_path):
    scores = conditional_scores(plan, guidances=["base:2"])
    with pytest.raises(UserError, match="--base_precision merges the adapter"):
        scoring.Scoring(scores, tmp_path).check([], "mini")


def test_the_report_has_the_change_in_each_condition(plan, tmp_path):
    scores = conditional_scores(plan)
    conditioned = scoring.Scoring(scores, tmp_path)
    # Run -> ground-truth score in each condition
    truths = {"LoRA": (0.5, 0.3, 0.4), "Bi-LoRA": (0.5, 0.45, 0.4)}
    subjects = [Subject(f"{group} 0", group, seed=0) for group in truths]
    for i, condition in enumerate(conditioned.conditions):
        entries, rows = [], []
        for subject in subjects:
            about = {"run": subject.label, "step": 4}
            entry = Subject(f"{subject.label} step 4", f"{subject.label} step 4", about=about)
            entries.append(entry)
            for prompt, difference in {"a": 0.01, "b": -0.01}.items():
                value = truths[subject.group][i] + difference
                rows.append(entry.row("truth", value, item=prompt))
        conditioned.results[condition.label] = Result("clip_scores", entries, rows=rows)
    rows = [row for subject in subjects for row in conditioned.rows(subject, {})]
    changes = {(row.group, row.item): row.value for row in rows if row.metric == "change_truth"}
    assert changes == {
        ("LoRA", "guidance 4 (int8)"): pytest.approx(-0.2),
        ("LoRA", "guidance 4 (5 steps)"): pytest.approx(-0.1),
        ("Bi-LoRA", "guidance 4 (int8)"): pytest.approx(-0.05),
        ("Bi-LoRA", "guidance 4 (5 steps)"): pytest.approx(-0.1),
    }
    result = Result(
        "sweep",
        subjects,
        samples.METRICS,
        "LoRA",
        {"experiment": "x", "seeds": [0], "scores": conditioned.settings()},
        rows=rows,
        summaries=compare.summaries(rows, "LoRA"),
    )
    text = "\n".join(samples.sections(result))
    assert "## change of ground truth, guidance 4, step 4" in text
    assert "| variant | int8 | 5 steps |" in text
    assert "| Bi-LoRA | -5.00 (+15.00 [n/a], 1/1) | -10.00 (" in text
    assert "| variant | plain | int8 | 5 steps |" in text
    assert "| LoRA | 50.00 | 30.00 | 40.00 |" in text
    sentence = "sampled in each condition: plain; int8 (base_precision int8); 5 steps ("
    assert sentence in samples.introduction(result)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "pictures_duotone --variants LoRA;Lora",
            '--variants has "Lora": choose from LoRA; Bi-LoRA; LoRA-SAM.',
        ),
        ("pictures_duotone --guidances best:4", '"best:4" is not a kind of guidance'),
        ("pictures_duotone --guidances 2:4", '"2:4" is not a kind of guidance'),
        ("pictures_duotone --guidances base:2,0:2", "in a list more than once"),
        ("pictures_duotone --steps a", "is not a list of numbers: write whole numbers"),
        ("lora_bilora --steps 4", "it has no scores, but --steps belongs to scores"),
        ("lora_bilora --processes 1", "--processes is for sampling"),
        ("lora_bilora --variants X", '--variants has "X"'),
    ],
)
def test_a_wrong_argument_is_refused_in_one_sentence(words, sentence, tmp_path, capsys):
    name, *flags = words.split()
    exit_code = sweep.main(
        [str(EXPERIMENTS / f"{name}.yaml"), *flags, "--output_dir", str(tmp_path)]
    )
    assert exit_code == 2
    assert sentence in capsys.readouterr().err


def test_scores_of_a_text_experiment_are_refused(tmp_path):
    path = tmp_path / "text.yaml"
    content = {"recipe": str(ROOT / "recipes" / "trec.yaml"), "script": "train_text_bilora.py"}
    path.write_text(json.dumps({**content, "scores": SCORES}))
    with pytest.raises(UserError, match="scores are for images"):
        load(path)


def common_settings(result):
    return {name: result.settings[name] for name in ("recipe", "options", "scores")}


def test_runs_that_are_not_comparable_with_recorded_ones_are_refused():
    record = Record(ICONS, "sweep")
    assert record.result is not None
    entries = record.result.subjects
    settings = common_settings(record.result)
    first = entries[0]
    planned = [Run(first.label, first.group, first.seed or 0, ())]
    record.require_alike(settings, planned)
    assert list(record.subjects) == [entry.label for entry in entries]

    scores = {**settings["scores"], "steps": [1000]}
    with pytest.raises(UserError, match=r"has a result with scores.steps \[100, 300, 500, 1000\]"):
        record.require_alike({**settings, "scores": scores}, planned)
    # The same variant and seed with another hash of options in its name
    other_runs = [Run("lora-seed0-0", first.group, first.seed or 0, ())]
    with pytest.raises(UserError, match=f"has LoRA with seed 0 .*{first.label}"):
        record.require_alike(settings, other_runs)
    # A result with losses but without scores
    losses = Record(ROOT / "results" / "methods", "sweep")
    with pytest.raises(UserError, match="has a result with"):
        losses.require_alike(settings, planned)


def test_an_extended_result_lists_the_differences_in_its_provenance():
    record = Record(ICONS, "sweep")
    assert record.result is not None
    recorded = record.result.provenance
    assert recorded is not None
    later = replace(recorded, commit="0" * 40, command="python -m eval.sweep")
    assert record.provenance(later, is_extended=False) == recorded
    extended = record.provenance(later, is_extended=True)
    assert extended.command == later.command
    assert extended.commit == recorded.commit
    assert extended.differing == ["commit"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [("pictures_duotone", "pictures_duotone"), ("guided_target", "guided_target_icons")],
)
def test_recorded_runs_match_the_experiment(name, folder):
    """Otherwise no seed or variant could be added to the published result."""
    result = table.read(ROOT / "results" / folder)
    recorded = {entry.label: (entry.group, entry.seed) for entry in result.subjects}
    (sweep_plan,) = load(EXPERIMENTS / f"{name}.yaml")
    planned = {run.name: (run.variant, run.seed) for run in sweep_plan.runs}
    common = recorded.keys() & planned.keys()
    assert {recorded[run] for run in common} >= {("LoRA", 0)}
    assert all(recorded[run] == planned[run] for run in common)
    scores = sweep_plan.experiment.scores
    assert scores is not None
    settings = {"recipe": "mini.yaml", "options": sweep_plan.experiment.options}
    settings["scores"] = scoring.Scoring(scores, ROOT).settings()
    assert common_settings(result) == settings


def test_a_sweep_with_only_recorded_runs_leaves_the_result_unchanged(tmp_path, capsys):
    (tmp_path / "result").mkdir()
    for name in (table.FILE, table.ROWS, table.SUMMARY):
        (tmp_path / "result" / name).write_bytes((ICONS / name).read_bytes())
    words = [str(EXPERIMENTS / "pictures_icons.yaml"), "--variants", "LoRA"]
    words += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "result")]
    assert sweep.main(words) == 0
    for name in (table.ROWS, table.SUMMARY):
        assert (tmp_path / "result" / name).read_bytes() == (ICONS / name).read_bytes()
    recorded, result = table.read(ICONS), table.read(tmp_path / "result")
    # Recorded variants that the command does not name are kept.
    assert set(result.groups) == set(recorded.groups)
    assert result.provenance == recorded.provenance
    line = result.summary("Bi-LoRA", "truth", "guidance 4", step=1000)
    assert line.mean is not None
    assert line.difference is not None
    assert f"{100 * line.mean:.2f} ({100 * line.difference:+.2f} [" in capsys.readouterr().out


def test_a_run_that_lacks_a_checkpoint_to_sample_is_refused(tmp_path):
    scoring.require_checkpoints(tmp_path / "new", [500, 2000])
    (tmp_path / "checkpoints" / "step-2000").mkdir(parents=True)
    scoring.require_checkpoints(tmp_path, [2000, 4000])
    with pytest.raises(UserError, match="has no checkpoint of step 500: remove that folder"):
        scoring.require_checkpoints(tmp_path, [500, 2000])


def test_a_gpu_with_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(scoring.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(scoring.torch.cuda, "mem_get_info", lambda: (1, 24e9))
    scoring.require_memory(20)
    with pytest.raises(UserError, match=r"samples with 38 GB of weights, .* this GPU has 24 GB"):
        scoring.require_memory(38)


def test_the_regret_of_a_rule_is_the_best_steps_score_minus_the_chosen_steps_score():
    rules = step_rules
    # Step 20 is the best on all captions, the loss is lowest at step 10, and the last step is 30.
    low = [0.5] * 16
    high = [0.75] * 16
    truths = {10: low, 20: high, 30: low}
    # A loss at a step without a checkpoint is ignored.
    regrets = rules.regrets(truths, {10: 1.0, 15: 0.5, 20: 2.0, 30: 3.0})
    assert regrets == {rules.LAST: 0.25, rules.BY_CAPTIONS: 0.0, rules.BY_LOSS: 0.25}
    # Each of the two parts has every second caption, and the best step differs between them.
    misled = {10: [0.9, 0.5] * 8, 20: [0.5, 0.9] * 8}
    assert rules.regrets(misled, {})[rules.BY_CAPTIONS] == pytest.approx(0.4)
    assert rules.BY_LOSS not in rules.regrets(misled, {10: 1.0})
    assert rules.regrets({1: [0.5] * 8}, {}) == {}
    # As for prompts without held-out pictures
    assert rules.regrets({}, {}) == {}
    # Captions beyond the last whole part are ignored.
    longer = {step: [*values, 99.0 * step] for step, values in misled.items()}
    assert rules.regrets(longer, {}) == rules.regrets(misled, {})


def test_the_report_for_prompts_without_pictures_has_no_ground_truth(tmp_path):
    """An example is SDXL with the paper's prompts, whose ground truth is unknown."""
    result = table.read(ICONS)
    rows = [row for row in result.rows if row.metric in ("i2t", "nearest")]
    lines = [line for line in result.summaries if line.metric in ("i2t", "nearest")]
    result = replace(result, rows=rows, summaries=lines)
    assert samples.guidance_labels(result) == ["guidance 4", "base's guidance 2"]
    text = "\n".join(samples.sections(result))
    assert "## CLIP I2T, base's guidance 2" in text
    assert "## ground truth" not in text
    assert "Which step?" not in text
    samples.draw_fronts(result, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").is_file()


def test_a_result_without_rows_has_no_samples():
    result = Result("sweep", settings={"scores": {"steps": [1]}})
    assert samples.guidance_labels(result) == []
    assert samples.curve_panels(result) == []
