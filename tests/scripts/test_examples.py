"""What examples/ holds, as a person would start it, on small models and data on the disk."""

import importlib
import json
import re

import nbformat
import pytest
import torch
from accelerate.state import AcceleratorState
from nbclient import NotebookClient
from peft import PeftModel
from safetensors.torch import load_file

from bilora_diffusion.adapters import AUXILIARY, PRIMARY
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.integrations import scripts
from examples.demo_text import main
from tests.contract.models import tiny_llm, tiny_t5
from tests.integrations.trainers import tiny_tokenizer
from tests.scripts.runs import ROOT, run_python, words
from tests.text.text_builders import save_llama

pytestmark = pytest.mark.slow

TRAINER = "trainer_bilora"
TEXT = {"text": "w3 w4 w5 w6 w7"}


def model_and_data(folder, model, columns):
    """Flags for a model and 24 rows."""
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


def start(name, values):
    AcceleratorState._reset_state(True)
    importlib.import_module(f"examples.{name}").main(flags(values))


@pytest.mark.parametrize("name", [TRAINER, "seq2seq_bilora", "sft_bilora"])
def test_an_example_leaves_an_adapter(name, tmp_path, capsys):
    """The Trainer example also resumes exactly."""
    run = tmp_path / "run"
    values = {"output_dir": run, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    answer = "w9 w10"
    model = tiny_llm()
    columns = TEXT
    if name == "seq2seq_bilora":
        model = tiny_t5()
        columns = {"input": TEXT["text"], "target": answer}
        values |= {"held_out": 4, "predict_with_generate": True, "generation_max_length": 6}
    elif name == "sft_bilora":
        pytest.importorskip("trl")
        columns = {"prompt": TEXT["text"], "completion": answer}
    values |= model_and_data(tmp_path, model, columns)
    start(name, values)
    assert PeftModel.from_pretrained(model, str(run))
    stdout = capsys.readouterr().out
    if name == "seq2seq_bilora":
        assert "held-out loss" in stdout
        assert len((run / "predictions.jsonl").read_text().splitlines()) == 4
    if name == TRAINER:
        assert "the auxiliary ended at 0.0500" in stdout
        file = run / "adapter_model.safetensors"
        weights = load_file(file)
        file.unlink()
        start(name, {**values, "resume_from_checkpoint": run / "checkpoint-2"})
        assert all(torch.equal(value, weights[key]) for key, value in load_file(file).items())


REFUSED = [
    ("", "--model smollm2 --data"),
    ("--model smollm2", "required: --data"),
    ("--model a --data b --max_stepss 1", '"--max_steps"'),
    ("--model minilm --data DATA", "trains causal"),
    ("--model smollm2 --data DATA --column texts", 'did you mean "text"'),
    ("--model smollm2 --data DATA --resume_from_checkpoint a", "no folder"),
]


@pytest.mark.parametrize(("line", "part"), REFUSED)
def test_what_an_example_is_given_wrong_is_one_sentence(line, part, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(TEXT))
    argv = line.replace("DATA", str(data)).split()
    with pytest.raises(UserError, match=re.escape(part)) as error:
        importlib.import_module(f"examples.{TRAINER}").main(argv)
    assert "\n" not in str(error.value)


def test_prompts_without_completions_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}))
    example = importlib.import_module("examples.sft_bilora")
    with pytest.raises(UserError, match="none of the name completion"):
        example.main(["--model", "smollm2", "--data", str(rows)])


def test_without_a_gpu_an_example_trains_in_fp32(monkeypatch):
    config = pytest.importorskip("trl").SFTConfig
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    arguments = importlib.import_module("examples.sft_bilora").Arguments
    _, args = scripts.parse(arguments, config, ["--model", "a", "--data", "b"], "")
    assert not args.bf16


def test_two_processes_take_the_steps_of_one(tmp_path):
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
    # Each adapter has left zero, or the comparison would prove nothing.
    state = load_file(double_run / "checkpoint-4" / "bilora_state.safetensors")
    for adapter in (PRIMARY, AUXILIARY):
        ends = [v.abs().max() for k, v in state.items() if "lora_B" in k and adapter in k]
        assert max(ends) > 1e-4, adapter


SHORT_DEMO = (
    "--max_train_steps 2 --max_train_samples 8 --train_batch_size 1 --max_eval_samples 2"
    " --max_predictions 1 --generation_max_new_tokens 8"
)


def test_it_trains_and_shows_answers_before_and_after(tmp_path, capsys):
    folder = tmp_path / "demo"
    model = save_llama(tmp_path / "model", chat=True)
    argv = f"--output_dir {folder} --model_name_or_path {model} {SHORT_DEMO}".split()
    assert main(argv) == 0
    stdout = capsys.readouterr().out
    for part in ("Question:", "Before:", "After:", "Wanted:", "loss per token", "right answers"):
        assert part in stdout
    assert (folder / "adapter_model.safetensors").exists()
    for step in (0, 2):
        assert (folder / "validation" / f"step-{step}" / "predictions.jsonl").exists()


NOTEBOOK = ROOT / "examples" / "miniature.ipynb"
SHORT = 'shared += " --max_train_steps 8 --validation_loss_steps 8 --max_eval_samples 8"\n'


def test_the_notebook_shows_curves_and_icons_of_both_methods(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a notebook draws into its page
    for name in ("recipes", "train_dreambooth_bilora.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training_cell,) = (cell for cell in notebook.cells if "shared = (" in cell.source)
    training_cell.source = training_cell.source.replace("runs = ", f"{SHORT}runs = ")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    stdout = ""
    pictures = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            stdout += output.get("text", "")
            pictures += "image/png" in output.get("data", {})
    lowest = dict(re.findall(r"^(LoRA|Bi-LoRA): lowest held-out loss (0\.\d+)$", stdout, re.M))
    assert lowest.keys() == {"LoRA", "Bi-LoRA"}
    assert all(0 < float(loss) < 0.12 for loss in lowest.values())  # the base model's is 0.12
    assert pictures == 3
