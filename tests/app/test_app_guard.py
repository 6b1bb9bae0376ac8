"""The viewer's server answers only its own page under its own host names, and serves no files."""

import http.client
import io
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from gradio.utils import get_upload_folder
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from app import page
from app.catalog import Catalog
from app.guard import MAX_BODY_BYTES, MAX_LINE_LENGTH, MAX_TEXT_LENGTH, ShortLines, add_guards
from tests.app.folders import make_run, make_scores
from tests.app.visitor import LOCAL, Visitor

EVIL = "http://evil.example"
SECRET = "nobody may read this"
JOIN = "/gradio_api/queue/join"
# A response takes some seconds on a busy machine. Reading an endless file would never finish.
PATIENCE_SECONDS = 15
# Ports of the servers of this process
OWN_PORTS: set[int] = set()


@dataclass(frozen=True)
class Served(Visitor):
    """A viewer in this process; ``calls`` has the addresses that it tried to connect to."""

    root: Path
    calls: list[Any]

    def files(self) -> list[str]:
        """Return paths that nobody may read: outside the root, via a link, a pipe and a device."""
        outside = self.root.parent
        names = ("secret.txt", "own.txt", "root/link/secret.txt", "root/../secret.txt", "pipe")
        return [*(f"{outside}/{name}" for name in names), "/dev/zero"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Make a root with a run and scores, next to files that nobody may read."""
    root = tmp_path_factory.mktemp("served") / "root"
    make_run(root / "lora")
    make_scores(root / "scores")
    outside = root.parent
    (outside / "secret.txt").write_text(SECRET)
    (outside / "own.txt").write_text(SECRET)
    (outside / "own.txt").chmod(0o600)
    os.mkfifo(outside / "pipe")
    (root / "link").symlink_to(outside, target_is_directory=True)
    return root


@contextmanager
def serving(server: uvicorn.Server, root: Path) -> Iterator[Served]:
    """Run a server in a thread; connections to other servers are recorded and refused."""
    listener = socket.create_server((LOCAL, 0))
    port = listener.getsockname()[1]
    OWN_PORTS.add(port)
    calls = []
    connect = socket.socket.connect

    def recorded_connect(self, address):
        if address[0] != LOCAL or address[1] not in OWN_PORTS:
            calls.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded_connect)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        served = Served(port, root, calls)
        assert served.ask("/").status == 200
        yield served
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def served(root):
    """Serve the viewer."""
    server = page.build_server(Catalog(root), host=LOCAL, public=False, device=None)
    with serving(server, root) as served:
        yield served


@pytest.fixture(scope="module")
def unguarded(root):
    """Serve the viewer without its guard."""
    app = page.build_app(page.build(Catalog(root)))
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    with serving(page.Server(config), root) as served:
        yield served


def test_the_viewer_serves_no_file_reveals_no_path_and_connects_to_nobody(served):
    root = served.root
    files = ["/etc/passwd", f"{root}/link/secret.txt", f"{root}/lora/run.json", "pyproject.toml"]
    files += [f"{root}/../secret.txt", f"{EVIL}/a.png", f"http://{LOCAL}:9/a.png"]
    files += [f"{get_upload_folder()}/{'../' * 20}etc/passwd"]
    for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/proxy="):
        for path in files:
            for text in {path, quote(path, safe="")}:
                answer = served.ask(route + text)
                assert 400 <= answer.status < 500, (answer.status, route, text)
                content = answer.read().decode()
                assert SECRET not in content
                assert "schema_version" not in content
    for path in ("/config", "/"):
        text = served.ask(path).read().decode()
        assert f"{root}/" not in text
        assert f"{Path.home()}/" not in text
    assert served.calls == []


def file_objects(path: str) -> list[Any]:
    """Return objects that some version of Gradio treats as a file or a URL."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    return [
        {"path": path, **meta},
        {"path": path, "url": path, "orig_name": "a", "is_stream": True, **meta},
        {"path": path},
        {"url": path, **meta},
    ]


def with_file(event: int, values: list[Any], file_object: Any) -> Iterator[Any]:
    """Yield events with a file in place of each value, after the values, and as event data."""
    body = {"data": values, "fn_index": event, "trigger_id": 1, "session_hash": "visitor"}
    for position in range(len(values) + 1):
        yield body | {"data": [*values[:position], file_object, *values[position + 1 :]]}
    yield body | {"event_data": file_object}


def with_file_anywhere(event: int, values: list[Any], file_object: Any) -> Iterator[Any]:
    """Yield events with a file in each field, or inside a list or an object."""
    for value in ([file_object], [[file_object]], {"value": file_object}):
        yield from with_file(event, values, value)
    body = next(with_file(event, values, None))
    for field in ("data", "fn_index", "trigger_id", "session_hash", "event_id", "other"):
        yield body | {field: file_object}


def copies() -> set[Path]:
    """Return the copies, in Gradio's cache, of files that nobody may read."""
    names = ("secret.txt", "own.txt", "pipe", "zero", "passwd")
    return {path for path in Path(get_upload_folder()).rglob("*") if path.name in names}


def is_read(pipe: Path) -> bool:
    """Return whether a pipe is open for reading."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


@pytest.mark.timeout(60)  # a pipe or a device blocks the reader
def test_no_event_accepts_a_file_or_a_url(served):
    copies_before = copies()
    paths = [*served.files(), f"http://{LOCAL}:9/a.png", f"{EVIL}/a.png"]
    forms = itertools.cycle(file_objects(served.files()[0]))
    requests = []
    for event, values in served.events():
        for path in paths:
            requests += with_file(event, values, file_objects(path)[0])
        requests += with_file(event, values, next(forms))
        requests += with_file_anywhere(event, values, next(forms))
    for number, body in enumerate(requests):
        route = ("queue/join", "run/predict")[number % 2]
        start = time.monotonic()
        answer = served.ask(f"/gradio_api/{route}", "POST", body)
        assert answer.status == 400, (body, answer.read())
        assert time.monotonic() - start < PATIENCE_SECONDS, body
    assert len(requests) > 1000
    assert served.calls == []
    assert copies() == copies_before
    assert not is_read(served.root.parent / "pipe")


@pytest.mark.timeout(60)  # a pipe or a device blocks the reader
def test_gradio_itself_refuses_files_that_it_did_not_create(unguarded):
    """URLs are not tested, because only the guard refuses them: Gradio fetches public URLs."""
    copies_before = copies()
    paths = itertools.cycle(unguarded.files())
    for event, values in unguarded.events():
        for position in range(len(values)):
            file_object: Any = file_objects(next(paths))[0]
            if position % 2:
                file_object = [file_object]
            start = time.monotonic()
            answer = unguarded.send(
                event, [*values[:position], file_object, *values[position + 1 :]]
            )
            assert time.monotonic() - start < PATIENCE_SECONDS, (event, position)
            assert "/gradio_api/file=" not in answer, (event, position)
    assert copies() == copies_before
    assert not is_read(unguarded.root.parent / "pipe")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"fn_index": 4444, "data": []}, "no such event"),
        ({"fn_index": "1", "data": []}, "no such event"),
        ({"fn_index": [1], "data": []}, "no such event"),
        ({"data": []}, "no such event"),
        ([1], "JSON object"),
        ("{" * 90_000, "JSON object"),
        (b"\xff\xfe{", "JSON object"),
        ({"fn_index": 1, "data": [["x" * (MAX_TEXT_LENGTH + 1)]]}, "10,001 characters"),
    ],
)
def test_events_that_the_page_does_not_send_are_refused_with_a_reason(served, body, sentence):
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    connection = http.client.HTTPConnection(LOCAL, served.port, timeout=5)
    connection.request("POST", JOIN, content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert sentence in json.load(answer)["detail"]


@pytest.mark.parametrize(
    ("listens_on", "host", "origin", "status"),
    [
        # Names of this machine. Any other name may belong to a website (DNS rebinding).
        (LOCAL, "LOCALHOST:7860", "http://localhost:7860", 200),
        (LOCAL, "[::1]:7860", None, 200),
        (LOCAL, "evil.example", None, 403),
        (LOCAL, "localhost.evil.example", None, 403),
        (LOCAL, "192.168.0.5:7860", None, 403),
        # Requests from a page with another origin
        (LOCAL, "localhost:7860", EVIL, 403),
        (LOCAL, "localhost:7860", "http://localhost:7861", 403),
        (LOCAL, "localhost:7860", "null", 403),
        # A name given with --allow_host
        (LOCAL, "Lab.Example:443", "https://lab.example:443", 200),
        # A server open to the network answers to its host name and to all addresses.
        ("0.0.0.0", f"{socket.gethostname()}:7860", None, 200),
        ("0.0.0.0", f"{LOCAL}:7860", "http://1.2.3.4:7860", 403),
        ("0.0.0.0", "192.168.0.5:7860", "http://192.168.0.5:7860", 200),
        ("0.0.0.0", "evil.example:7860", None, 403),
        ("0.0.0.0", "evil.example@192.168.0.5", None, 403),
    ],
)
def test_other_host_names_and_websites_are_refused(listens_on, host, origin, status):
    is_public = listens_on != LOCAL
    app = add_guards(PlainTextResponse("here"), [1], listens_on, is_public, ["Lab.Example"])
    headers = {"Host": host}
    if origin is not None:
        headers["Origin"] = origin
    client = TestClient(app)
    assert client.options("/config", headers=headers).status_code == 403
    for method, path in (("GET", "/config"), ("POST", JOIN)):
        answer = client.request(method, path, headers=headers, json={"fn_index": 1})
        assert answer.status_code == status
        assert not [name for name in answer.headers if "access-control" in name]
        has_policy = "frame-ancestors 'none'" in answer.headers.get("Content-Security-Policy", "")
        is_closed_to_others = answer.headers.get("Cross-Origin-Resource-Policy") == "same-origin"
        assert has_policy == is_closed_to_others == (status == 200)


def test_an_error_after_the_response_is_printed_in_one_short_line(capsys):
    async def closed_early(scope, receive, send):
        await PlainTextResponse("here")(scope, receive, send)
        raise RuntimeError("a\033[2J" + "long\n" * 1000)

    client = TestClient(add_guards(closed_early, [], LOCAL, public=False))
    assert client.get("/config", headers={"Host": "localhost"}).text == "here"
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError" in line
    assert line.isprintable()
    assert len(line) < 400


def test_values_from_a_browser_are_short_and_harmless_in_the_terminal():
    terminal = io.StringIO()
    print("Received:", "\033[2J" + "x" * 10**6, "end", sep="\n", file=ShortLines(terminal))
    first_line, long_line, last_line = terminal.getvalue().splitlines()
    assert (first_line, last_line) == ("Received:", "end")
    assert long_line.startswith("?[2Jxxx")
    assert len(long_line) == MAX_LINE_LENGTH


def test_large_bodies_are_refused_even_without_a_content_length(served):
    text = "x" * MAX_TEXT_LENGTH
    body = {"fn_index": 1, "session_hash": "large", "data": [text] * 9}
    assert served.ask(JOIN, "POST", body).status == 200
    body["data"] = [text] * 10
    assert served.ask(JOIN, "POST", body).status == 413
    # A body in chunks, without a Content-Length header
    connection = http.client.HTTPConnection(LOCAL, served.port, timeout=30)
    pieces = iter([b"x" * 2**14] * 20)
    connection.request("POST", JOIN, pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert MAX_BODY_BYTES < 20 * 2**14
