"""What is measured, and which runs are repeats of one another."""

import importlib
import json
import re
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from eval.subjects import by_group, gather, paired
from tests.run import recorded_runs


def test_groups_by_setting(tmp_path):
    def run(name: str, method: str, seed: int, **config: object) -> str:
        return str(recorded_runs.make(tmp_path / name, method, seed, steps=(), config=config))

    plain = [run(f"b{seed}", "bilora", seed) for seed in (1, 0)]
    fast = run("fast", "bilora", 0, auxiliary_learning_rate=1e-2)
    # rho plays no part in LoRA, nor does where a run lies
    lora = [run(f"l{i}", "lora", i, rho=0.1 * i + 0.1, output_dir=str(i)) for i in range(2)]
    found = by_group(gather([*plain, fast, *lora]))
    assert {label: [run.seed for run in runs] for label, runs in found.items()} == {
        "Bi-LoRA (auxiliary_learning_rate=0.001)": [0, 1],
        "Bi-LoRA (auxiliary_learning_rate=0.01)": [0],
        "LoRA": [0, 1],
    }
    assert [run.label for run in found["LoRA"]] == ["l0", "l1"]
    named = gather([lora[0]], [f"mine = {plain[0]},{plain[1]}"])
    assert [run.group for run in named] == ["LoRA", "mine", "mine"]
    assert gather(plain)[0].group == "Bi-LoRA"
    namesakes = [run(f"{seed}/run", "lora", seed) for seed in range(2)]
    assert [found.label for found in gather(namesakes)] == ["run", "run-2"]
    other = run("again", "bilora", 0)
    for words, groups, sentence in (
        ([*plain, other], [], "are both seed 0"),
        ([], [f"x={plain[0]},{lora[1]}"], "mixes bilora and lora"),
        ([lora[0]], [f"LoRA={lora[1]}"], 'two groups are called "LoRA"'),
    ):
        with pytest.raises(UserError, match=sentence):
            gather(words, groups)


def test_runs_are_paired_by_the_digests_of_their_inputs(tmp_path):
    runs = [
        recorded_runs.make(tmp_path / f"{m}{s}", m, s, steps=(1, 2))
        for m in ("lora", "bilora")
        for s in range(2)
    ]
    lone = recorded_runs.make(tmp_path / "sam", "lora-sam", 5, steps=(1, 2))
    words = [str(path) for path in (*runs, lone)]
    same = {"LoRA": None, "Bi-LoRA": True, "LoRA-SAM": None}
    assert paired(gather(words), "LoRA") == same
    file = runs[3] / "metrics.jsonl"
    file.write_text(file.read_text().replace('"digest": "1-', '"digest": "other-'))
    assert paired(gather(words), "LoRA") == same | {"Bi-LoRA": False}
    file.write_text(re.sub('"digest": "[^"]*"', '"digest": null', file.read_text()))
    assert paired(gather(words), "LoRA") == same | {"Bi-LoRA": False}


DAMAGED: list[tuple[str, str, Any]] = [
    *((name, "run.json", {"config": None}) for name in ("clip_scores", "landscape", "text_scores")),
    ("dynamics", "run.json", {"seed": "x"}),
    ("dynamics", "metrics.jsonl", "[" * 100_000),
    ("generalization", "metrics.jsonl", '{"step": 1, "heldout_loss": "x"}'),
]


@pytest.mark.parametrize(("command", "file", "content"), DAMAGED)
def test_a_damaged_run_ends_a_command_in_one_sentence(tmp_path, capsys, command, file, content):
    run = recorded_runs.make(tmp_path / "run", "bilora", losses={0: (1.0, 1.0), 10: (0.5, 0.5)})
    if file == "run.json":
        content = json.dumps(json.loads((run / file).read_text()) | content)
    else:
        content = (run / file).read_text() + f"{content}\n"
    (run / file).write_text(content)
    words = [str(run), "--output_dir", str(tmp_path / "out")]
    words += ["--benchmarks", "heldout"] if command == "text_scores" else []
    assert importlib.import_module(f"eval.{command}").main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert f"{run / file} is " in error
    assert error.count("\n") == 1
