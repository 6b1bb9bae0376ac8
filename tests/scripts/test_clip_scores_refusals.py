"""What `python -m eval.clip_scores` refuses, and how it ends when it is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval import clip_scores

LORA = "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--prompt", "x"], 'unexpected "--prompt" (did you mean "--prompts"?)'),
        (["--seeds", "0,one"], '--seeds is "0,one"'),
        (["--seeds", "-1"], '--seeds is "-1"'),
        (["--seeds", "3..1"], '--seeds is "3..1"'),
        (["--seeds", "0,1,0"], "has a seed twice"),
        (["--prompts", "nowhere.txt"], 'no prompt set and no file "nowhere.txt"'),
        (["--prompts", "3d_icons"], 'did you mean "3d_icon"?'),
        (["--control", "LoRa"], 'did you mean "LoRA"?'),
        (["--batch_size", "0"], "--batch_size is 0: give 1 or more"),
        (["--processes", "0"], "--processes is 0"),
        (["--max_prompts", "0"], "--max_prompts is 0"),
        (["--num_inference_steps", "two"], "invalid int value: 'two'"),
        (["--adapter_scale", "nan"], "--adapter_scale is nan"),
        (["--resolution", "65"], "--resolution is 65: give a multiple of 8"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--scorer", "clip"], 'scorer "clip" is unknown'),
        (["--captioner", "blipp:x"], 'captioner "blipp:x" is unknown'),
        (["--scorer_revision", "v1"], 'revision "v1" has no effect on the folder'),
        (["--captioner_revision", "v1"], 'revision "v1" has no effect on the folder'),
        (["--captioner_revision", "v1", "--skip_captions"], "drop it or --skip_captions"),
        (["--train_data", "./nowhere"], 'there is no folder "./nowhere"'),
        (["--device", "cuda:99"], '--device "cuda:99" is not there'),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(
    change: list[str],
    sentence: str,
    scored_runs: Path,
    tiny_models: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    argv = [
        str(scored_runs / "demo" / "lora"),
        *tiny_models,
        "--output_dir",
        str(output),
        *change,
    ]
    refused(argv, sentence, capsys)
    assert list(tmp_path.iterdir()) == []


def refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert clip_scores.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1


def test_without_demo_runs_it_says_to_make_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused([], "run `make demo` first", capsys)
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_are_none_are_refused(
    scored_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = scored_runs / "demo" / "lora"
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copyfile(lora / "run.json", unfinished / "run.json")
    refused([str(unfinished)], f"is a run without {LORA}", capsys)
    refused([str(tmp_path / "nothing")], "there is no run folder and no file", capsys)
    refused([f"a={lora}", f"a={lora}"], 'the label "a" is given twice', capsys)
    refused(["base"], "give --base_model", capsys)
    (tmp_path / "file").touch()
    refused([str(lora), "--output_dir", str(tmp_path / "file")], "is a file: give a folder", capsys)


def test_the_embedded_models_are_for_the_miniature_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--scorer", "--captioner"):
        argv = ["base", "--base_model", "stabilityai/stable-diffusion-xl-base-1.0", flag]
        output = ["--output_dir", str(tmp_path / "out")]
        refused(
            [*argv, "embedded", *output], f"{flag} embedded knows the miniature's icons", capsys
        )


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clip_scores, "score", interrupted)
    assert clip_scores.main(["base"]) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command goes on")
