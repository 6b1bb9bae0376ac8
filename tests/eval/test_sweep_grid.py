"""From a sweep's command line to its cells: products, named arms, arms that are the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion import methods
from bilora_diffusion.errors import UserError
from eval import axes
from eval.grid import Arm, Grid, Planner, open_script, to_flags
from eval.provenance import ROOT

RECIPE = ROOT / "recipes" / "mini.yaml"
SCRIPT = "train_dreambooth_bilora.py"


@pytest.fixture(autouse=True)
def options_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, of which one reads what concerns the auxiliary."""
    own = frozenset({"rho", "rho_norm", "auxiliary_rank"})
    read = {"lora": frozenset[str](), "bilora": own}
    monkeypatch.setattr(methods, "reads", read.__getitem__)
    monkeypatch.setattr(methods, "option_names", lambda: own)


def grid(
    *over: str, arms: dict[str, dict[str, Any]] | None = None, recipe: Path = RECIPE, **fields: Any
) -> Grid:
    planner = Planner(recipe, open_script(SCRIPT), **fields)
    return planner.grid(axes.axes(over), arms or {})


def labels(found: Grid) -> list[str]:
    return [arm.label for arm in found.arms]


def test_an_axis_is_a_list_or_a_range() -> None:
    assert axes.axes(["method=lora,bilora", "seed=0..2,7", "rho=0.1", "learning-rate=1e-3"]) == {
        "method": ["lora", "bilora"],
        "seed": ["0", "1", "2", "7"],
        "rho": ["0.1"],
        "learning_rate": ["1e-3"],
    }


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("seed", 'has "seed": write name=value'),
        ("seed=", 'has "seed=": write name=value'),
        ("seed=4..0", "a <= b"),
        ("rho=0.1,,0.2", "write v1,v2"),
        ("rho=0.1,0.1", "0.1 twice"),
        ("seed=0..2,1", "1 twice"),
        ("output_dir=here,there", "which the sweep decides"),
    ],
)
def test_a_bad_axis_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        axes.axes([word])


def test_an_axis_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match='gives "rho" twice'):
        axes.axes(["rho=1", "rho=2"])


def test_the_product_comes_seed_by_seed() -> None:
    found = grid("method=lora,bilora", "seed=0..1", "rank=2,4")
    assert labels(found) == [
        "method=lora, rank=2",
        "method=lora, rank=4",
        "method=bilora, rank=2",
        "method=bilora, rank=4",
    ]
    assert found.seeds == (0, 1)
    assert [cell.seed for cell in found.cells] == [0] * 4 + [1] * 4
    assert found.cells[0].flags == ("--method=lora", "--rank=2", "--seed=0")
    assert len({cell.name for cell in found.cells}) == 8
    assert found.cells[5].name.startswith("method-lora-rank-4-seed1-")


def test_an_option_that_a_method_does_not_read_makes_no_arm() -> None:
    found = grid("method=lora,bilora", "seed=0..2", "rho=0.01,0.05,0.1")
    assert labels(found) == [
        "method=lora",
        "method=bilora, rho=0.01",
        "method=bilora, rho=0.05",
        "method=bilora, rho=0.1",
    ]
    assert found.cells[0].flags == ("--method=lora", "--seed=0")
    assert len(found.cells) == 12


def test_the_same_run_is_one_arm_under_several_names() -> None:
    found = grid(
        "seed=0",
        arms={
            "Bi-LoRA": {"method": "bilora"},
            "spelled out": {"method": "bilora", "rank": 4, "lora_alpha": 8.0, "rho": 0.05},
            "smaller": {"rank": 2},
        },
    )
    assert [(arm.label, arm.also) for arm in found.arms] == [
        ("Bi-LoRA", ("spelled out",)),
        ("smaller", ()),
    ]


def test_named_arms_are_multiplied_with_axes() -> None:
    arms = {"LoRA": {"method": "lora"}, "Bi-LoRA": {"method": "bilora"}}
    found = grid("seed=0..1", "rho=0.1,0.2", arms=arms)
    assert labels(found) == ["LoRA", "Bi-LoRA, rho=0.1", "Bi-LoRA, rho=0.2"]


def test_without_an_axis_of_seeds_the_recipes_seed_counts(tmp_path: Path) -> None:
    recipe = tmp_path / "seven.yaml"
    recipe.write_text("dataset: mini\nseed: 7\n")
    found = grid(recipe=recipe)
    assert (labels(found), found.seeds) == (["seven"], (7,))
    assert grid("rank=2,4", shared={"seed": "3"}).seeds == (3,)


def test_a_folders_name_tells_what_is_run(tmp_path: Path) -> None:
    def name(text: str, **fields: Any) -> str:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"dataset: mini\n{text}")
        return grid("seed=0", recipe=recipe, **fields).cells[0].name

    first = name("rank: 4\n")
    assert first == name("# only a comment\n")  # 4 is the default
    assert first == name("num_validation_images: 0\noutput_dir: elsewhere\n")  # learns the same
    assert first != name("rank: 8\n")
    assert first != name("validation_loss_steps: 5\n")  # has other points to compare
    assert first != name("rank: 4\n", launch=["--num_processes", "2"])
    assert first != name("rank: 4\n", shared={"max_train_steps": "7"})


def test_an_edited_recipe_is_no_finished_run() -> None:
    shorter = grid("method=lora,bilora", "seed=0", shared={"max_train_steps": "2"})
    names = {cell.name for cell in shorter.cells}
    assert names.isdisjoint(cell.name for cell in grid("method=lora,bilora", "seed=0").cells)
    assert shorter.cells[0].flags[0] == "--max_train_steps=2"


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"learning_rat": 1}, r'in the arm "odd": unknown flag .* \(did you mean "--learning_rate'),
        ({"rho": -1, "method": "bilora"}, 'in the arm "odd": --rho is -1'),
        ({"method": "lorra"}, r'did you mean "lora"'),
        ({"rank": "many"}, "give a whole number"),
        ({"use_dora": "maybe"}, "give True or False"),
    ],
)
def test_a_cell_that_the_script_would_refuse_is_refused(arm: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        grid("seed=0..1", arms={"fine": {}, "odd": arm})


@pytest.mark.parametrize(
    ("over", "fields", "sentence"),
    [
        (["rank=2,4"], {"shared": {"rank": "8"}}, '"rank" is an axis of --over and set elsewhere'),
        (["rank=2,4"], {"arms": {"a": {"rank": 8}}}, '"rank" is an axis of --over and set'),
        (["seed=a"], {}, 'seed is "a": give whole numbers'),
        (["seed=-1"], {}, "--seed is -1"),
        (
            ["seed=0"],
            {"shared": {"validation_dataset": "none", "validation_loss_steps": "0"}},
            "would have no heldout_loss",
        ),
    ],
)
def test_a_bad_grid_is_refused(over: list[str], fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        grid(*over, **fields)


def test_booleans_are_bare_flags_or_say_false() -> None:
    booleans = frozenset({"use_dora", "random_flip"})
    values = {"use_dora": "true", "random_flip": False, "cache_latents": True, "rank": 4}
    assert to_flags(values, booleans) == (
        "--use_dora",
        "--random_flip=False",
        "--cache_latents=yes",
        "--rank=4",
    )
    assert {"use_dora", "gradient_checkpointing"} <= open_script(SCRIPT).booleans
    found = grid("seed=0", arms={"with": {"use_dora": True}, "without": {"use_dora": False}})
    assert len(found.arms) == 2


def test_a_script_that_is_missing_is_refused() -> None:
    with pytest.raises(UserError, match=r'did you mean "train_dreambooth_bilora.py"'):
        open_script("train_dreambooth_bilor.py")


def test_arms_are_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("lora: {method: lora}\nlora + DoRA: {method: lora, use-dora: true}\nplain:\n")
    assert axes.load_arms(file) == {
        "lora": {"method": "lora"},
        "lora + DoRA": {"method": "lora", "use_dora": True},
        "plain": {},
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[", "is not valid YAML in line 1"),
        ("lora: {rank: 1, rank: 2}", "twice"),
        ("", "holds no arms"),
        ("lora: fast", '"lora" is not a mapping'),
        ("lora: {rank: [2, 4]}", '"lora" is not a mapping of options to single values'),
        ("lora: {seed: 3}", "the same for all arms"),
        ("lora: {output_dir: here}", "the same for all arms"),
    ],
)
def test_a_bad_arms_file_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        axes.load_arms(tmp_path / "arms.yaml")
    with pytest.raises(UserError, match=r"none.yaml\" of --arms is not there"):
        axes.load_arms(tmp_path / "none.yaml")


def test_the_control_is_found_by_label_or_option() -> None:
    lora = {"method": "lora"}
    arms = (
        Arm("lora", lora, also=("same",)),
        Arm("lora + DoRA", {**lora, "use_dora": True}),
        Arm("bilora, rho=0.1", {"method": "bilora", "rho": "0.1"}),
    )
    found = Grid(arms, (0,), ())
    assert found.control(None) is arms[0]
    assert found.control("lora + DoRA") is arms[1]
    assert found.control("same") is arms[0]
    assert found.control("method=lora") is arms[0]  # exactly that, and nothing more
    assert found.control("use_dora=true") is arms[1]
    assert found.control("method=bilora") is arms[2]
    with pytest.raises(UserError, match=r'is none of the arms \(did you mean "lora"\?\)'):
        found.control("lor")
    with pytest.raises(UserError, match="is none of the arms"):
        found.control("method=full")
    with pytest.raises(UserError, match='fits "lora \\+ DoRA", "lora2": give the label of one'):
        Grid((arms[1], Arm("lora2", {**lora, "rank": 2})), (0,), ()).control("method=lora")
