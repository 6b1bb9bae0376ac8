"""``eval.landscape`` on real runs of two steps: their losses and the spaces of their weights."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilora_diffusion.run import runlog
from eval.landscape.points import load, open_points
from eval.landscape.surface import evaluate
from eval.subjects import gather
from tests.scripts.runs import train, two_icons

pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pissa": {"method": "lora", "init_lora_weights": "pissa", "lora_alpha": 6},
    "text": {"method": "lora", "train_text_encoder": True},
    "full": {"method": "full"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train two-step runs on two icons, measured on two others."""
    root = tmp_path_factory.mktemp("landscape")
    shared = {**two_icons(root), "train_batch_size": 1, "gradient_accumulation_steps": 1}
    for name, options in VARIANTS.items():
        train(root / name, seed=0, **shared, **options)
    return root


@pytest.fixture
def opened(runs):
    """Return a function that loads a run's model by name, with all training images and levels."""

    def load_run(name):
        (point,) = open_points(gather([str(runs / name)], weights=True)).values()
        return load(point, ("lora", "full"))

    return load_run


@pytest.mark.parametrize("name", VARIANTS)
def test_the_loss_over_all_images_and_levels_equals_the_recorded_loss(runs, opened, name):
    logged = runlog.read_run(runs / name)["results"]["train_grid_loss"]
    model = opened(name)
    assert evaluate(model.loss.terms) == pytest.approx(logged, rel=1e-5)
    assert ("lora" in model.spaces) == (name != "full")


def test_the_spaces_hold_the_trained_factors_and_the_weights_of_their_layers(runs, opened):
    spaces = opened("lora").spaces
    factors = spaces["lora"]
    full = spaces["full"]
    names = {weight.name for weight in full}
    assert {weight.name.rpartition(".lora_")[0] for weight in factors} < names
    assert len(factors) == 112  # A and B of 56 layers
    assert len(names) == len(full)
    assert {weight.tensor.shape[weight.filter_dim] for weight in factors} == {4}
    # The factors are as trained; the file's B includes the scale, alpha / rank = 8 / 4 = 2.
    stored = load_file(runs / "lora" / "pytorch_lora_weights.safetensors")
    assert torch.equal(factors[0].tensor, stored[f"{factors[0].name}.weight"])
    assert torch.equal(2 * factors[1].tensor, stored[f"{factors[1].name}.weight"])
    pissa = opened("pissa").spaces["lora"]
    assert len(pissa) == 112
    assert pissa[0].tensor.shape[0] == 8  # rank 4, and another 4 for the initial values
    text = {weight.name.split(".")[0] for weight in opened("text").spaces["full"]}
    assert text == {"unet", "text_encoder", "text_encoder_2"}
