"""combinations: the command line refuses every entry of the table."""

from __future__ import annotations

from typing import Any

import pytest

from bilora_diffusion.config import parse
from bilora_diffusion.config.combinations import REFUSED, Above, Refusal, refused
from bilora_diffusion.config.command_line import CommandLine
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.options import GROUPS
from bilora_diffusion.methods import names


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without a launcher, whatever runs the tests."""
    for module in ("resolve", "environment"):
        monkeypatch.setattr(f"bilora_diffusion.config.{module}.device_type", lambda: "cpu")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def examples(entry: Refusal) -> list[dict[str, Any]]:
    """Values for which the entry holds, each of its own at least once."""
    columns = {
        option: (wanted.limit + 0.5,) if isinstance(wanted, Above) else wanted
        for option, wanted in entry.when
    }
    count = max(len(values) for values in columns.values())
    return [{k: values[i % len(values)] for k, values in columns.items()} for i in range(count)]


def flags(values: dict[str, Any]) -> list[str]:
    return ["--dataset", "mini"] + [
        word
        for option, value in values.items()
        for word in ([f"--{option}"] if value is True else [f"--{option}", str(value)])
    ]


EXAMPLES = [(entry, values) for entry in REFUSED for values in examples(entry)]
IDS = [" ".join(flags(values)[2:]) for _, values in EXAMPLES]


@pytest.mark.parametrize(("entry", "values"), EXAMPLES, ids=IDS)
def test_the_command_line_refuses_it_with_its_sentence(
    entry: Refusal, values: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        parse(flags(values))
    message = str(caught.value)
    assert message == entry.sentence(values)
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    for option, value in values.items():
        assert f"--{option}" in message
        assert value is True or str(value) in message


@pytest.mark.parametrize(("entry", "values"), EXAMPLES, ids=IDS)
def test_no_condition_is_idle(entry: Refusal, values: dict[str, Any]) -> None:
    assert refused(values) is entry
    for option in values:
        rest = {key: value for key, value in values.items() if key != option}
        assert not entry.holds(rest)
        assert not entry.holds({**rest, option: None})


def test_the_options_and_their_choices_exist() -> None:
    line = CommandLine(GROUPS, "", "")
    choices = {action.dest: action.choices for action in line._actions}
    for entry in REFUSED:
        for option, wanted in entry.when:
            assert option in line.defaults()
            if not isinstance(wanted, Above):
                known = names() if option == "method" else choices[option]
                assert known is None or isinstance(wanted[0], bool) or set(wanted) <= set(known)


def test_the_defaults_are_not_refused() -> None:
    for method in names():
        assert parse(["--dataset", "mini", "--method", method]).method == method


@pytest.mark.parametrize("method", [name for name in names() if name != "bilora"])
def test_options_of_another_method_may_stand(method: str) -> None:
    argv = ["--ball", "none", "--rescale_moments", "--auxiliary_update", "power"]
    argv += ["--rho_schedule", "cosine", "--auxiliary_learning_rate", "0.1"]
    assert parse(["--dataset", "mini", "--method", method, *argv]).rescale_moments


def test_numbers_above_a_limit() -> None:
    assert refused({"method": "full", "lora_dropout": 0.0}) is None
    assert refused({"method": "full", "lora_dropout": None}) is None
    assert refused({"method": "full"}) is None
    assert refused({"method": "full", "lora_dropout": 0.1}) is not None
