"""The judge: how ratings are read, and how an endpoint is asked, against a real local server."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from eval.cache import Cache
from eval.text_scores import mtbench
from eval.text_scores.models import Decoding
from eval.text_scores.mtbench import Judge, MTBench, Question
from tests.eval import text_score_models as models

SECRET = "sk-very-secret"
RATINGS: dict[str, float | None] = {
    "It is good. Rating: [[8]]": 8,
    "For example [[5]] would be average. I give [[9]].": 9,
    "[[Rating: 6]]": 6,
    "**Rating:** 7/10": 7,
    "My verdict is [3].": 3,
    "[[rating]]": None,
    "[[11]] [[0]]": None,
    "[[42]], but really [[2]]": 2,
    "It has 8 good points.": None,
}
QUESTIONS = [
    Question("81", "writing", "Write a haiku."),
    Question("111", "math", "What is 2 + 3?", "5"),
    Question("121", "coding", "Sort a list."),
]


def ask(url, key=SECRET):
    return Judge(url, "judge-1", key=key, attempts=3).ask("Good?")


def test_ratings_are_read():
    assert {text: mtbench.rating(text) for text in RATINGS} == RATINGS


def test_the_judge_is_asked_as_the_protocol_says_and_is_told_of_no_other_service(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-service")
    with models.judge((503, "busy"), (429, "slow down"), "fine [[8]]") as endpoint:
        assert ask(endpoint.url) == "fine [[8]]"
        *_, body = endpoint.asked
        assert (body["model"], body["temperature"]) == ("judge-1", 0)
        assert body["messages"] == [{"role": "user", "content": "Good?"}]
        assert endpoint.headers[-1]["authorization"] == f"Bearer {SECRET}"
        ask(endpoint.url, key="")
    assert len(endpoint.asked) == 4
    assert "authorization" not in endpoint.headers[-1]
    assert "another-service" not in "".join(map(str, endpoint.headers))


@pytest.mark.parametrize(
    ("reply", "requests", "told"),
    [
        ((401, json.dumps({"error": {"message": f"key {SECRET} is unknown"}})), 1, "401.*unknown"),
        ((500, json.dumps({"error": {"message": f"failed on {SECRET}"}})), 3, "500.*failed on"),
        ((200, "{}"), 1, "not a chat completion"),
    ],
)
def test_a_judge_that_gives_no_answer_is_refused_without_its_key(reply, requests, told):
    sentences = []
    with models.judge(reply) as endpoint:
        with pytest.raises(UserError, match=told) as caught:
            ask(endpoint.url)
        sentences.append(str(caught.value))
    assert len(endpoint.asked) == requests
    with pytest.raises(UserError, match="Connection") as caught:  # now there is none
        ask(endpoint.url)
    sentences.append(str(caught.value))
    assert all(endpoint.url in sentence for sentence in sentences)
    assert SECRET not in f"{sentences} {Judge('http://x/v1', 'm', SECRET)}"


def test_the_command_line_and_the_environment_name_a_judge(monkeypatch):
    monkeypatch.setenv(mtbench.KEY, SECRET)
    expected = Judge("http://localhost:1/v1", "m", SECRET)
    assert mtbench.connect("http://localhost:1/v1/", "m") == expected
    for url, model, told in (
        (None, "m", "--judge_base_url"),
        ("http://x/v1", None, "--judge_model"),
        ("localhost:8000", "m", '"localhost:8000" is not an address'),
        (f"https://me:{SECRET}@host/v1", "m", mtbench.KEY),
    ):
        with pytest.raises(UserError, match=told) as caught:
            mtbench.connect(url, model)
        assert SECRET not in str(caught.value)


def measure(url, folder):
    asked = MTBench(QUESTIONS, Judge(url, "judge-1", attempts=1), Decoding(8))
    for question in QUESTIONS:  # every answer is there already, so that no model is asked
        decoding = Decoding(8, temperature=question.temperature)
        written = Cache(folder, {"decoding": asdict(decoding)})
        written.item(question.id, lambda name=question.id: f"answer to {name}")
    nobody: Any = None
    return asked.measure(nobody, "auto", 2, lambda about: Cache(folder, about))


def test_answers_are_rated_and_what_can_not_be_read_is_asked_again_and_counted(tmp_path):
    with models.judge("[[8]]", (500, "down"), "hm", "still hm", "[[4]]", "never") as endpoint:
        with pytest.raises(UserError, match="gave no answer"):
            measure(endpoint.url, tmp_path)
        found = measure(endpoint.url, tmp_path)  # goes on where it stopped
        assert len(endpoint.asked) == 2 + 3 + mtbench.RATING_ATTEMPTS
        assert measure(endpoint.url, tmp_path) == found
        assert len(endpoint.asked) == 2 + 3 + mtbench.RATING_ATTEMPTS  # nothing was asked twice
    assert found.value == 6
    assert [item.score for item in found.items] == [8, 4, None]
    assert found.all_figures() == {
        "items": 3,
        "without an answer": 1,
        "category math": 4,
        "category writing": 8,
    }
    first, second = (endpoint.asked[n]["messages"][0]["content"] for n in (0, 1))
    assert "Write a haiku." in first
    assert "answer to 81" in first
    assert "right answer" not in first
    assert "# A right answer, for comparison\n5" in second
    with (
        models.judge("nice") as endpoint,
        pytest.raises(UserError, match="no rating could be read"),
    ):
        measure(endpoint.url, tmp_path / "other")


def test_questions_are_read_from_a_file(tmp_path):
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
    path.write_text('{"turns": ["a"]}\nno JSON', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 .* JSON"):
        mtbench.questions(str(path))
    with pytest.raises(UserError, match="by --mtbench_questions"):
        mtbench.questions(None)  # the hub is out of reach in tests
