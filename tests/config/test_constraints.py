"""Bad command lines are refused in one sentence with the value and the fix."""

import contextlib
import json
import os
from typing import Any, cast, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bilora_diffusion import BiLoRAConfig, mini
from bilora_diffusion.config.constraints import Constraint, first_violated, table
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import option_of, options_of
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.methods import names
from bilora_diffusion.text.config import TextConfig

IMAGE = "--dataset mini"
TEXT = "--model_name_or_path gpt2 --task sst2"
FOLDER = "--instance_prompt x --dataset"
ROWS = "--model_name_or_path gpt2 --train_file"
CONFIGS: dict[Any, str] = {DreamBoothConfig: IMAGE, TextConfig: TEXT}
LATIN = os.fsdecode(b"caf\xe9")  # how Python decodes an argument in Latin-1

# Command lines, and parts of their error messages: the value and the fix.
BAD_COMMAND_LINES = [
    # Errors of the parser.
    (f"{IMAGE} --rnk 4", ["--rnk", "--rank"]),
    (f"{TEXT} --rank 4 stray", ["stray"]),
    (f"{IMAGE} --rho", ["--rho has no value"]),
    # Names, ranges and text.
    (f"{TEXT} --quantize nf8", ["nf8", "nf4"]),
    (f"{IMAGE} --rho 0", ["--rho is 0.0", "above 0"]),
    (f"{TEXT} --rho nan", ["--rho is nan"]),
    (
        f"{IMAGE} --learning_rate 2e4",
        ["is 20000.0 (did you mean 2e-4?)", "at most"],
    ),
    (f"{TEXT} --adam_weight_decay 1.5e5", ["(did you mean 1.5e-5?)"]),
    (f"{IMAGE} --rank=-{'1' * 400}", ["400 digits", "1 or more"]),
    (f"{IMAGE} --learning_rate 1e-40", ["1e-40", "give at least 1.2e-38"]),
    (f"{IMAGE} --train_batch_size 60000 --gradient_accumulation_steps 60000", ["60000", "smaller"]),
    (f"{TEXT} --hub_model_id {LATIN}", ["--hub_model_id"]),
    (f"{IMAGE} --output_dir a\0b", ["--output_dir"]),
    (f"{IMAGE} --resume_from_checkpoint ~no-such-user/x", ["~no-such-user"]),
    # Packages, the hub, the device.
    (f"{IMAGE} --optimizer prodigy", ["pip install 'prodigyopt'"]),
    (f"{IMAGE} --push_to_hub", ["--push_to_hub", "hf auth login"]),
    (f"{IMAGE} --push_to_hub --hub_token hf_x --report_to wandb", ["--hub_token", "hf auth login"]),
    # Images and models; tests/image has more on data sets.
    (f"{IMAGE} --dataset {{tmp}}/full", ["--dataset is given twice", "as concepts"]),
    (
        f"{FOLDER} a/b --instance_data_dir x --instance_data_dir y",
        ["--instance_data_dir is given twice"],
    ),
    ("--dataset a/b", ["a/b", "--instance_prompt", "--caption_column"]),
    (f"{IMAGE} --variant fp16", ["--variant", "fp16"]),
    (f"{IMAGE} --pretrained_model_name_or_path {{tmp}}/other", ["it has no text_encoder_2"]),
    (f"{IMAGE} --bnb_quantization_config_path {{tmp}}/int8.json", ["int8.json", "--quantize nf4"]),
    (f"{IMAGE} --disk_cache {{tmp}}/a.zip/cache", ["--disk_cache", "auto, or no"]),
    (
        f"{FOLDER} {{tmp}}/full --with_prior_preservation --class_data_dir {{tmp}}/full"
        " --class_prompt x",
        ["--class_data_dir", "folder of their own"],
    ),
    # Text.
    (f"{TEXT} --compile", ["--compile is not an option here", "drop it"]),
    (f"{TEXT}-2", ["sst2-2", "sst2"]),
    (f"{ROWS} {{tmp}}/none.jsonl", ["none.jsonl", "does not exist"]),
    (f"{ROWS} {{tmp}}/pipe.jsonl", ["pipe.jsonl", "not a file of rows"]),
]


@pytest.fixture
def folder(tmp_path):
    """Create files and folders with one error each."""
    for name in ("full", "other"):
        (tmp_path / name).mkdir()
    for name in ("full/a.png", "a.zip"):
        (tmp_path / name).touch()
    (tmp_path / "int8.json").write_text('{"load_in_8bit": true}')
    os.mkfifo(tmp_path / "pipe.jsonl")
    index = json.loads((mini.pipeline_dir() / "model_index.json").read_text())
    del index["text_encoder_2"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(index))
    for part in ("unet", "vae", "text_encoder", "tokenizer", "tokenizer_2"):
        (tmp_path / "other" / part).mkdir()
    return tmp_path


@pytest.mark.parametrize("words", ["--validation_guidance_scale 2e2", "--snr_gamma 1e300"])
def test_no_implausible_number_is_suggested(words):
    """200 is not a mistyped exponent, and the alternative 1e-300 is 0 in fp32."""
    with pytest.raises(UserError) as error:
        DreamBoothConfig.resolve(f"{IMAGE} {words}".split())
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(("words", "parts"), BAD_COMMAND_LINES)
def test_a_bad_command_line_is_refused_in_one_sentence_with_the_value_and_the_fix(
    words, parts, folder, machine
):
    machine("cpu", missing={"prodigyopt"})
    script = TextConfig if words.startswith("--model_name_or_path") else DreamBoothConfig
    with pytest.raises(UserError) as error:
        script.resolve(words.replace("{tmp}", str(folder)).split())
    sentence = str(error.value)
    sentence.encode()  # an argument that is not UTF-8 must not stop the message
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert len(sentence) < 400
    assert "hf_x" not in sentence
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_options_that_the_device_does_not_support_are_refused(kind, machine, monkeypatch):
    machine(kind)
    if kind == "mps":
        with pytest.raises(UserError, match="the device mps"):
            DreamBoothConfig.resolve(f"{IMAGE} --use_8bit_adam".split())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8"):
        DreamBoothConfig.resolve(IMAGE.split())


COMPARED = {
    "compare": {"method": 1},
    "caption_column": {"image_column": 1},
    "input_column": {"target_column": 1},
    "auxiliary_learning_rate": {"learning_rate": 0.5},
}
"""Values of the options that the table compares other options with."""


def violating_facts(constraint):
    """Return facts that violate a constraint."""
    first = constraint.conditions[0]
    facts = dict(COMPARED[first.name]) if first.argument.startswith("--") else {}
    for condition in constraint.conditions:
        # Try the condition's values, two numbers, and None for an option that is not given.
        for value in (*condition.values, 1, 2, None):
            facts[condition.name] = value
            if condition.holds(facts):
                break
    return facts


@pytest.mark.parametrize("constraint", table().constraints, ids=Constraint.markdown)
def test_a_constraint_of_the_table_is_exact(constraint):
    """It is violated only if all its conditions hold, and its options and choices exist."""
    facts = violating_facts(constraint)
    assert first_violated(facts) is constraint
    sentence = constraint.sentence(facts)
    assert constraint.reason.replace("`", "") in sentence
    assert sentence.endswith(f": {constraint.instead.replace('`', '')}.")
    options = options_of(DreamBoothConfig.groups + TextConfig.groups)
    for condition in constraint.conditions:
        name = condition.name
        if condition.test != "absent":
            assert str(facts[name]) in sentence or facts[name] in (True, 1)
        other_facts = {key: value for key, value in facts.items() if key != name}
        assert not constraint.is_violated(other_facts)
        assert name in options or name in table().facts
        choices = option_of(options[name]).choices if name in options else None
        if name == "method":
            choices = names()
        if choices is not None:
            assert set(condition.values) <= set(choices)


@pytest.mark.parametrize("method", names())
def test_options_of_other_methods_are_accepted(method):
    words = f"{IMAGE} --method {method} --auxiliary_rank 2 --bar_alpha 0.5"
    assert DreamBoothConfig.resolve(words.split()).method == method


def number_options(script):
    """Return the options whose type includes a number."""
    number_names = []
    hints = get_type_hints(script)
    for name in options_of(script.groups):
        types = {hints[name], *get_args(hints[name])}  # with the members of `int | None`
        if int in types or float in types:
            number_names.append(name)
    return number_names


@pytest.mark.parametrize("script", CONFIGS)
def test_every_number_has_a_range(script):
    options = options_of(script.groups)
    assert len(number_options(script)) > 30
    for name in number_options(script):
        properties = option_of(options[name])
        assert properties.range or properties.read


# Small and huge numbers, infinities, NaN, and strings that look like numbers.
NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(0, 400).map(lambda zeros: "1" + "0" * zeros),
    st.floats().map(str),
    st.text("0123456789eE+-._xinfa", max_size=12),
)


@settings(max_examples=100)
@given(st.data())
def test_any_number_gives_a_configuration_or_a_user_error(data):
    script = data.draw(st.sampled_from(list(CONFIGS)))
    options = st.lists(st.sampled_from(number_options(script)), min_size=1, max_size=3)
    flags = [f"--{name}={data.draw(NUMBERS)}" for name in data.draw(options)]
    with contextlib.suppress(UserError):
        script.resolve(CONFIGS[script].split() + flags)


def test_the_api_checks_the_same_ranges_under_its_own_names():
    for name, value in (("rank", 0), ("rank", "four"), ("rho_norm", "scale")):
        with pytest.raises(UserError, match=f"^{name} is "):
            BiLoRAConfig(**cast(Any, {name: value}))
