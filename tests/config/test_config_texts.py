"""Texts and places on a command line that are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from bilora_diffusion.config import parse, parse_text
from bilora_diffusion.errors import UserError

BYTES = os.fsdecode(b"caf\xe9")  # as Python hands over an argument in Latin-1
MINI = ["--dataset", "mini"]
TEXT = ["--model_name_or_path", "google-t5/t5-base"]


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--instance_prompt", BYTES], ["--instance_prompt", "no text"]),
        (["--validation_prompts", "fine", BYTES], ["--validation_prompts", "no text"]),
        (["--output_dir", f"runs/{BYTES}"], ["--output_dir", "no text"]),
        (["--output_dir", "a\0b"], ["--output_dir", "no text"]),
        (["--dataset", "x" * 300], ["--dataset_name", "name too long"]),
        (["--pretrained_model_name_or_path", "./" + "x" * 5000], ["name too long"]),
        (["--dataset", "~no-such-user/icons"], ["~no-such-user", "no such user"]),
        (["--validation_prompts", "{tmp}/latin.txt"], ["latin.txt", "UTF-8"]),
        (["--validation_prompts", "{tmp}/zero.txt"], ["zero.txt", "NUL"]),
    ],
)
def test_no_text_is_refused(argv: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    (tmp_path / "zero.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError) as caught:
        parse([*MINI, *(word.replace("{tmp}", str(tmp_path)) for word in argv)])
    message = str(caught.value)
    message.encode()
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_a_prompt_may_be_longer_than_a_file_name() -> None:
    prompt = "a TOK icon of a frog, " * 20
    assert parse([*MINI, "--validation_prompts", prompt]).validation_prompts == [prompt]


@pytest.mark.parametrize("option", ["--train_file", "--validation_file"])
def test_rows_are_not_read_from_a_pipe(option: str, tmp_path: Path) -> None:
    good, pipe = tmp_path / "good.jsonl", tmp_path / "pipe.jsonl"
    good.write_text('{"input": "a", "output": "b"}\n')
    os.mkfifo(pipe)
    files = {"--train_file": str(good), option: str(pipe)}
    with pytest.raises(UserError, match=f"{option} .*pipe.jsonl.* regular file"):
        parse_text([*TEXT, *(word for pair in files.items() for word in pair)])


def test_captions_beside_images_stand_in_for_a_prompt(tmp_path: Path) -> None:
    argv = ["--instance_data_dir", str(tmp_path), "--pretrained_model_name_or_path", "mini"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"no prompt: .*--instance_prompt.*\.txt"):
        parse(argv)
    (tmp_path / "a.txt").write_text("a square")
    config = parse(argv)
    assert (config.instance_prompt, config.caption_column) == (None, None)
