"""Folders below the viewer's root: the scan, broken folders, and paths that leave the root."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from app import catalog as catalogs
from app import parts, results, validation
from app.catalog import DEPTH, Catalog
from app.page import heading_html
from app.runs import choose_pair, sort_runs
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.demo import write_result
from bilora_diffusion.image.validation import INDEX
from bilora_diffusion.run.console import scoring_command
from tests.app.folders import WEIGHTS, make_images, make_result, make_run, make_scores


def paths(catalog):
    return [run.path for run in catalog.scan.runs]


def test_a_scan_finds_runs_and_results_but_skips_checkpoints_and_very_deep_folders(tmp_path):
    make_run(tmp_path / "b" / "lora")
    make_run(tmp_path / "a", method="bilora", status="running")
    deep = tmp_path.joinpath(*"cdefghij"[:DEPTH])
    for folder in (deep, deep / "x", tmp_path / "env" / "run"):
        make_run(folder)
    (tmp_path / "env" / "pyvenv.cfg").touch()  # a virtual environment
    for name in ("checkpoints", ".hidden", "site-packages"):
        make_run(tmp_path / name / "run")
    make_scores(tmp_path / "scores")
    make_result(tmp_path / "flat")
    scan = Catalog(tmp_path).scan
    assert [(run.path, run.method, run.status, run.weights) for run in scan.runs] == [
        ("a", "bilora", "running", f"a/{WEIGHTS}"),
        ("b/lora", "lora", "finished", f"b/lora/{WEIGHTS}"),
        ("c/d/e/f/g/h", "lora", "finished", f"c/d/e/f/g/h/{WEIGHTS}"),
    ]
    assert [item.file("images/0.png") for item in scan.scores] == ["scores/images/0.png"]
    landscape, clip_scores = scan.results
    assert (landscape.kind, landscape.figures) == ("landscape", ["flat/figure.png"])
    assert (clip_scores.kind, clip_scores.figures) == ("clip_scores", [])
    assert scan.broken == []
    (run,) = Catalog(tmp_path / "a").scan.runs
    assert (run.path, run.name, run.weights) == (".", "a (Bi-LoRA, seed 0)", WEIGHTS)


def test_the_name_of_a_run_begins_with_its_folder(tmp_path):
    make_run(tmp_path / "dog")
    make_run(tmp_path / "tries" / "dog", method="bilora")
    make_run(tmp_path / "e", method="of the future", seed=3)
    make_run(tmp_path / "f", seed=None)
    make_run(tmp_path / "g", config={"guided_target": 1.5})
    assert [run.name for run in Catalog(tmp_path).scan.runs] == [
        "dog (LoRA, seed 0)",
        "e (of the future, seed 3)",
        "f (LoRA)",
        "g (LoRA, guided target 1.5, seed 0)",
        "tries/dog (Bi-LoRA, seed 0)",
    ]


def test_the_first_pair_has_the_same_data_or_else_the_same_prompts(tmp_path):
    def make(name, method, data_hash=None, prompt="a dog", **changes):
        config = {"validation_prompts": [prompt], "num_validation_images": 1}
        run = make_run(tmp_path / name, method, **({"config": config} | changes))
        if data_hash:
            rows = f'{{"step": 0, "loss": 1}}\n{{"step": 1, "digest": "{data_hash}"}}\n'
            (run / "metrics.jsonl").write_text(rows)

    def first():
        return {run.path for run in choose_pair(Catalog(tmp_path).scan.runs)}

    assert first() == set()
    make("concepts", "bilora", "c0", prompt="a cat")
    assert first() == {"concepts"}
    make("dog", "bilora", "d0", prompt="a bird")
    make("dog-lora", "lora", "d0")
    assert first() == {"dog", "dog-lora"}
    for path in ("dog", "dog-lora", "concepts"):
        (tmp_path / path / "metrics.jsonl").unlink()
    make("other", "bilora")
    assert first() == {"other", "dog-lora"}, "the runs must have the same prompts"
    make("seed-1", "bilora", seed=1)
    assert first() == {"other", "dog-lora"}, "the runs must have the same prompts and seed"
    times = ["2026-01-02T00:00:00+00:00", "2026-01-03T00:00:00+00:00", "2026-01-04T00:00:00+00:00"]
    make("new", "bilora", "a0", started_at=times[0])
    make("new-lora", "lora", "a0", started_at=times[1])
    make("dog-2", "bilora", "d0", started_at=times[0])
    make("dog", "bilora", "d0", started_at=times[0])
    make("dog-lora", "lora", "d0")
    make("newest", "bilora", "e0", started_at=times[2])
    assert first() == {"new", "new-lora"}, "the pair must be the newest on the same data"
    config = {"validation_prompts": ["a dog"], "num_validation_images": 1, "guided_target": 1.5}
    make("new-guided", "lora", "a0", started_at=times[2], config=config)
    assert first() == {"new", "new-lora"}, "a run with another target must not be chosen"


def test_runs_without_images_are_listed_with_the_flag_that_adds_them(tmp_path):
    config = {"validation_prompts": ["a dog"], "num_validation_images": 1}
    make_images(make_run(tmp_path / "shown", config=config), 2)
    make_run(tmp_path / "going-on", config=config)
    assert validation.runs_without_images(Catalog(tmp_path)) == ""
    make_run(tmp_path / "plain", "bilora")
    text = validation.runs_without_images(Catalog(tmp_path))
    assert "plain (Bi-LoRA, seed 0)" in text
    assert "--validation_prompt" in text
    assert "going-on" not in text
    assert "shown (" not in text


def test_the_heading_counts_each_folder_once(tmp_path):
    make_run(tmp_path / "dog")
    make_scores(tmp_path / "scores")
    assert heading_html(Catalog(tmp_path)).endswith("</b> · 1 run, 1 result</p>")


def test_the_demos_picture_is_listed_as_a_result(tmp_path):
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(picture)
    write_result(picture, ["Both runs saw the same data.", "LoRA     1.0"])
    catalog = Catalog(tmp_path)
    (item,) = catalog.scan.results
    assert (item.kind, item.figures) == ("demo", ["grid.png"])
    assert not catalog.scan.broken
    assert "    LoRA     1.0" in results.read_report(catalog, item)
    assert results.figures_html(catalog, item).count("<img") == 1


def test_a_scan_detects_changes_and_does_not_read_unchanged_files_again(tmp_path, monkeypatch):
    run = make_run(tmp_path / "lora", status="running")
    catalog = Catalog(tmp_path)
    hashes = {}

    def changed_kinds():
        """Return the kinds of content that have changed since the last call."""
        catalog.refresh()
        changed = set()
        for kind in ("runs", "scores", "results"):
            content_hash = catalog.content_hash(kind)
            if content_hash != hashes.get(kind):
                changed.add(kind)
            hashes[kind] = content_hash
        return changed

    changed_kinds()
    make_run(run, status="running", wall_seconds=9.0)  # a heartbeat
    assert changed_kinds() == set()
    make_images(run, 50)
    assert changed_kinds() == {"runs"}
    assert catalog.scan.runs[0].steps == (50,)
    make_scores(tmp_path / "scores")
    assert changed_kinds() == {"scores", "results"}
    make_result(tmp_path / "landscape")
    assert changed_kinds() == {"results"}
    make_run(run, status="failed")
    assert changed_kinds() == {"runs"}
    assert catalog.scan.runs[0].status == "failed"
    make_run(tmp_path / "other")
    assert changed_kinds() == {"runs"}
    monkeypatch.setattr(catalogs, "read_run", lambda path: pytest.fail(f"{path} was read again"))
    shutil.rmtree(run)
    assert changed_kinds() == {"runs"}
    assert paths(catalog) == ["other"]


def test_commands_quote_their_paths_for_the_shell(tmp_path, monkeypatch):
    root = tmp_path / "my runs"
    for method in ("lora", "bilora"):
        make_run(root / method, method=method)
    monkeypatch.chdir(tmp_path)
    text = unescape(parts.empty_notice(Catalog(root), "", "clip_scores", "train"))
    assert "<code>python -m eval.clip_scores 'my runs/lora' 'my runs/bilora'</code>" in text
    for method in ("lora", "bilora"):
        assert f"--output_dir 'my runs'/{method}" in text
    assert text.count("--validation_prompt") == 2
    # For the demo's runs, the command is the one that the demo prints.
    heldout = "mini-duotone-heldout"
    config = {"pretrained_model_name_or_path": "mini", "validation_dataset": heldout}
    for method in ("lora", "bilora"):
        make_run(root / method, method=method, config=config)
    command = scoring_command(["my runs/lora", "my runs/bilora"], heldout)
    assert "--guidance_from base" in command
    assert command in unescape(parts.empty_notice(Catalog(root), "", "clip_scores"))
    monkeypatch.chdir(root)
    assert Catalog(root).command_path("lora") == "lora"
    # Outside the working folder, the path is absolute; on a public page it has no parent folders.
    monkeypatch.chdir("/")
    monkeypatch.setattr(Path, "cwd", lambda: Path("/elsewhere"))
    assert Catalog(root).command_path("lora") == f"{root}/lora"
    assert Catalog(root, public=True).command_path("lora") == "my runs/lora"


def test_validation_images_are_next_to_those_of_the_base_model(tmp_path):
    config = {"validation_prompts": ["a rabbit", "<b>"], "num_validation_images": 1}
    for method, steps in (("lora", (0, 50)), ("bilora", (50, 100))):
        run = make_run(tmp_path / method, method=method, config=config)
        for step in steps:
            make_images(run, step, 2)
    catalog = Catalog(tmp_path)
    runs = sort_runs(validation.runs_with_images(catalog))
    assert validation.all_steps(runs) == [50, 100]
    assert validation.first_step(runs) == 50, "the step must be the last one of both runs"
    assert validation.first_step(runs[1:]) == 100
    table = validation.images_html(catalog, runs, 50)
    assert table.count("<section") == 2
    assert table.count("<img") == 6  # two prompts by three columns
    assert "<b>" not in table
    columns = re.findall("<figcaption>([^<]*)", table)[:3]
    assert columns == ["base model", "lora (LoRA, seed 0)", "bilora (Bi-LoRA, seed 0)"]
    assert validation.images_html(catalog, runs, 100).count("no image at step 100") == 2
    # The base model's images may come from another run.
    assert "<figcaption>base model" in validation.images_html(catalog, runs[1:], 50)
    config["pretrained_model_name_or_path"] = "another"
    make_run(tmp_path / "bilora", method="bilora", config=config)
    catalog.refresh()
    runs = sort_runs(validation.runs_with_images(catalog))
    assert "base model" not in validation.images_html(catalog, runs[1:], 50)


def test_images_of_the_same_prompt_are_labeled_with_their_seeds(tmp_path):
    def make(name, first_seed):
        config = {"validation_prompts": ["a cat"], "num_validation_images": 2}
        run = make_run(tmp_path / name, config=config)
        make_images(run, 5, 2)
        entries = []
        for number in range(2):
            seed = None if first_seed is None else first_seed + number
            entries.append({"file": f"00{number}.png", "prompt": "a cat", "seed": seed})
        (run / "validation" / "step-5" / INDEX).write_text(json.dumps({"images": entries}))

    def heads(*names):
        runs = [run for run in catalog.scan.runs if run.path in names]
        table = validation.images_html(catalog, runs, 5)
        captions = re.findall("<figcaption>([^<]*)", table)
        assert re.findall("<h2>([^<]*)", table) == ["a cat"]
        return re.findall("<h3>([^<]*)", table), [text.partition(")")[2] for text in captions]

    for name, first_seed in {"a": 3, "b": 3, "c": 4, "old": None}.items():
        make(name, first_seed)
    catalog = Catalog(tmp_path)
    assert heads("a", "b") == (["seed 3", "seed 4"], [""] * 4)
    # If images side by side have different noise, each one is labeled with its seed.
    seeds = [f", image of seed {seed}" for seed in (3, 4, 4, 5)]
    assert heads("a", "c") == (["image 1", "image 2"], seeds)
    assert heads("old") == (["image 1", "image 2"], ["", ""])


def test_each_kind_of_guidance_is_a_row_and_the_ground_truth_is_a_column(tmp_path):
    prompts = ["a TOK icon of a rabbit, in the style of TOK", "no caption of an icon"]
    config = {
        "pretrained_model_name_or_path": "mini",
        "validation_dataset": "mini-duotone-heldout",
        "validation_prompts": prompts,
        "num_validation_images": 1,
    }
    entries = []
    for prompt in prompts:
        for kind, scale in (("base", 2), ("adapter", 4.5)):
            entry = {"prompt": prompt, "seed": 0, "guidance": scale, "guidance_from": kind}
            entries.append({"file": f"00{len(entries)}.png", **entry})
    for method in ("lora", "bilora"):
        run = make_run(tmp_path / method, method, config=config)
        make_images(run, 5, len(entries))
        (run / "validation" / "step-5" / INDEX).write_text(json.dumps({"images": entries}))
    catalog = Catalog(tmp_path)
    table = validation.images_html(catalog, catalog.scan.runs, 5)
    assert re.findall("<h2>([^<]*)", table) == prompts
    kinds = ["guidance from the base model, scale 2", "guidance from the adapter, scale 4.5"]
    assert re.findall("<h3>([^<]*)", table) == kinds * 2
    assert table.count("<img") == 4 * 2 + 2
    assert table.count("<figcaption>ground truth") == 2, "in both rows of the first prompt"
    image = validation.ValidationImage("x.png", "a cat", guidance_from=0.5)
    assert validation.image_labels(image) == ("", "guidance from the adapter at strength 0.5")
    # The ground truth of runs of another model is unknown.
    make_run(tmp_path / "lora", config=config | {"pretrained_model_name_or_path": "sdxl"})
    catalog.refresh()
    assert "ground truth" not in validation.images_html(catalog, catalog.scan.runs, 5)


def test_the_index_of_a_step_assigns_files_to_prompts(tmp_path):
    config = {"validation_prompts": ["a rabbit"], "num_validation_images": 1}
    make_images(make_run(tmp_path / "lora", config=config), 50, 2)
    index = tmp_path / "lora" / "validation" / "step-50" / INDEX
    entries = [{"file": "001.png", "prompt": "a cat"}, {"file": "000.png", "prompt": "a dog"}]
    index.write_text(json.dumps({"images": entries}))
    catalog = Catalog(tmp_path)

    def files():
        column = validation.read_column(catalog, catalog.scan.runs[0], 50, "")
        assert column.folder == "lora/validation/step-50"
        return {key: image.file for key, image in column.images.items()}

    assert files() == {("a cat", 0): "001.png", ("a dog", 0): "000.png"}
    # Files outside the index's folder are not used.
    index.write_text('{"images": [{"file": "../../run.json", "prompt": "a cat"}]}')
    assert files() == {}
    index.unlink()
    index.symlink_to("/etc/hostname")
    assert files() == {}


def test_broken_folders_are_listed_and_the_others_are_shown(tmp_path):
    head = '{"schema_version": 1, "kind": '
    # Folder -> file, its content, and a fragment of the reason
    broken = {
        "0": ("run.json", '{"schema_version": 1, "method": "lora"}', "status"),
        "1": ("result.json", '{"schema_version": 2, "kind": "clip_scores"}', "schema version 2"),
        "2": ("result.json", f'{head}"a", "figures": ["../x.png"]}}', "eval.a"),
        "3": ("result.json", f'{head}"sweep", "figures": ["x.png"]}}', "x.png"),
        "4\\5": ("run.json", "{}", "backslash"),
    }
    make_run(tmp_path / "good")
    for name, (file, text, _) in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    catalog = Catalog(tmp_path)
    assert paths(catalog) == ["good"]
    assert sorted(folder.path for folder in catalog.scan.broken) == list(broken)
    for folder in catalog.scan.broken:
        assert broken[folder.path][2] in folder.reason
        assert str(tmp_path) not in folder.reason


def test_paths_out_of_the_root_are_refused_and_links_inside_are_followed(tmp_path):
    outside = make_run(tmp_path / "outside")
    root = tmp_path / "root"
    inside = make_run(root / "inside")
    (root / "folder").symlink_to(outside, target_is_directory=True)
    (root / "file.json").symlink_to(outside / "run.json")
    (root / "loop").symlink_to(root / "loop")
    (root / "kept").symlink_to(inside, target_is_directory=True)
    (root / "record").mkdir()
    (root / "record" / "run.json").symlink_to(outside / "run.json")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    refused_paths = ["folder", "folder/run.json", "file.json", "record/run.json", "loop"]
    refused_paths += ["../x", "a/../../x", "/etc/passwd", "..", "a/..", "//etc"]
    refused_paths += ["a\\..\\..\\x", "a\0b"]
    for catalog in (Catalog(root), Catalog(tmp_path / "link")):
        for path in refused_paths:
            with pytest.raises(UserError, match=re.escape(repr(path))):
                catalog.resolve(path)
        assert catalog.resolve("kept/run.json") == inside.resolve() / "run.json"
        assert catalog.resolve("not/there").parent.parent == catalog.root
        assert [run.path for run in catalog.scan.runs] == ["inside"]
        assert {row.path for row in catalog.scan.broken} == {"folder", "record"}
