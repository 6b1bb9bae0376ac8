"""Files are replaced whole or not at all, and a full disk is known by whatever says so."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from bilora_diffusion import durable


def write(path: Path, text: str, failure: BaseException | None = None) -> None:
    with durable.replacing(path) as aside:
        aside.write_text(text)
        assert aside.suffix == path.suffix
        assert path.read_text() == "old"
        if failure is not None:
            raise failure


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    durable.write_text(path, "old")
    for failure in (OSError(errno.ENOSPC, "full"), ValueError("wrong"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            write(path, "half", failure)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.txt"]
    write(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "some/file"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "No rights"), False),
    ],
)
def test_a_full_disk_is_known_also_as_a_cause(error, full):
    outer = RuntimeError("while writing")
    outer.__cause__ = error
    assert durable.disk_is_full(error) is durable.disk_is_full(outer) is full
