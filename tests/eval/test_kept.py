"""What was measured is measured once, whatever interrupts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from eval.kept import FOLDER, Kept

ABOUT = {"digest": "abc", "levels": (1, 2)}


def test_a_piece_is_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, object]:
        made.append(1)
        return {"loss": math.inf, "values": (1, 2)}

    for _ in range(2):
        kept = Kept(tmp_path, ABOUT)
        assert kept.piece(["line", 0], make) == {"loss": None, "values": [1, 2]}
    assert len(made) == 1
    assert ["line", 1] not in kept
    assert kept.get(["line", 1]) is None
    kept.put("none", None)
    assert Kept(tmp_path, ABOUT).piece("none", pytest.fail) is None
    other = Kept(tmp_path, ABOUT | {"digest": "def"})  # what it depends on tells pieces apart
    assert "none" not in other
    other.put("none", 2.0)  # two commands at once do not meet
    kept.put("rise", 3.0)
    assert Kept(tmp_path, ABOUT).get("none") is None


@pytest.mark.parametrize("torn", [b'{"key": "b", "value": 2}', b"\xff\n"])
def test_what_a_kill_tore_off_is_made_again(tmp_path: Path, torn: bytes) -> None:
    Kept(tmp_path, ABOUT).put("a", 1)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes() + torn)
    kept = Kept(tmp_path, ABOUT)
    assert kept.get("a") == 1
    assert kept.piece("b", lambda: 3) == 3
    assert Kept(tmp_path, ABOUT).get("b") == 3
