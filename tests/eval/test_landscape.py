"""eval.landscape from runs to result, on a loss that is known; what it caches."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bilora_diffusion.image.config import resolve
from bilora_diffusion.run.runlog import RunLog
from eval import landscape, landscape_surface, table
from eval import landscape_points as points
from eval.landscape_surface import Weight
from tests.scripts.runs import flags, two_icons

NAMES = [f"{method}-{seed}" for method in ("lora", "bilora") for seed in range(2)]
TINY = ["--points", "5", "--grid", "3", "--directions", "2", "--ascent_steps", "1"]


def icons_run(folder, images, method="lora", seed=0, **options):
    """A run on these images as training leaves it, with weights that nothing was learned in."""
    log = RunLog(folder)
    config = resolve(flags(folder, **images)).to_dict()
    log.start(config | options, method=method, seed=seed, resume_step=None)
    log.close("finished", steps=2)
    factors = {"A": torch.full((2, 4), float(seed)), "B": torch.full((4, 2), float(len(method)))}
    file = folder / "pytorch_lora_weights.safetensors"
    if method == "full":
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.parent.mkdir()
    save_file({f"unet.mid_block.to_q.lora_{k}.weight": v for k, v in factors.items()}, file)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("landscape")
    images = {**two_icons(root), "validation_dataset": "none"}
    for name in NAMES:
        icons_run(root / name, images, name[:-2], int(name[-1]))
    icons_run(root / "full", images, "full")
    return root


def curvature(point):
    return {"lora": 0.4, "bilora": 0.3, None: 0.5}.get(point.subject.method, 1.0) + 0.01 * (
        point.subject.seed or 0
    )


@pytest.fixture
def loaded(monkeypatch):
    """Models whose loss is 1 + curvature ||W - 1||^2 / 2 for two weights; the labels loaded."""
    labels = []

    def load(point, spaces, *_, **__):
        labels.append(point.subject.label)
        tensor = torch.ones(2, 1, dtype=torch.float64)

        def terms():
            return [1 + curvature(point) * (tensor - 1).square().sum() / 2]

        weights = {space: [Weight("W", tensor)] for space in spaces}
        return SimpleNamespace(spaces=weights, loss=SimpleNamespace(terms=terms))

    monkeypatch.setattr(points, "load", load)
    return labels


def look(runs, out, *words):
    arguments = [str(runs / word) if (runs / word).is_dir() else word for word in words]
    assert landscape.main([*arguments, *TINY, "--output_dir", str(out)]) == 0
    return table.read(out)


def test_runs_are_summed_up_by_space_and_compared_by_seed(runs, tmp_path, loaded):
    result = look(runs, tmp_path, *NAMES, "full", "base", "--rho", "0.1")
    assert result.groups == ["LoRA", "Bi-LoRA", "Full FT", "base"]
    assert loaded == [entry.label for entry in result.subjects] == [*NAMES, "full", "base"]
    for space in ("lora", "full"):
        line = result.summary("Bi-LoRA", "rise", space)
        # two filters of norm 1, moved by 1 and by 0.3
        step = {"lora": 1, "full": 0.3}[space]
        assert line.mean == pytest.approx(0.305 * step**2)
        assert line.difference == pytest.approx(-0.1 * step**2)
        assert (line.control, line.lower, line.pairs) == ("LoRA", 2, 2)
        assert result.summary("LoRA", "rise", space).pairs == 0  # pyright: ignore
    assert result.summary("base", "rise", "lora") is None
    profile = [row.value for row in result.select("profile", "LoRA", "lora")]
    expected = []
    for seed in range(2):
        expected += 2 * [1 + (0.4 + 0.01 * seed) * t**2 for t in (-1, -0.5, 0, 0.5, 1)]
    assert profile == pytest.approx(expected)
    assert {row.subject for row in result.select("plane")} == {"lora-0", "bilora-0", "full", "base"}
    assert len(result.select("plane", "LoRA", "full")) == 9
    assert str(runs) not in (tmp_path / "result.json").read_text()
    assert result.figures == ["landscape.png", "landscape_grid.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in result.figures)


def test_a_measurement_is_cached_and_not_repeated(runs, tmp_path, loaded, monkeypatch):
    line, calls = landscape_surface.line, 0

    def interrupted(*words):
        nonlocal calls
        if len(words) == 5:  # a line of the plane has an offset
            return line(*words)
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return line(*words)

    monkeypatch.setattr(landscape_surface, "line", interrupted)
    words = ["lora-0", "--space", "lora"]
    arguments = [str(runs / "lora-0"), *words[1:], *TINY, "--output_dir", str(tmp_path)]
    assert landscape.main(arguments) == 130
    assert not (tmp_path / "result.json").exists()
    first = look(runs, tmp_path, *words)
    assert calls == 3  # the first direction was cached
    del loaded[:]
    assert look(runs, tmp_path, *words).rows == first.rows
    assert (calls, loaded) == (3, [])
    second_seed = look(runs, tmp_path, *words, "--seed", "1")
    assert second_seed.select("loss") == first.select("loss")
    assert (calls, loaded) == (5, ["lora-0"])
