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
from eval.text import judge, mtbench
from eval.text.journal import Store
from eval.text.judge import Judge
from eval.text.mtbench import Question

SECRET = "sk-very-secret"


class Endpoint:
    """An OpenAI-compatible server; ``replies`` are given in turn, the last one for ever."""

    def __init__(self, *replies: str | tuple[int, str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._replies = list(replies)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers["Content-Length"])
        self.asked.append(json.loads(handler.rfile.read(length)))
        self.keys.append(handler.headers["Authorization"])
        reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        status, text = reply if isinstance(reply, tuple) else (200, _message(reply))
        if handler.path != "/v1/chat/completions":
            status, text = 404, "no such path"
        handler.send_response(status)
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


def ask(endpoint: Endpoint, waits: list[float] | None = None, **values: Any) -> str:
    asked = Judge(endpoint.url, "judge-1", **{"key": SECRET, "attempts": 3} | values)
    return asked.ask("How good?", sleep=(waits if waits is not None else []).append)


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


def test_the_judge_is_asked_as_the_protocol_says(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve("fine [[8]]")
    assert ask(endpoint) == "fine [[8]]"
    (body,) = endpoint.asked
    assert body["model"] == "judge-1"
    assert body["messages"] == [{"role": "user", "content": "How good?"}]
    assert body["temperature"] == 0
    assert endpoint.keys == [f"Bearer {SECRET}"]
    ask(endpoint, key="")
    assert endpoint.keys[-1] is None


def test_a_busy_judge_is_asked_again(serve: Callable[..., Endpoint]) -> None:
    waits: list[float] = []
    endpoint = serve((503, "busy"), (429, "slow down"), "[[4]]")
    assert ask(endpoint, waits) == "[[4]]"
    assert waits == [1.0, 2.0]
    broken = serve((200, "no JSON"), (200, '{"choices": []}'), "[[4]]")
    assert ask(broken) == "[[4]]"


def test_a_judge_that_refuses_is_not_asked_again(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve((401, f"the key {SECRET} is unknown"))
    with pytest.raises(UserError, match=r"refuses \(401 the key \*\*\* is unknown\)") as caught:
        ask(endpoint)
    assert len(endpoint.asked) == 1
    assert SECRET not in str(caught.value)


def test_a_judge_that_never_answers_is_given_up(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve((500, f"failed on {SECRET}"))
    with pytest.raises(UserError, match=r"no answer in 3 attempts \(500 failed on \*\*\*\)"):
        ask(endpoint)
    assert len(endpoint.asked) == 3
    endpoint.close()
    with pytest.raises(UserError, match="no answer in 3 attempts"):
        ask(endpoint)


def test_the_key_is_not_shown() -> None:
    assert SECRET not in repr(Judge("http://x/v1", "m", SECRET))


def test_what_names_no_judge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(judge.KEY, SECRET)
    assert judge.connect("http://localhost:1/v1/", "m") == Judge(
        "http://localhost:1/v1", "m", SECRET
    )
    for url, model in ((None, "m"), ("http://x/v1", None)):
        with pytest.raises(UserError, match="mtbench needs a judge: give --judge_base_url"):
            judge.connect(url, model)
    with pytest.raises(UserError, match="is no address"):
        judge.connect("localhost:8000", "m")
    with pytest.raises(UserError, match="holds a user name or a query") as caught:
        judge.connect(f"https://me:{SECRET}@host/v1", "m")
    assert SECRET not in str(caught.value)


QUESTIONS = [
    Question("81", "writing", "Write a haiku."),
    Question("111", "math", "What is 2 + 3?", "5"),
    Question("121", "coding", "Sort a list."),
]


def measure(endpoint: Endpoint, folder: Path) -> Any:
    store = Store(folder)
    replies = store.journal("answers", {"a": 1})
    for question in QUESTIONS:
        if question.id not in replies.values:
            replies.add(question.id, f"answer to {question.id}")
    return mtbench.measure(
        None,  # type: ignore[arg-type]  # every answer is there already
        QUESTIONS,
        Judge(endpoint.url, "judge-1", attempts=1),
        replies,
        store.journal("ratings", {"b": 1}),
        decoding=mtbench.Decoding(8),
        template="auto",
        batch_size=2,
        advance=lambda _: None,
    )


def test_answers_are_rated_and_what_can_not_be_read_is_asked_again_and_counted(
    serve: Callable[..., Endpoint], tmp_path: Path
) -> None:
    endpoint = serve("[[8]]", "hm", "still hm", "[[4]]", "never")
    found = measure(endpoint, tmp_path)
    assert found.value == 6
    assert [item.score for item in found.items] == [8, 4, None]
    assert found.unparsed == 1
    assert found.others == {"category math": 4, "category writing": 8}
    assert len(endpoint.asked) == 1 + 3 + mtbench.ASKED_AGAIN
    prompts = [body["messages"][0]["content"] for body in endpoint.asked]
    assert "Write a haiku." in prompts[0]
    assert "answer to 81" in prompts[0]
    assert "right answer" not in prompts[0]
    assert "# A right answer, for comparison\n5" in prompts[1]
    assert len(measure(endpoint, tmp_path).items) == 3
    assert len(endpoint.asked) == 1 + 3 + mtbench.ASKED_AGAIN  # nothing was asked twice


def test_rating_goes_on_where_it_stopped(serve: Callable[..., Endpoint], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no answer in 1 attempts"):
        measure(serve("[[8]]", (500, "down")), tmp_path)
    endpoint = serve("[[2]]")
    assert measure(endpoint, tmp_path).value == 4
    assert len(endpoint.asked) == 2


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
    assert mtbench.digest(found) != mtbench.digest(found[:1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "question 1 of .* has no first turn"),
        ("[1]", "question 1 of .* has no first turn"),
        ('{"turns": [3]}', "question 1 of .* has no first turn"),
        ('{"turns": ["a"]}\nno JSON', "line 2 of .* is no JSON"),
        (
            '{"turns": ["a"], "question_id": 1}\n{"turns": ["b"], "question_id": 1}',
            "question 1 twice",
        ),
        ("", "holds no question"),
    ],
)
def test_bad_questions_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        mtbench.questions(str(path))
    with pytest.raises(UserError, match="can't be read as text"):
        mtbench.questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="give them as a JSONL file by --mtbench_questions"):
        mtbench.questions(None)  # the hub is out of reach in tests
