"""The command `python -m app.viewer`: its arguments, its end, and what it leaves behind."""

import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from app import viewer
from tests.app.visitor import Visitor
from tests.scripts.runs import free_port, started


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none"], "there is no folder none"),
        (["file"], "file is a file"),
        ([".", "--port", "TAKEN"], "--port TAKEN"),
        ([".", "--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        ([".", "--prot", "7861"], 'did you mean "--port"'),
        ([".", "--allow_host", "http://lab.example"], "--allow_host http://lab.example"),
        ([".", "--allow_host", "lab.example:80"], "--allow_host lab.example:80"),
        ([".", "--allow_host", "*"], "--allow_host *"),
        ([".", "--allow_host", ""], "--allow_host "),
    ],
)
def test_a_bad_root_or_address_is_refused(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        arguments = [word.replace("TAKEN", port) for word in words]
        assert viewer.main(arguments) == 2
    assert sentence.replace("TAKEN", port) in capsys.readouterr().err


@pytest.mark.slow
def test_it_serves_where_a_proxy_is_set_that_does_not_answer(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    process = started("-m", "app.viewer", tmp_path, "--port", port, stdout=subprocess.PIPE)
    try:
        assert f"http://127.0.0.1:{port} shows" in process.stdout.readline()
        assert Visitor(port).ask("/config").status == 200
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_number", "is_ignored"), [(signal.SIGTERM, False), (signal.SIGHUP, True)]
)
def test_a_signal_ends_it_as_ctrl_c_does(tmp_path, monkeypatch, signal_number, is_ignored):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    port = free_port()
    before = signal.getsignal(signal_number)
    if is_ignored:  # as nohup does
        signal.signal(signal_number, signal.SIG_IGN)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = started("-m", "app.viewer", tmp_path, "--port", port, **pipes)
    signal.signal(signal_number, before)
    try:
        assert str(port) in process.stdout.readline()
        # An event that fails: Gradio prints its trace, and in it what was sent.
        Visitor(port).send(1, [["x" * 9_000] * 10])
        assert list(temporary.glob("bilora-viewer-*"))
        process.send_signal(signal_number)
        if is_ignored:
            time.sleep(0.5)
            assert process.poll() is None
            process.terminate()
        assert process.wait(60) == 0
        errors = process.stderr.read()
        assert errors.count("Traceback") == 1
        assert len(errors) < 10_000
    finally:
        process.kill()
    assert not list(temporary.glob("bilora-viewer-*"))


def test_a_viewer_deletes_the_temporary_folders_of_those_that_were_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / viewer.CACHE_LOCK).touch()
    (tmp_path / "bilora-viewer-link").symlink_to(outside, target_is_directory=True)
    (tmp_path / "bilora-viewer-new").mkdir()  # of a viewer that has not locked it yet
    other_names = {"outside", "bilora-viewer-link", "bilora-viewer-new"}
    code = "import time; from app import viewer\nwith viewer.own_cache() as cache:\n"
    code += "    print(cache, flush=True); time.sleep(60)"
    processes = [started("-c", code, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        killed, running = (Path(process.stdout.readline().strip()) for process in processes)
        (killed / "copy.png").touch()
        processes[0].kill()
        processes[0].wait(20)
        with viewer.own_cache() as cache:
            names = {path.name for path in tmp_path.iterdir()}
            assert names == other_names | {running.name, cache.name}
        assert {path.name for path in tmp_path.iterdir()} == other_names | {running.name}
        assert (outside / viewer.CACHE_LOCK).exists()
    finally:
        for process in processes:
            process.kill()
            process.wait(20)


def test_without_gradio_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it now raises ImportError
    assert viewer.main([str(tmp_path), "--port", str(free_port())]) == 2
    assert "pip install 'bilora-diffusion[app]'" in capsys.readouterr().err
