"""The command `python -m app.viewer`: its arguments and how it ends."""

import signal
import socket
import subprocess
import sys
import time
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
@pytest.mark.parametrize(
    ("signal_number", "is_ignored"),
    [(signal.SIGTERM, False), pytest.param(signal.SIGHUP, True, marks=pytest.mark.matrix)],
)
def test_the_viewer_ignores_a_dead_proxy_and_a_signal_ends_it_like_ctrl_c(
    tmp_path, monkeypatch, signal_number, is_ignored
):
    # A proxy that does not respond
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
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
        assert f"http://127.0.0.1:{port} shows" in process.stdout.readline()
        assert Visitor(port).ask("/config").status == 200
        # This event fails, and Gradio prints a traceback with the sent values.
        Visitor(port).send(1, [["x" * 9_000] * 10])
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
    assert not list(temporary.iterdir()), "no temporary file may be left"


def test_without_gradio_the_command_names_the_extra_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it now raises ImportError
    assert viewer.main([str(tmp_path), "--port", str(free_port())]) == 2
    assert "pip install 'bilora-diffusion[app]'" in capsys.readouterr().err
