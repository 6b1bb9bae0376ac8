"""The viewer stays below its root, and says what is wrong with a root, an address or a set-up."""

import re
import socket
import sys
from pathlib import Path

import pytest

from app import viewer
from app.catalog import Catalog
from bilora_diffusion.errors import UserError
from tests.app.folders import make_run

ROOT = Path(__file__).resolve().parents[2]


def test_what_leads_out_of_the_root_is_refused_and_links_that_stay_are_followed(tmp_path):
    outside = make_run(tmp_path / "outside")
    root = tmp_path / "root"
    inside = make_run(root / "inside")
    (root / "folder").symlink_to(outside, target_is_directory=True)
    (root / "file.json").symlink_to(outside / "run.json")
    (root / "loop").symlink_to(root / "loop")
    (root / "kept").symlink_to(inside, target_is_directory=True)
    (root / "record").mkdir()
    (root / "record" / "run.json").symlink_to(outside / "run.json")
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    led_out = ("folder", "folder/run.json", "file.json", "record/run.json", "loop")
    out = ("../x", "a/../../x", "/etc/passwd", "..", "a/..", "a\\..\\..\\x", "a\0b", "//etc")
    for catalog in (Catalog(root), Catalog(tmp_path / "link")):
        for path in (*led_out, *out):
            with pytest.raises(UserError, match=re.escape(repr(path))):
                catalog.resolve(path)
        assert catalog.resolve("kept/run.json") == inside.resolve() / "run.json"
        assert catalog.resolve("not/there").parent.parent == catalog.root
        assert [run.path for run in catalog.now.runs] == ["inside"]
        assert {row.path for row in catalog.now.broken} == {"folder", "record"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "there is no folder none"),
        (["file"], "file is a file"),
        ([".", "--port", "0"], "--port 0"),
        ([".", "--port", "TAKEN"], "--port TAKEN"),
        ([".", "--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        ([".", "--prot", "7861"], 'did you mean "--port"'),
    ],
)
def test_a_bad_root_or_address_is_refused(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert viewer.main([word.replace("TAKEN", port) for word in words]) == 2
    assert sentence.replace("TAKEN", port) in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it now raises ImportError
    monkeypatch.setattr(viewer, "check_address", lambda host, port: None)
    assert viewer.main([str(tmp_path)]) == 2
    assert "pip install 'bilora-diffusion[app]'" in capsys.readouterr().err
