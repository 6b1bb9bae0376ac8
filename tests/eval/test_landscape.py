"""eval.landscape from runs to result, with a known loss; the cache of measurements."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion.image.config import resolve
from bilora_diffusion.run.runlog import RunLog
from eval import landscape
from eval.landscape import points, surface
from eval.landscape.surface import Weight
from tests.eval.commands import result_of
from tests.scripts.runs import flags, two_icons

NAMES = ["lora-0", "lora-1", "bilora-0", "bilora-1"]
CURVATURES = {"lora": 0.4, "bilora": 0.3, "full": 1.0, None: 0.5}  # by method
TINY = ["--points", "5", "--grid", "3", "--directions", "2", "--ascent_steps", "1"]


def icons_run(folder, images, method="lora", seed=0, **options):
    """Write a run on these images as training does, with arbitrary weights."""
    log = RunLog(folder)
    config = resolve(flags(folder, **images)).to_dict()
    log.start(config | options, method=method, seed=seed, resume_step=None)
    log.close("finished", steps=2)
    # Only the hash of the weights is used, so it is enough that it depends on seed and method.
    weights = {
        "unet.mid_block.to_q.lora_A.weight": torch.full((2, 4), float(seed)),
        "unet.mid_block.to_q.lora_B.weight": torch.full((4, 2), float(len(method))),
    }
    file = folder / "pytorch_lora_weights.safetensors"
    if method == "full":
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.parent.mkdir()
    save_file(weights, file)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write a folder with the runs in NAMES and a run of full fine-tuning."""
    root = tmp_path_factory.mktemp("landscape")
    images = {**two_icons(root), "validation_dataset": "none"}
    for name in NAMES:
        method, _, seed = name.partition("-")
        icons_run(root / name, images, method, int(seed))
    icons_run(root / "full", images, "full")
    return root


@pytest.fixture
def loaded_labels(monkeypatch):
    """Replace each model with the loss 1 + c ||W - 1||^2 / 2; the list gets each loaded label.

    W is (2, 1). The curvature c is the method's in CURVATURES, plus 0.01 times the seed.
    """
    labels = []

    def load(point, spaces, *_, **__):
        subject = point.subject
        labels.append(subject.label)
        curvature = CURVATURES[subject.method] + 0.01 * (subject.seed or 0)
        W = torch.ones(2, 1, dtype=torch.float64)

        def terms():
            return [1 + curvature * (W - 1).square().sum() / 2]

        weights = {space: [Weight("W", W)] for space in spaces}
        return SimpleNamespace(spaces=weights, loss=SimpleNamespace(terms=terms))

    monkeypatch.setattr(points, "load", load)
    return labels


def measure(out, *words):
    return result_of(landscape.main, out, *words, *TINY)


@pytest.mark.slow
def test_runs_are_summarized_by_space_and_paired_by_seed(runs, tmp_path, loaded_labels):
    names = [*NAMES, "full"]
    folders = [runs / name for name in names]
    result = measure(tmp_path, *folders, "base", "--rho", "0.1")
    assert result.groups == ["LoRA", "Bi-LoRA", "Full FT", "base"]
    assert loaded_labels == [entry.label for entry in result.subjects] == [*names, "base"]
    # The two filters of W have norm 1, and those of a direction have the same norms. Positions go
    # up to 1 in the space "lora" and up to 0.3 in "full". The mean curvature of two seeds is 0.305.
    for space, step in (("lora", 1), ("full", 0.3)):
        line = result.summary("Bi-LoRA", "rise", space)
        assert line.mean == pytest.approx(0.305 * step**2)
        assert line.difference == pytest.approx(-0.1 * step**2)
        assert (line.control, line.lower, line.pairs) == ("LoRA", 2, 2)
        assert result.summary("LoRA", "rise", space).pairs == 0  # pyright: ignore
    assert result.summary("base", "rise", "lora") is None
    profile = [row.value for row in result.select("profile", "LoRA", "lora")]
    positions = np.array([-1, -0.5, 0, 0.5, 1])
    first_seed, second_seed = 1 + 0.40 * positions**2, 1 + 0.41 * positions**2
    # Each seed has a line in each of two directions.
    expected = [first_seed, first_seed, second_seed, second_seed]
    assert profile == pytest.approx(np.concatenate(expected))
    # Only the first seed of a group has a plane.
    assert {row.subject for row in result.select("plane")} == {"lora-0", "bilora-0", "full", "base"}
    assert len(result.select("plane", "LoRA", "full")) == 9
    assert str(runs) not in (tmp_path / "result.json").read_text()
    assert result.figures == ["landscape.png", "landscape_grid.png"]
    for name in result.figures:
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_a_cached_measurement_is_not_repeated(runs, tmp_path, loaded_labels, monkeypatch):
    measure_line = surface.line
    calls = 0

    def interrupted_line(*arguments):
        """Raise KeyboardInterrupt at the second line of the profile."""
        nonlocal calls
        if len(arguments) == 4:  # a line of a plane has a fifth argument, its offset
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
        return measure_line(*arguments)

    monkeypatch.setattr(surface, "line", interrupted_line)
    words = [str(runs / "lora-0"), "--space", "lora"]
    assert landscape.main([*words, *TINY, "--output_dir", str(tmp_path)]) == 130
    assert not (tmp_path / "result.json").exists()
    first = measure(tmp_path, *words)
    assert calls == 3  # the first direction was cached
    loaded_labels.clear()
    assert measure(tmp_path, *words).rows == first.rows
    assert (calls, loaded_labels) == (3, [])
    # Another seed has other directions, but the same loss at the weights themselves.
    second_seed = measure(tmp_path, *words, "--seed", "1")
    assert second_seed.select("loss") == first.select("loss")
    assert (calls, loaded_labels) == (5, ["lora-0"])
