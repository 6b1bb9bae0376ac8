"""Every flag recorded in ``references/flag_list.json`` still exists, with its default and values.

The test runs each command and takes its parser just before the arguments are parsed. New flags are
not an error.
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
    """Exception that carries a parser out of a command before the arguments are parsed."""


def parser_of(command):
    """Run a command until it parses its arguments, and return its parser."""

    def carry(self, *args, **settings):
        raise _Parser(self)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
        patch.setattr(argparse.ArgumentParser, "parse_args", carry)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", carry)
        # A default may depend on whether there is a GPU.
        patch.setattr(torch.cuda, "is_available", lambda: False)
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
    actions = parser_of(command)._actions
    for record in RECORDED[command]:
        assert any(_serves(action, record) for action in actions), record["flags"]


def _serves(action, record):
    """Return whether a flag accepts all values of a recorded flag and has the same default."""
    names = action.option_strings or [action.dest]
    if not set(names) >= set(record["flags"]):
        return False
    takes_value = action.nargs != 0
    if (takes_value, action.nargs) != (record["value"], record["nargs"]):
        return False
    if _plain(action.default) != record["default"]:
        return False
    if action.choices is not None:
        # A flag that accepted any value must not have choices now.
        recorded_choices = set(record["choices"] or [None])
        if not set(map(str, action.choices)) >= recorded_choices:
            return False
    return record["required"] or not action.required
