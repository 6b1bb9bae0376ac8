"""The scripts of `examples/`, on small local models and data.

`tests/methods/test_minimal.py` runs `examples/minimal.py`.
"""

import importlib
import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.integrations import scripts
from tests.contract.models import tiny_llm, tiny_t5
from tests.integrations.trainers import tiny_tokenizer
from tests.scripts.runs import ROOT, error_sentence, run_python, words
from tests.text.text_builders import save_llama

pytestmark = pytest.mark.slow

TRAINER, SFT, SEQ2SEQ = "4_trainer", "5_sft", "6_seq2seq"
TEXT = {"text": "w3 w4 w5 w6 w7"}


def model_and_data(folder, model, columns):
    """Save a model and 24 rows of data, and return the flags that name them."""
    for part in (model, tiny_tokenizer()):
        part.save_pretrained(folder / "model")
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for n in range(24):
            row = {key: f"w{3 + n} {value}" for key, value in columns.items()}
            file.write(json.dumps(row) + "\n")
    return {"model": folder / "model", "data": data}


def flags(values):
    shared = {"use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
    return words({**shared, **values})


def example(name):
    return importlib.import_module(f"examples.{name}")


def start(name, values):
    AcceleratorState._reset_state(True)
    example(name).main(flags(values))


def test_the_photograph_example_trains_and_samples_before_and_after(tmp_path, capsys):
    run = tmp_path / "run"
    two_steps = "--max_train_steps 2 --validation_dataset none --num_validation_images 0"
    assert example("1_photographs").main(["--output_dir", str(run), *two_steps.split()]) == 0
    assert "before_and_after.png" in capsys.readouterr().out
    assert (run / "pytorch_lora_weights.safetensors").exists()
    with Image.open(run / "before_and_after.png") as picture:
        assert picture.size == (128, 128)  # two columns of 64 pixels, for two prompts
        before = picture.crop((0, 0, 128, 64))
        assert before.tobytes() != picture.crop((0, 64, 128, 128)).tobytes()


def test_missing_photographs_give_one_sentence(tmp_path, capsys):
    argv = ["--photographs", str(tmp_path / "photos"), "--output_dir", str(tmp_path / "run")]
    assert example("1_photographs").main(argv) == 2
    assert "photos" in error_sentence(capsys.readouterr().err)


def test_the_loop_example_trains_both_methods(capsys):
    example("3_own_loop").main(["--steps", "1"])
    head, lora, bilora = capsys.readouterr().out.splitlines()[-3:]
    assert head.endswith("at 0")
    # The last column is the loss before the first step, where both methods equal the base model.
    assert lora.split()[-1] == bilora.split()[-1]


@pytest.mark.parametrize("name", [TRAINER, SEQ2SEQ, SFT])
def test_a_trainer_example_saves_an_adapter(name, tmp_path, capsys):
    """The Trainer example also resumes exactly."""
    run = tmp_path / "run"
    values = {"output_dir": run, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    answer = "w9 w10"
    model = tiny_llm()
    columns = TEXT
    if name == SEQ2SEQ:
        model = tiny_t5()
        columns = {"input": TEXT["text"], "target": answer}
        values |= {"held_out": 4, "predict_with_generate": True, "generation_max_length": 6}
    elif name == SFT:
        pytest.importorskip("trl")
        columns = {"prompt": TEXT["text"], "completion": answer}
    values |= model_and_data(tmp_path, model, columns)
    start(name, values)
    assert PeftModel.from_pretrained(model, str(run))
    stdout = capsys.readouterr().out
    if name == SEQ2SEQ:
        assert "held-out loss" in stdout
        assert len((run / "predictions.jsonl").read_text().splitlines()) == 4
    if name == TRAINER:
        assert "norm of the auxiliary: 0.0500" in stdout
        file = run / "adapter_model.safetensors"
        weights = load_file(file)
        file.unlink()
        start(name, {**values, "resume_from_checkpoint": run / "checkpoint-2"})
        assert all(torch.equal(value, weights[key]) for key, value in load_file(file).items())


REFUSED = [
    ("", "--model smollm2 --data"),
    ("--model smollm2", "required: --data"),
    ("--model a --data b --max_stepss 1", '"--max_steps"'),
    ("--model minilm --data DATA", "trains causal models"),
    ("--model smollm2 --data DATA --column texts", 'did you mean "text"'),
    ("--model smollm2 --data DATA --resume_from_checkpoint a", "not a folder"),
]


@pytest.mark.parametrize(("line", "part"), REFUSED)
def test_a_wrong_argument_gives_one_sentence(line, part, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(TEXT))
    argv = line.replace("DATA", str(data)).split()
    with pytest.raises(UserError, match=re.escape(part)) as error:
        example(TRAINER).main(argv)
    assert "\n" not in str(error.value)


def test_prompts_without_completions_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}))
    with pytest.raises(UserError, match="no column completion"):
        example(SFT).main(["--model", "smollm2", "--data", str(rows)])


def test_without_a_gpu_an_example_trains_in_fp32(monkeypatch):
    config = pytest.importorskip("trl").SFTConfig
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = example(SFT).Arguments
    _, args = scripts.parse(arguments, config, ["--model", "a", "--data", "b"], "")
    assert not args.bf16


@pytest.mark.matrix
def test_two_processes_train_like_one(tmp_path):
    common = {
        **model_and_data(tmp_path, tiny_llm(), TEXT),
        "max_steps": 4,
        "save_steps": 4,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",  # not AdamW, which amplifies rounding where gradients are small
        "learning_rate": 1.0,
        "max_grad_norm": 0.1,
    }
    single_run = tmp_path / "one"
    start(TRAINER, {**common, "output_dir": single_run, "per_device_train_batch_size": 4})
    double_run = tmp_path / "two"
    argv = flags({**common, "output_dir": double_run, "per_device_train_batch_size": 2})
    run_python([ROOT / "examples" / f"{TRAINER}.py", *argv], processes=2)

    for name in ("adapter_model.safetensors", "bilora_state.safetensors"):
        single = load_file(single_run / "checkpoint-4" / name)
        double = load_file(double_run / "checkpoint-4" / name)
        for key, value in single.items():
            assert (double[key] - value).abs().max() < 1e-5, key
    # If an adapter were still zero, the comparison would prove nothing.
    state = load_file(double_run / "checkpoint-4" / "bilora_state.safetensors")
    for adapter in (PRIMARY, AUXILIARY):
        ends = [v.abs().max() for k, v in state.items() if "lora_B" in k and adapter in k]
        assert max(ends) > 1e-4, adapter


SHORT_DEMO = (
    "--max_train_steps 2 --max_train_samples 8 --train_batch_size 1 --max_eval_samples 2"
    " --max_predictions 1 --generation_max_new_tokens 8"
)


def test_the_text_example_prints_answers_before_and_after(tmp_path, capsys):
    folder = tmp_path / "demo"
    model = save_llama(tmp_path / "model", chat=True)
    argv = f"--output_dir {folder} --model_name_or_path {model} {SHORT_DEMO}".split()
    assert example("2_text").main(argv) == 0
    stdout = capsys.readouterr().out
    for part in ("Question:", "Before:", "After:", "Expected:", "loss per token", "correct"):
        assert part in stdout
    assert (folder / "adapter_model.safetensors").exists()
    for step in (0, 2):
        assert (folder / "validation" / f"step-{step}" / "predictions.jsonl").exists()
