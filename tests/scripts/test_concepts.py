"""Runs on several concepts from the command line: resumed, paired, with class images."""

import json
import shutil
from collections import Counter

import pytest

import train_dreambooth_bilora
from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import runlog
from bilora_diffusion.run.record import BY_CONCEPT
from eval.clip_scores.measure import training_sets
from eval.landscape.points import open_points
from eval.subjects import gather
from tests.scripts.runs import column, flags, resumes_exactly, train

COUNTS = {"dog": (2, 3), "cat": (3, 1), "owl": (1, 5)}
"""Number of images and number of repeats of each concept."""


@pytest.fixture(scope="module")
def concepts(tmp_path_factory):
    """Write a list of three concepts of the miniature's icons; two of them have held-out icons."""
    root = tmp_path_factory.mktemp("concepts")
    training_icons = iter(sorted(mini.train_dir().glob("*.png")))
    heldout_icons = iter(sorted(mini.heldout_dir().glob("*.png")))
    rows = []
    for name, (count, repeats) in COUNTS.items():
        sources = {root / name: training_icons, root / f"{name}-held": heldout_icons}
        for folder, icons in sources.items():
            folder.mkdir()
            for _ in range(count):
                shutil.copy(next(icons), folder)
        row = {"dataset": str(root / name), "instance_prompt": f"a {name}", "repeats": str(repeats)}
        if name != "owl":
            row["validation_dataset"] = f"{root / name}-held"
        rows.append(row)
    rows[0]["validation_prompt"] = "a dog at sea"
    return write_list(root / "concepts.yaml", rows)


def write_list(path, rows):
    path.write_text(json.dumps(rows))  # YAML reads JSON
    return path


def values(concepts, **options):
    """Return the flags of a short run."""
    return {
        "dataset": concepts,
        "pretrained_model_name_or_path": "mini",
        "max_train_steps": 4,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "checkpointing_steps": 2,
        "random_flip": True,
        "validation_dataset": None,
        "validation_loss_steps": 2,
        **options,
    }


@pytest.mark.slow
def test_a_run_resumes_exactly_and_is_paired_and_measured_by_concept(concepts, tmp_path, caplog):
    caplog.set_level("INFO", logger="bilora_diffusion")
    image_options = {"num_validation_images": 1, "validation_num_inference_steps": 2}
    run = train(tmp_path / "run", **values(concepts, **image_options))
    assert "6 images of 3 concepts (dog 2 x 3, cat 3 x 1, owl 1 x 5)" in caplog.text
    assert "4 steps of 2 samples (0.571 epochs)" in caplog.text, "an epoch has 14 samples"

    rows = [row for row in runlog.read_metrics(run) if "heldout_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        dog_loss = row[f"{BY_CONCEPT}dog"]
        cat_loss = row[f"{BY_CONCEPT}cat"]
        # The mean over held-out images: 2 of the dog and 3 of the cat.
        assert row["heldout_loss"] == pytest.approx((2 * dog_loss + 3 * cat_loss) / 5, rel=1e-5)
        assert f"{BY_CONCEPT}owl" not in row
    assert f"{rows[-1][f'{BY_CONCEPT}cat']:.4f} at step 4" in caplog.text
    card = (run / "README.md").read_text()
    for words in ("`a dog`", "`a cat`", "`a owl`", "held-out loss of cat", "`a dog at sea`"):
        assert words in card

    lora = train(tmp_path / "lora", **values(concepts, method="lora"))
    assert column(lora, "digest") == column(run, "digest")
    subjects = gather([str(run), str(lora)], weights=True)
    for subject in subjects:
        images = training_sets(subjects, None)[subject.label]
        counts = Counter(entry.name.split("/")[0] for entry in images.entries)
        assert counts == {"dog": 2, "cat": 3, "owl": 1}  # repeats do not count
        assert len(open_points(subjects)[subject.label].images) == len(images)

    resumes_exactly(run, 2, **values(concepts, **image_options))
    changed = json.loads(concepts.read_text())
    changed[1]["repeats"] = "2"
    changed_list = write_list(tmp_path / "changed.yaml", changed)
    with pytest.raises(UserError, match="concepts was"):
        train(run, **values(changed_list, resume_from_checkpoint="latest", max_train_steps=6))


def test_a_dry_run_lists_the_concepts(concepts, tmp_path, capsys):
    argv = flags(tmp_path / "none", **values(concepts), dry_run=True)
    assert train_dreambooth_bilora.main(argv) == 0
    stdout = capsys.readouterr().out
    assert "data: 6 images of 3 concepts (dog 2 x 3, cat 3 x 1, owl 1 x 5) at 64 px" in stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.matrix
@pytest.mark.slow
def test_class_images_are_generated_for_each_concept(concepts, tmp_path):
    rows = json.loads(concepts.read_text())
    for row, name in zip(rows, COUNTS, strict=True):
        row |= {"class_data_dir": str(tmp_path / name), "class_prompt": f"a flat icon of a {name}"}
    class_list = write_list(tmp_path / "classes.yaml", rows)
    shared = {"with_prior_preservation": True, "num_class_images": 2}
    run = train(tmp_path / "run", **values(class_list, **shared, checkpointing_steps=1))
    images = set()
    for name in COUNTS:
        class_images = [file.read_bytes() for file in (tmp_path / name).glob("*.png")]
        assert len(class_images) == 2
        images.update(class_images)
    assert len(images) == 6
    resumes_exactly(run, 3, **values(class_list, **shared, checkpointing_steps=1))
    kept_run = train(tmp_path / "kept", **values(class_list, prior_prediction_weight=1.0))
    assert column(kept_run, "loss") != column(run, "loss")
