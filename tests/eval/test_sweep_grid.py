"""From a sweep's command line to its cells: products, named arms, arms that are the same run."""

from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.files import ROOT
from eval.sweep import axes
from eval.sweep.grid import Grid, Planner, Variant, open_script

RECIPE = ROOT / "recipes" / "mini.yaml"
SCRIPT = "train_dreambooth_bilora.py"


def grid(*over, arms=None, recipe=RECIPE, **fields):
    planner = Planner(recipe, open_script(SCRIPT), **fields)
    return planner.grid(axes.axes(over), arms or {})


def labels(found):
    return [arm.label for arm in found.variants]


def test_the_product_comes_seed_by_seed():
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


def test_what_is_remarked_on_all_cells_is_said_once(caplog):
    grid("method=lora,bilora", "seed=0..1", shared={"lr_scheduler": "constant_with_warmup"})
    (remark,) = caplog.messages
    assert "no warm-up" in remark


def test_what_is_the_same_run_is_one_arm():
    found = grid("seed=0..2", "rho=0.01,0.05", arms={"LoRA": {"method": "lora"}, "": {}})
    assert labels(found) == ["LoRA", "rho=0.01", "rho=0.05"]  # LoRA does not read rho
    assert found.cells[0].flags == ("--method=lora", "--seed=0")
    assert len(found.cells) == 9
    spelled_out = {"method": "bilora", "rank": 4, "lora_alpha": 8.0, "rho": 0.05}
    arms = {"Bi-LoRA": {"method": "bilora"}, "spelled out": spelled_out, "smaller": {"rank": 2}}
    also = {arm.label: arm.also for arm in grid("seed=0", arms=arms).variants}
    assert also == {"Bi-LoRA": ("spelled out",), "smaller": ()}


def test_a_folders_name_tells_what_is_run(tmp_path):
    def name(text, **fields):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"dataset: mini\n{text}")
        return grid("seed=0", recipe=recipe, **fields).cells[0].name

    first = name("rank: 4\n")
    assert first == name("# only a comment\n")  # 4 is the default
    assert first == name("num_validation_images: 0\noutput_dir: elsewhere\n")  # learns the same
    assert first != name("rank: 8\n")
    assert first != name("validation_loss_steps: 5\n")  # has other points to compare
    assert first != name("rank: 4\n", shared={"max_train_steps": "7"})


UNMEASURED = {"validation_dataset": "none", "validation_loss_steps": "0"}
REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (["seed"], {}, 'has "seed": write name=value'),
    (["rho=1", "rho=2"], {}, 'gives "rho" twice'),
    (["seed=0..99999"], {}, "at most 10000 values"),
    (["rank=2,4"], {"arms": {"a": {"rank": 8}}}, '"rank" is an axis of --over and set'),
    (["seed=0"], {"shared": UNMEASURED}, "would have no heldout_loss"),
    ([], {"arms": {"odd": {"method": "lorra"}}}, r'did you mean "lora"'),
]


@pytest.mark.parametrize(("over", "fields", "told"), REFUSED)
def test_a_bad_grid_is_refused(over, fields, told):
    with pytest.raises(UserError, match=told):
        grid(*over, **fields)


def test_axes_and_arms_are_read(tmp_path):
    assert axes.axes(["method=lora,bilora", "seed=0..2,7", "rho=0.1", "learning-rate=1e-3"]) == {
        "method": ["lora", "bilora"],
        "seed": ["0", "1", "2", "7"],
        "rho": ["0.1"],
        "learning_rate": ["1e-3"],
    }
    file = tmp_path / "arms.yaml"
    file.write_text(
        "lora: {method: lora}\nDoRA: {use-dora: true}\noff: {use_dora: false}\nplain:\n"
    )
    arms = axes.load_variants(file)
    assert arms == {
        "lora": {"method": "lora"},
        "DoRA": {"use_dora": True},
        "off": {"use_dora": False},
        "plain": {},
    }
    del arms["plain"]  # which is the same run as "off"
    arms["off"]["cache_latents"] = True  # an option of words, which YAML makes true
    assert [cell.flags[:-1] for cell in grid("seed=0", arms=arms).cells] == [
        ("--method=lora",),
        ("--use_dora=yes",),
        ("--use_dora=no", "--cache_latents=yes"),
    ]
    assert labels(grid("use_dora=on,off")) == ["use_dora=on", "use_dora=off"]


def test_the_control_is_found_by_label():
    lora = {"method": "lora"}
    arms = (
        Variant("lora", lora, also=("same",)),
        Variant("lora + DoRA", {**lora, "use_dora": True}),
        Variant("bilora, rho=0.1", {"method": "bilora", "rho": "0.1"}),
    )
    found = Grid(arms, (0,), ())
    assert found.control(None) is arms[0]
    for word, number in {"lora + DoRA": 1, "same": 0, "bilora, rho=0.1": 2}.items():
        assert found.control(word) is arms[number]
    with pytest.raises(UserError, match=r'is none of the variants \(did you mean "lora"\?\)'):
        found.control("lor")
