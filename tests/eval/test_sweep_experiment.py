"""An experiment file and its plan: variants, axes, seeds, folder names."""

import pytest

from bilora_diffusion.config.command_line import read_options
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import ROOT
from eval.sweep.experiment import parse
from eval.sweep.plan import load

EXPERIMENTS = sorted((ROOT / "eval" / "experiments").rglob("*.yaml"))
MEASURED = [path for path in EXPERIMENTS if path.parent.name == "experiments"]


@pytest.fixture
def plan(tmp_path):
    """Return ``plan(text, recipe, ...)``: the plan of an experiment, from the text of each file."""

    def load_text(text="", recipe="", *settings, **keys):
        (tmp_path / "recipe.yaml").write_text(f"dataset: mini\n{recipe}")
        path = tmp_path / "experiment.yaml"
        path.write_text(f"recipe: {tmp_path / 'recipe.yaml'}\n{text}")
        (sweep_plan,) = load(path, settings, keys)
        return sweep_plan

    return load_text


def labels(sweep_plan):
    return [variant.label for variant in sweep_plan.variants]


def test_the_product_is_ordered_by_seed_and_skips_options_that_a_method_ignores(plan, caplog):
    sweep_plan = plan(
        "axes: {method: [lora, bilora], rank: [2, 4], rho: [0.1, 1]}\nseeds: 0..1\n"
        "options: {lr_scheduler: constant_with_warmup}"
    )
    bilora = [
        "method=bilora, rank=2, rho=0.1",
        "method=bilora, rank=2, rho=1",
        "method=bilora, rank=4, rho=0.1",
        "method=bilora, rank=4, rho=1",
    ]
    # LoRA ignores rho, so it has one variant for each rank.
    assert labels(sweep_plan) == ["method=lora, rank=2", "method=lora, rank=4", *bilora]
    assert [run.seed for run in sweep_plan.runs] == [0] * 6 + [1] * 6
    scheduler = "--lr_scheduler=constant_with_warmup"
    assert sweep_plan.runs[0].flags == (scheduler, "--method=lora", "--rank=2", "--seed=0")
    assert len({run.name for run in sweep_plan.runs}) == 12
    assert sweep_plan.runs[6].name.startswith("method-lora-rank-2-seed1-")
    warnings = [message for message in caplog.messages if "no warm-up" in message]
    assert len(warnings) == 1  # for all six variants


def test_variants_are_read_and_the_control_is_found_by_label(plan):
    text = (
        "variants:\n  LoRA: {method: lora}\n  Bi-LoRA: {use-dora: true, cache_latents: true}\n"
        "  plain:\nseeds: [7, 3]"
    )
    sweep_plan = plan(text)
    assert labels(sweep_plan) == ["LoRA", "Bi-LoRA", "plain"]
    assert (sweep_plan.seeds, sweep_plan.control) == ((7, 3), "LoRA")
    # use_dora takes a word and cache_latents is a switch; YAML reads true for both.
    assert sweep_plan.runs[1].flags == ("--use_dora=yes", "--cache_latents=yes", "--seed=7")
    assert plan(f"{text}\ncontrol: plain").control == "plain"
    with pytest.raises(UserError, match=r'is not a variant \(did you mean "LoRA"\?\)'):
        plan(f"{text}\ncontrol: LoR")
    changed = plan(text, "", "rank=2", seeds="0,4..5", metric="loss")
    assert (changed.seeds, changed.experiment.metric) == ((0, 4, 5), "loss")
    assert "--rank=2" in changed.runs[0].flags
    assert plan("", "seed: 9").seeds == (9,)


def test_a_folders_name_depends_on_the_options_that_affect_the_run(plan):
    def name(recipe="", text=""):
        return plan(text, recipe).runs[0].name

    assert name("rank: 4") == name("# only a comment")  # 4 is the default
    assert name("num_validation_images: 0\noutput_dir: elsewhere") == name()  # the same training
    names = {
        name(),
        name("rank: 8"),
        name("validation_loss_steps: 5"),
        name("", "options: {max_train_steps: 7}"),
    }
    assert len(names) == 4


REFUSED = {
    "recipes: x": r'no key "recipes" \(did you mean "recipe"\?\)',
    "axes: {rho: 1}": '"axes.rho" can\'t be',
    "variants: {a: [1]}": '"variants.a" can\'t be',
    "options: {seed: 1}": "options: an option sets the seed: give seeds",
    "variants: {a: {output_dir: x}}": "output_dir, which the sweep itself sets",
    "seeds: 4..1": '"4..1" is not a list of numbers: write a..b with a <= b',
    "seeds: 0..99999": "at most 10000",
    "seeds: [1, 1]": "give 1 only once",
    "axes: {rank: [2, 2]}": "more than once",
    "axes: {rank: [2, 4]}\nvariants: {a: {rank: 8}}": '"rank" is an axis and is also set elsewhere',
    "options: {validation_dataset: none, validation_loss_steps: 0}": "would have no heldout_loss",
    "variants: {odd: {method: lorra}}": 'in the variant "odd": .*did you mean "lora"',
    "script: nowhere.py": 'no script "nowhere.py"',
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_bad_experiment_is_refused(text, plan):
    with pytest.raises(UserError, match=f"experiment.yaml: .*{REFUSED[text]}"):
        plan(text)


def test_the_repositorys_experiments_can_be_read_and_their_recipes_exist():
    for path in EXPERIMENTS:
        content = read_options(path, "the experiment", "the command line")
        recipes = parse(content, {}).recipe
        if isinstance(recipes, str):
            recipes = [recipes]
        for recipe in recipes:
            assert (ROOT / recipe).is_file()


def measured_experiments():
    """Yield the published experiments; those with slowly generated data run only for a release."""
    for path in MEASURED:
        # This one downloads its pictures; see tests/scripts/test_benchmarks.py.
        if path.stem == "peft_cat":
            continue
        mark = pytest.mark.matrix if "gsm" in path.stem else pytest.mark.slow
        yield pytest.param(path, marks=mark, id=path.stem)


@pytest.mark.parametrize("path", measured_experiments())
def test_a_published_experiment_compares_variants_or_guidances(path, hub):
    """The training script parses all options. `tests/docs/test_paper.py` tests the paper's runs."""
    (plan,) = load(path)
    scores = plan.experiment.scores
    assert len(plan.variants) > 1 or (scores is not None and len(scores.guidances) > 1)
