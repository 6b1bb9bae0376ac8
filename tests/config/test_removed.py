"""Options, values and methods of earlier versions that were removed."""

from argparse import Namespace

import pytest

from bilora_diffusion import methods
from bilora_diffusion.config.command_line import UserErrorParser
from bilora_diffusion.core import removed
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import options_of
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.run.settings import describe_differences
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.train.resume import recorded_options

PARSERS = {"image": DreamBoothConfig.parser(), "text": TextConfig.parser()}


@pytest.mark.parametrize("name", removed.OPTIONS)
@pytest.mark.parametrize("script", PARSERS)
def test_a_removed_option_is_refused_with_its_replacement(script, name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: 1\n")
    for words in ([f"--{name}", "1"], [f"--{name}=1"], ["--config", str(recipe)]):
        with pytest.raises(UserError) as error:
            PARSERS[script].read(words)
        assert f"{name} was removed: {removed.OPTIONS[name].instead}" in str(error.value)
        assert removed.OPTIONS[name].version in str(error.value)


@pytest.mark.parametrize("name", removed.METHODS)
def test_a_removed_method_is_refused_with_its_replacement(name):
    with pytest.raises(UserError, match=f"{name} was removed: {removed.METHODS[name]}"):
        PARSERS["image"].read(["--method", name])
    with pytest.raises(UserError, match=f"{name} was removed: {removed.METHODS[name]}"):
        methods.get(name)


@pytest.mark.parametrize("name", removed.METHODS)
def test_a_run_of_a_removed_method_is_refused(name):
    with pytest.raises(UserError, match=f"--method {name}, which was removed"):
        removed.require_neutral({"method": name})
    with pytest.raises(UserError, match=f"{name} was removed: {removed.METHODS[name]}"):
        PARSERS["image"].read(["--compare", name])


def test_positional_arguments_are_parsed():
    parser = UserErrorParser()
    parser.add_argument("runs", nargs="*")
    parser.add_argument("count", type=int)
    assert parser.parse_args(["runs/a", "3"]) == Namespace(runs=["runs/a"], count=3)
    with pytest.raises(UserError, match='count is "few": give a whole number'):
        parser.parse_args(["few"])


def test_no_option_and_no_method_of_this_version_counts_as_removed():
    for config in (DreamBoothConfig, TextConfig):
        assert not removed.OPTIONS.keys() & options_of(config.groups).keys()
    assert not removed.METHODS.keys() & set(methods.names())


@pytest.mark.parametrize("name", removed.OPTIONS)
def test_a_removed_option_in_a_record_is_ignored_only_if_it_had_no_effect(name):
    option = removed.OPTIONS[name]
    cfg = DreamBoothConfig.resolve(["--dataset", "mini", "--keep_best"])
    recorded = cfg.to_dict()
    assert recorded_options(recorded, cfg) == cfg.resume_settings()
    if option.neutral_values is None:
        assert recorded_options({**recorded, name: "a value"}, cfg) == cfg.resume_settings()
        return
    for value in option.neutral_values:
        assert recorded_options({**recorded, name: value}, cfg) == cfg.resume_settings()
    if option.is_of_bilora:
        removed.require_neutral({**recorded, "method": "lora", name: "other"})
    with pytest.raises(UserError, match=f"--{name} other, which was removed"):
        recorded_options({**recorded, name: "other"}, cfg)


@pytest.mark.parametrize(("name", "value"), removed.VALUES)
@pytest.mark.parametrize("script", PARSERS)
def test_a_removed_value_is_refused_with_its_replacement(script, name, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {value}\n")
    for words in ([f"--{name}", value], ["--config", str(recipe)]):
        with pytest.raises(UserError) as error:
            PARSERS[script].read(words)
        assert f"{value} was removed: {removed.VALUES[name, value]}" in str(error.value)
        assert removed.TAG in str(error.value)
    with pytest.raises(UserError, match=f"--{name} {value}, which was removed"):
        removed.require_neutral({name: value})


def test_removed_measurement_options_matter_only_if_the_held_out_loss_decides():
    recorded = {"validation_part": "1/2"}
    removed.require_neutral(recorded, depends_on_heldout=False)
    with pytest.raises(UserError, match="validation_part 1/2, which was removed"):
        removed.require_neutral(recorded, depends_on_heldout=True)


def test_an_option_missing_from_a_record_counts_as_its_default():
    flags = ["--dataset", "mini", "--keep_best"]
    cfg = DreamBoothConfig.resolve(flags)
    recorded = cfg.to_dict()
    del recorded["max_eval_samples"], recorded["max_grad_norm"]
    assert recorded_options(recorded, cfg) == cfg.resume_settings()
    changed = DreamBoothConfig.resolve([*flags, "--max_grad_norm", "2", "--max_eval_samples", "8"])
    differences = describe_differences(
        recorded_options(recorded, changed), changed.resume_settings()
    )
    assert "max_grad_norm was 1.0 and is 2.0" in differences
    assert "max_eval_samples was null and is 8" in differences
