"""No flag of any command is lost: each parser still has what ``references/flag_list.json`` records.

The parsers are those that the commands really make, taken at the moment when one is to read its
arguments; flags may be added at any time.
"""

import argparse
import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "tests" / "references" / "flag_list.json"

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


class _Parser(BaseException):
    """Carries a parser out of a command that was about to read its arguments."""


def parser_of(command):
    """The parser that a command makes, as it is when the arguments are to be read."""

    def carry(self, *args, **settings):
        raise _Parser(self)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        patch.setattr(argparse.ArgumentParser, "parse_args", carry)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", carry)
        patch.setattr(torch.cuda, "is_available", lambda: False)  # the defaults of one machine
        patch.setattr(sys, "argv", [command])
        patch.chdir(ROOT)
        try:
            if command.endswith(".py"):
                patch.syspath_prepend(str((ROOT / command).parent))
                runpy.run_path(str(ROOT / command), run_name="__main__")
            else:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
        except _Parser as caught:
            return caught.args[0]
    raise AssertionError(f"{command} read no arguments")


def _plain(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value).replace(f"{ROOT}/", "")


@pytest.mark.parametrize("command", RECORDED)
def test_no_flag_is_lost(command):
    today = parser_of(command)._actions
    assert not [old for old in RECORDED[command] if not any(_serves(new, old) for new in today)]


def _serves(new, old):
    """Test that a flag of today takes all that a recorded one took, and has its default."""
    return (
        {*(new.option_strings or [new.dest])} >= set(old["flags"])
        and ((new.nargs != 0), new.nargs, _plain(new.default))
        == (old["value"], old["nargs"], old["default"])
        and (new.choices is None or {*map(str, new.choices)} >= set(old["choices"] or [None]))
        and (old["required"] or not new.required)
    )
