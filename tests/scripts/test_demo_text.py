"""The text demo on a small model; `make demo` is about the real one."""

import pytest

from examples.demo_text import main
from tests.text.text_builders import save_llama

FLAGS = (
    *("--max_train_steps", "2", "--max_train_samples", "8", "--train_batch_size", "1"),
    *("--max_eval_samples", "2", "--max_predictions", "1", "--generation_max_new_tokens", "8"),
)


@pytest.mark.slow
def test_it_trains_and_shows_answers_before_and_after(tmp_path, capsys):
    folder, model = tmp_path / "demo", save_llama(tmp_path / "model", chat=True)
    argv = ["--output_dir", str(folder), "--model_name_or_path", str(model), *FLAGS]
    assert main(argv) == 0
    said = capsys.readouterr().out
    for part in ("Problem:", "Before:", "After:", "Wanted:", "####", "Held-out loss per token"):
        assert part in said
    assert (folder / "adapter_model.safetensors").exists()
    for step in (0, 2):
        assert (folder / "validation" / f"step-{step}" / "predictions.jsonl").exists()
