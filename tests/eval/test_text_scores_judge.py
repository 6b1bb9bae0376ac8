"""The judge: how ratings are read, and how an endpoint is asked, against a real local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bilora_diffusion.errors import UserError
from eval.kept import Kept
from eval.text_scores import judge, mtbench
from eval.text_scores.generate import Decoding
from eval.text_scores.judge import Judge
from eval.text_scores.mtbench import MTBench, Question

SECRET = "sk-very-secret"


class Endpoint:
    """An OpenAI-compatible server; ``replies`` are given in turn, the last one for ever."""

    def __init__(self, *replies: str | tuple[int, str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._replies = list(replies)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        self.asked.append(json.loads(handler.rfile.read(length)))
        self.headers.append({k.lower(): v for k, v in handler.headers.items()})
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        status, text = reply if isinstance(reply, tuple) else (200, _message(reply))
        if handler.path != "/v1/chat/completions":
            status, text = 404, "no such path"
        handler.send_response(status)
        handler.send_header("retry-after-ms", "1")  # a test is not to wait for longer
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.wfile.write(text.encode())

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _message(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    made: list[Endpoint] = []

    def start(*replies: str | tuple[int, str]) -> Endpoint:
        made.append(Endpoint(*replies))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


def ask(endpoint: Endpoint, **values: Any) -> str:
    return Judge(endpoint.url, "judge-1", **{"key": SECRET, "attempts": 3} | values).ask("Good?")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is good. Rating: [[8]]", 8),
        ("[[7.5]]", 7.5),
        ("For example [[5]] would be average. I give [[9]].", 9),
        ("[[ 10 ]]", 10),
        ("[[Rating: 6]]", 6),
        ("[[8/10]]", 8),
        ("**Rating:** 7/10", 7),
        ("rating: [4]", 4),
        ("My verdict is [3].", 3),
        ("[[rating]]", None),
        ("[[11]] [[0]]", None),
        ("[[42]], but really [[2]]", 2),
        ("no number", None),
        ("", None),
        ("It has 8 good points.", None),
    ],
)
def test_ratings_are_read(text: str, expected: float | None) -> None:
    assert judge.rating(text) == expected


def test_the_judge_is_asked_as_the_protocol_says_and_is_told_of_no_other_service(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-service")
    endpoint = serve("fine [[8]]")
    assert ask(endpoint) == "fine [[8]]"
    (body,), (headers,) = endpoint.asked, endpoint.headers
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert body["messages"] == [{"role": "user", "content": "Good?"}]
    assert headers["authorization"] == f"Bearer {SECRET}"
    ask(endpoint, key="")
    assert "authorization" not in endpoint.headers[-1]
    assert "another-service" not in str(endpoint.headers)


def test_a_busy_judge_is_asked_again(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve((503, "busy"), (429, "slow down"), "[[4]]")
    assert ask(endpoint) == "[[4]]"


@pytest.mark.parametrize(
    ("reply", "requests", "told"),
    [
        ((401, f"the key {SECRET} is unknown"), 1, "401"),
        ((500, f"failed on {SECRET}"), 3, "500"),
        ((200, "<html>"), 1, "gave no answer"),
        ((200, "{}"), 1, "no chat completion"),
        (None, 0, "Connection"),
    ],
)
def test_a_judge_that_gives_no_answer_is_refused_without_its_key(
    reply: tuple[int, str] | None, requests: int, told: str, serve: Callable[..., Endpoint]
) -> None:
    endpoint = serve(reply or "")
    if reply is None:
        endpoint.close()
    with pytest.raises(UserError, match=told) as caught:
        ask(endpoint)
    assert len(endpoint.asked) == requests
    assert endpoint.url in str(caught.value)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(Judge("http://x/v1", "m", SECRET))


@pytest.mark.parametrize(
    ("url", "model", "told"),
    [
        (None, "m", "--judge_base_url"),
        ("http://x/v1", None, "--judge_model"),
        ("localhost:8000", "m", '"localhost:8000" is no address'),
        (f"https://me:{SECRET}@host/v1", "m", judge.KEY),
    ],
)
def test_what_names_no_judge_is_refused(url: str | None, model: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        judge.connect(url, model)
    assert SECRET not in str(caught.value)


def test_a_judge_is_the_endpoint_with_the_key_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(judge.KEY, SECRET)
    assert judge.connect("http://localhost:1/v1/", "m") == Judge(
        "http://localhost:1/v1", "m", SECRET
    )


QUESTIONS = [
    Question("81", "writing", "Write a haiku."),
    Question("111", "math", "What is 2 + 3?", "5"),
    Question("121", "coding", "Sort a list."),
]


def measure(endpoint: Endpoint, folder: Path) -> Any:
    asked = MTBench(QUESTIONS, Judge(endpoint.url, "judge-1", attempts=1), Decoding(8))
    for question in QUESTIONS:  # every answer is there already, so that no model is asked
        decoding = Decoding(8, temperature=question.temperature).record()
        written = Kept(folder, {"decoding": decoding})
        written.piece(question.id, lambda name=question.id: f"answer to {name}")
    return asked.measure(None, "auto", 2, lambda about: Kept(folder, about))  # type: ignore


def test_answers_are_rated_and_what_can_not_be_read_is_asked_again_and_counted(
    serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    endpoint = serve("[[8]]", "hm", "still hm", "[[4]]", "never")
    found = measure(endpoint, tmp_path)
    assert found.value == 6
    assert [item.score for item in found.items] == [8, 4, None]
    assert found.further() == {
        "items": 3,
        "without an answer": 1,
        "category math": 4,
        "category writing": 8,
    }
    assert len(endpoint.asked) == 1 + 3 + mtbench.ASKED_AGAIN
    prompts = [body["messages"][0]["content"] for body in endpoint.asked]
    assert "Write a haiku." in prompts[0]
    assert "answer to 81" in prompts[0]
    assert "right answer" not in prompts[0]
    assert "# A right answer, for comparison\n5" in prompts[1]
    assert len(measure(endpoint, tmp_path).items) == 3
    assert len(endpoint.asked) == 1 + 3 + mtbench.ASKED_AGAIN  # nothing was asked twice


def test_rating_goes_on_where_it_stopped(serve: Callable[..., Endpoint], tmp_path: Path) -> None:
    endpoint = serve("[[8]]", (500, "down"), "[[2]]")
    with pytest.raises(UserError, match="gave no answer"):
        measure(endpoint, tmp_path)
    assert measure(endpoint, tmp_path).value == 4
    assert len(endpoint.asked) == 4


def test_a_judge_that_rates_nothing_is_refused(
    serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no rating could be read"):
        measure(serve("nice"), tmp_path)


def test_questions_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["First.", "Second."]},
        {"prompt_id": 2, "category": "math", "prompt": ["2 + 3?"], "reference": ["5", "6"]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    found = mtbench.questions(str(path))
    assert found == [Question("81", "writing", "First."), Question("2", "math", "2 + 3?", "5")]
    assert [question.temperature for question in found] == [0.7, 0.0]
    assert mtbench.questions(str(path), 1) == found[:1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "line 1 .* turns"),
        ('{"turns": [3]}', "line 1 .* turns"),
        ("[1]", "line 1"),
        ('{"turns": {"a": 1}}', "line 1 .* turns"),
        ('{"turns": ["a"]}\nno JSON', "line 2 .* JSON"),
        ('{"turns": ["a"], "question_id": 1}\n{"turns": ["b"], "question_id": 1}', "1 twice"),
        ("", "no question: give another"),
        (None, "correct the path"),
    ],
)
def test_bad_questions_are_refused(text: str | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told):
        mtbench.questions(str(path))


def test_questions_that_the_hub_does_not_give_are_asked_for_as_a_file() -> None:
    with pytest.raises(UserError, match="by --mtbench_questions"):
        mtbench.questions(None)  # the hub is out of reach in tests
