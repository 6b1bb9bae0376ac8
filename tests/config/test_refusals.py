"""Command lines that can't be honoured: one sentence each, with the value and the fix."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion import BiLoRAConfig, mini
from bilora_diffusion.config.refusals import Refusal, refused, table
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import option_of, options_of
from bilora_diffusion.image.config import DreamBoothConfig, resolve
from bilora_diffusion.methods import names
from bilora_diffusion.text.config import TextConfig

Read = Callable[[Sequence[str]], Any]
CONFIGS: dict[Any, tuple[Read, list[str]]] = {
    DreamBoothConfig: (resolve, ["--dataset", "mini"]),
    TextConfig: (TextConfig.resolve, ["--model_name_or_path", "gpt2", "--task", "sst2"]),
}
LATIN = os.fsdecode(b"caf\xe9")  # as Python hands over an argument in Latin-1
PACKAGES = frozenset({"prodigyopt", "xformers"})
PRIOR = "--with_prior_preservation --class_data_dir {tmp}/class"

BOTH: list[tuple[str, str]] = [
    # what argparse sees
    ("--rnk 4", '"--rnk".*did you mean "--rank"'),
    ("--rank 4 stray", '"stray".*flag'),
    ("--rho", "--rho has no value"),
    # names and ranges
    ("--quantize nf8", '"nf8".*did you mean "nf4"'),
    ("--rho 0", "--rho is 0.0.*above 0.*lora"),
    ("--rho nan", "--rho is nan.*finite"),
    (f"--rank=-{'1' * 400}", "a number of 400 digits.*1 or more"),
    ("--learning_rate 1e-300", "32-bit"),
    ("--train_batch_size 60000 --gradient_accumulation_steps 60000", "samples a step"),
    # text and places
    (f"--hub_model_id {LATIN}", "--hub_model_id.*no text"),
    ("--output_dir a\0b", "--output_dir.*no text"),
    ("--resume_from_checkpoint ~no-such-user/x", "~no-such-user.*no such user"),
    # the machine
    ("--optimizer prodigy", "pip install 'prodigyopt'"),
    ("--push_to_hub", "--push_to_hub.*hf auth login"),
    ("--mixed_precision fp16", "fp16 with the device cpu.*GPU"),
    # the table (each of its entries is tested below)
    ("--push_to_hub --hub_token hf_x --report_to wandb", "--hub_token with.*wandb.*auth login"),
    ("--output_dir=", "--output_dir.*name it"),
]
IMAGES: list[tuple[str, str]] = [
    ("--resolution 100", "--resolution is 100.*multiple of 8.*96"),
    ("--resolution 1000000000000", "34 GB"),
    ("--dataset {tmp}/full", "--dataset stands twice.*list of concepts"),
    ("--validation_dataset held_out", '"held_out" is no folder here.*OWNER/NAME'),
    ("--validation_prompts {tmp}/empty.txt", "empty.txt.*empty file"),
    ("--variant fp16", '--variant "fp16".*mini'),
    ("--pretrained_model_name_or_path {tmp}/full", "model_index.json of .*full.*can't be read"),
    ("--pretrained_model_name_or_path {tmp}/other", "it has no text_encoder_2"),
    ("--bnb_quantization_config_path {tmp}/int8.json", "int8.json.*--quantize nf4"),
    ("--disk_cache {tmp}/a.zip/cache", "--disk_cache.*auto, or no"),
]
FOLDERS: list[tuple[str, str]] = [
    ("--dataset ./nowhere", '"./nowhere".*not exist'),
    ("--dataset my_phots", '"my_phots" is no folder here.*OWNER/NAME'),
    (f"--dataset {'x' * 300}", "name too long"),
    ("--dataset {tmp}/a.zip", "is a file"),
    ("--instance_data_dir {tmp}/full --instance_data_dir {tmp}/empty", "stands twice.*concepts"),
    ("--instance_data_dir {tmp}/nowhere", "nowhere.*not exist"),
    (
        "--instance_data_dir {tmp}/full --with_prior_preservation --class_data_dir {tmp}/full"
        " --class_prompt x",
        "folder of their own",
    ),
]
TEXTS: list[tuple[str, str]] = [
    ("--compile", "--compile is no option here.*image models.*drop it"),
    ("--task sst-2", 'did you mean "sst2"'),
]
ROWS: list[tuple[str, str]] = [
    ("--train_file {tmp}/none.jsonl", "none.jsonl.*does not exist"),
    ("--train_file a.jsonl --train_file b.jsonl", "--train_file stands twice.*one file"),
    ("--train_file {tmp}/pipe.jsonl", "--train_file.*pipe.jsonl.*not a file of rows"),
]
IMAGE, TEXT = CONFIGS.values()
CASES: list[tuple[Read, list[str], tuple[str, str]]] = [
    *((*(IMAGE, TEXT)[turn % 2], case) for turn, case in enumerate(BOTH)),
    *((*IMAGE, case) for case in IMAGES),
    *((*TEXT, case) for case in TEXTS),
    *((resolve, ["--instance_prompt", "x"], case) for case in FOLDERS),
    *((TextConfig.resolve, ["--model_name_or_path", "gpt2"], case) for case in ROWS),
    # what a command line needs
    (resolve, [], ("", "--instance_data_dir")),
    (resolve, ["--dataset", "a/b"], ("", '"a/b" has no prompt.*--instance_prompt.*--caption_col')),
    (TextConfig.resolve, ["--task", "sst2"], ("", "--model_name_or_path")),
    (TextConfig.resolve, ["--model_name_or_path", "gpt2"], ("", "--train_file")),
]


@pytest.fixture
def folder(tmp_path):
    """Files and folders that are wrong in one way each."""
    for name in ("empty", "full", "other"):
        (tmp_path / name).mkdir()
    for name in ("full/a.png", "a.zip"):
        (tmp_path / name).touch()
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "int8.json").write_text('{"load_in_8bit": true}')
    os.mkfifo(tmp_path / "pipe.jsonl")
    index = json.loads((mini.pipeline_dir() / "model_index.json").read_text())
    del index["text_encoder_2"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "tokenizer_2"):
        (tmp_path / "other" / part).mkdir()
    return tmp_path


def refusal(read, argv):
    """The sentence with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        read(argv)
    message = str(caught.value)
    message.encode()
    assert "\n" not in message
    assert message.endswith(".")
    assert 20 < len(message) < 400
    assert "hf_x" not in message
    return message


@pytest.mark.parametrize(("read", "start", "case"), CASES, ids=[case[0][:40] for *_, case in CASES])
def test_a_bad_command_line(read, start, case, folder, machine):
    machine("cpu", missing=PACKAGES)
    words, pattern = case
    message = refusal(read, [*start, *words.replace("{tmp}", str(folder)).split()])
    assert re.search(pattern, message)


COMPARED = {
    "caption_column": {"image_column": 1},
    "input_column": {"target_column": 1},
    "auxiliary_learning_rate": {"learning_rate": 0.5},
}
"""Values that the table compares an option with."""


def example(entry):
    """Facts that an entry refuses."""
    others = COMPARED.get(entry.when[0].name, {})
    facts = {}
    for condition in entry.when:
        name, candidates = condition.name, (*condition.values, 1, 2, None)
        facts[name] = next(v for v in candidates if condition.holds({**others, name: v}))
    return {**others, **facts}


@pytest.mark.parametrize("entry", table().refused, ids=Refusal.shown)
def test_an_entry_of_the_table(entry):
    """Holds for its facts together alone, and names options and choices that exist."""
    facts = example(entry)
    assert refused(facts) is entry
    sentence = entry.sentence(facts)
    assert entry.reason.replace("`", "") in sentence
    assert sentence.endswith(f": {entry.instead.replace('`', '')}.")
    options = options_of((*DreamBoothConfig.groups, *TextConfig.groups))
    for name, test, _, values in entry.when:
        assert test == "absent" or str(facts[name]) in sentence or facts[name] in (True, 1)
        assert not entry.holds({key: value for key, value in facts.items() if key != name})
        assert name in options or name in table().facts
        choices = option_of(options[name]).choices if name in options else None
        choices = names() if name == "method" else choices
        assert not choices or set(values) <= set(choices)


@pytest.mark.parametrize(
    ("kind", "launched", "words", "pattern"),
    [
        ("mps", "no", "--mixed_precision bf16", "mps"),
        ("mps", "no", "--use_8bit_adam", "adamw8bit with the device mps.*no kernels"),
        ("cpu", "fp8", "", "fp8"),
    ],
)
def test_a_machine_that_can_not(kind, launched, words, pattern, machine, monkeypatch):
    machine(kind)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert re.search(pattern, refusal(resolve, ["--dataset", "mini", *words.split()]))


@pytest.mark.parametrize("method", names())
def test_options_of_other_methods_and_defaults_may_stand(method):
    argv = ["--dataset", "mini", "--method", method, "--lr_num_cycles", "1", "--lr_power", "1.0"]
    others = ["--auxiliary_direction", "descent", "--rho", "auto", "--ball", "none"]
    assert resolve(argv).method == method
    if method != "bilora":
        assert resolve([*argv, *others[:2], *others[4:]]).ball == "none"


def numbers(config):
    """Options whose type has a number in it."""
    hints = get_type_hints(config)
    return [n for n in options_of(config.groups) if {int, float} & {hints[n], *get_args(hints[n])}]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_has_a_range(config):
    assert len(numbers(config)) > 30
    assert all(option_of(options_of(config.groups)[name]).range for name in numbers(config))


NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(0, 400).map(lambda zeros: "1" + "0" * zeros),
    st.floats().map(str),
    st.text("0123456789eE+-._xinfa", max_size=12),
)


@settings(max_examples=100)
@given(st.data())
def test_any_number_is_a_configuration_or_a_sentence(data):
    config = data.draw(st.sampled_from(list(CONFIGS)))
    several = data.draw(st.lists(st.sampled_from(numbers(config)), min_size=1, max_size=3))
    read, start = CONFIGS[config]
    with contextlib.suppress(UserError):
        read([*start, *(f"--{name}={data.draw(NUMBERS)}" for name in several)])


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"rank": 0}, "^rank is 0: "),
        ({"rank": "four"}, "^rank is 'four': give a number"),
        ({"rho_norm": "scale"}, '^rho_norm .*did you mean "scaled"'),
    ],
)
def test_the_api_has_the_same_ranges_under_its_own_names(values, pattern):
    with pytest.raises(UserError, match=pattern):
        BiLoRAConfig(**cast(Any, values))
