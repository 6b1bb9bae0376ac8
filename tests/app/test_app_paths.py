"""The viewer stays below its root, and says what is wrong with a root, an address or a set-up."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app import viewer
from app.catalog import Catalog
from bilora_diffusion.errors import UserError
from tests.app.test_app_catalog import make_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "..", "a/..", "a\\..\\..\\x", "a\0b", "//etc"]
)
def test_paths_out_of_the_root_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="below the root"):
        Catalog(tmp_path).resolve(path)


def test_paths_below_the_root_are_resolved(tmp_path: Path) -> None:
    catalog = Catalog(make_run(tmp_path / "root"))
    assert catalog.resolve("run.json") == (tmp_path / "root" / "run.json").resolve()
    assert catalog.resolve(".") == catalog.root
    assert catalog.resolve("not/there").parent.parent == catalog.root


def test_links_out_of_the_root_are_refused(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside")
    root = tmp_path / "root"
    inside = make_run(root / "inside")
    (root / "folder").symlink_to(outside, target_is_directory=True)
    (root / "file.json").symlink_to(outside / "run.json")
    (root / "loop").symlink_to(root / "loop")
    (root / "kept").symlink_to(inside, target_is_directory=True)
    catalog = Catalog(root)
    for path in ("folder", "folder/run.json", "file.json"):
        with pytest.raises(UserError, match="leads out of the root"):
            catalog.resolve(path)
    assert catalog.resolve("kept/run.json") == inside.resolve() / "run.json"
    assert [run.path for run in catalog.runs()] == ["inside"]
    assert [row.path for row in catalog.broken()] == ["folder"]


def test_a_linked_record_out_of_the_root_is_not_read(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside")
    run = tmp_path / "root" / "run"
    run.mkdir(parents=True)
    (run / "run.json").symlink_to(outside / "run.json")
    catalog = Catalog(tmp_path / "root")
    assert catalog.runs() == []
    assert "leads out of the root" in catalog.broken()[0].reason


def test_a_root_that_is_itself_a_link_is_followed(tmp_path: Path) -> None:
    make_run(tmp_path / "real" / "lora")
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    catalog = Catalog(tmp_path / "link")
    assert [run.path for run in catalog.runs()] == ["lora"]
    assert catalog.resolve("lora/run.json").is_file()


def test_a_bad_root_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "none", "there is no folder"), (tmp_path / "file", "a file")):
        assert viewer.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(path) in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "0"], "--port 0"),
        (["--port", "70000"], "--port 70000"),
        (["--port", "many"], "--port"),
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        (["--prot", "7861"], 'did you mean "--port"'),
    ],
)
def test_a_bad_address_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert viewer.main([str(tmp_path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert viewer.main([str(tmp_path), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it now raises ImportError
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert viewer.main([str(tmp_path), "--port", str(port)]) == 2
    assert "pip install 'bilora-diffusion[app]'" in capsys.readouterr().err


def test_core_and_catalog_do_without_gradio() -> None:
    code = (
        "import sys, app.catalog, app.compare_data, app.viewer; sys.exit('gradio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
