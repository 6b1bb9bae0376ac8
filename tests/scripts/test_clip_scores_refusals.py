"""What `python -m eval.clip_scores` refuses, and how it ends when it is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eval.clip_scores import ClipScores, main

LORA = "pytorch_lora_weights.safetensors"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["RUN", "--prompt", "x"], ['"--prompt"', 'did you mean "--prompts"']),
        *((["RUN", "--seeds", seeds], [f'"{seeds}"']) for seeds in ("0,x", "-1", "3..1", "0,1,0")),
        (["RUN", "--prompts", "nowhere.txt"], ['"nowhere.txt"', "3d_icon"]),
        (["RUN", "--control", "LoRa"], ['"LoRa"', 'did you mean "LoRA"']),
        *(
            (["RUN", f"--{flag}", "0"], [f"--{flag} is 0"])
            for flag in ("batch_size", "processes", "max_prompts", "lanes", "grid_prompts")
        ),
        (["RUN", "--num_inference_steps", "two"], ["'two'"]),
        (["RUN", "--adapter_scale", "nan"], ["--adapter_scale", "nan"]),
        (["RUN", "--resolution", "65"], ["--resolution", "65", "multiple of 8"]),
        (["RUN", "--dtype", "int8"], ["'int8'"]),
        (["RUN", "--scorer", "clip"], ['"clip"', "open_clip:MODEL/TAG"]),
        (["RUN", "--captioner", "blipp:x"], ['"blipp:x"', "blip:ID_OR_FOLDER"]),
        (["RUN", "--captioner_revision", "v1"], ['"v1"']),
        (
            ["RUN", "--captioner_revision", "v1", "--skip_captions"],
            ["--captioner_revision", "--skip_captions"],
        ),
        (["RUN", "--train_data", "./nowhere"], ['"./nowhere"']),
        (["RUN", "--device", "cuda:99"], ['"cuda:99"']),
        (["RUN", "--output_dir", "file"], ["--output_dir", "file"]),
        ([], ["demo/lora", "make demo"]),
        (["unfinished"], ["unfinished", LORA]),
        (["base"], ["--base_model"]),
        (["RUN", "--base_model", SDXL], [SDXL, "mini"]),
        (["base", "--base_model", SDXL, "--scorer", "embedded"], ["--scorer embedded", SDXL]),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_made(
    words: list[str],
    shown: list[str],
    scored_runs: Path,
    tiny_models: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = scored_runs / "demo" / "lora"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "unfinished").mkdir()
    shutil.copyfile(lora / "run.json", tmp_path / "unfinished" / "run.json")
    models = [] if "embedded" in words or not words else tiny_models
    argv = [word.replace("RUN", str(lora)) for word in words]
    output = [] if "--output_dir" in words else ["--output_dir", "out"]
    capsys.readouterr()
    assert main([*models, *output, *argv]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert all(word in told for word in shown), told
    assert {path.name for path in tmp_path.iterdir()} == {"file", "unfinished"}


def test_an_interrupt_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ClipScores, "work", interrupted)
    assert main(["base"]) == 130
    assert capsys.readouterr().err.startswith("interrupted: the same command goes on")
