"""Options and methods that earlier versions had."""

import pytest

from bilora_diffusion import methods
from bilora_diffusion.core import removed
from bilora_diffusion.core.errors import UserError
from bilora_diffusion.core.fields import options_of
from bilora_diffusion.image.config import DreamBoothConfig
from bilora_diffusion.text.config import TextConfig
from bilora_diffusion.train.resume import require_same_work

PARSERS = {"image": DreamBoothConfig.parser(), "text": TextConfig.parser()}


@pytest.mark.parametrize("name", removed.OPTIONS)
@pytest.mark.parametrize("script", PARSERS)
def test_a_removed_option_is_refused_with_what_to_use(script, name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: 1\n")
    for words in ([f"--{name}", "1"], [f"--{name}=1"], ["--config", str(recipe)]):
        with pytest.raises(UserError) as error:
            PARSERS[script].read(words)
        assert f"{name} was removed: {removed.OPTIONS[name].instead}" in str(error.value)
        assert removed.OPTIONS[name].version in str(error.value)


@pytest.mark.parametrize("name", removed.METHODS)
def test_a_removed_method_is_refused_with_what_to_use(name):
    with pytest.raises(UserError, match=f"{name} was removed: {removed.METHODS[name]}"):
        PARSERS["image"].read(["--method", name])
    with pytest.raises(UserError, match=f"{name} was removed: {removed.METHODS[name]}"):
        methods.get(name)


def test_no_option_and_no_method_of_this_version_counts_as_removed():
    for config in (DreamBoothConfig, TextConfig):
        assert not removed.OPTIONS.keys() & options_of(config.groups).keys()
    assert not removed.METHODS.keys() & set(methods.names())


@pytest.mark.parametrize("name", removed.OPTIONS)
def test_a_recorded_option_is_ignored_only_where_it_had_no_effect(name):
    option = removed.OPTIONS[name]
    content = {"hash": "1", "samples": [], "size": 0}
    current = {"rank": 4, "content": {"training": content, "held-out": content}}

    def resume_with(value):
        require_same_work(
            {**current, name: value}, current, options=["rank"], free=set(), depends_on_heldout=True
        )

    if option.neutral_values is None:
        resume_with("a value")
        return
    for value in option.neutral_values:
        resume_with(value)
    with pytest.raises(UserError, match=f"--{name} other, which was removed"):
        resume_with("other")


@pytest.mark.parametrize(("name", "value"), removed.VALUES)
@pytest.mark.parametrize("script", PARSERS)
def test_a_removed_value_is_refused_with_what_to_use(script, name, value, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{name}: {value}\n")
    for words in ([f"--{name}", value], ["--config", str(recipe)]):
        with pytest.raises(UserError) as error:
            PARSERS[script].read(words)
        assert f"{value} was removed: {removed.VALUES[name, value]}" in str(error.value)
        assert removed.TAG in str(error.value)
    with pytest.raises(UserError, match=f"--{name} {value}, which was removed"):
        removed.require_neutral({name: value})
