"""The MT-Bench judge: parsing of ratings, requests to a real local server, question files."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from bilora_diffusion.core.errors import UserError
from eval.cache import Cache
from eval.text_scores import mtbench
from eval.text_scores.models import Decoding
from eval.text_scores.mtbench import Judge, MTBench, Question
from tests.eval.text_score_models import judge

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


def test_ratings_are_read_from_replies():
    assert {text: mtbench.rating(text) for text in RATINGS} == RATINGS


def test_requests_to_the_judge_follow_the_protocol_without_other_services_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-service")
    with judge((503, "busy"), (429, "slow down"), "fine [[8]]") as endpoint:  # two retries
        assert ask(endpoint.url) == "fine [[8]]"
        body = endpoint.asked[-1]
        assert (body["model"], body["temperature"]) == ("judge-1", 0)
        assert body["messages"] == [{"role": "user", "content": "Good?"}]
        assert endpoint.headers[-1]["authorization"] == f"Bearer {SECRET}"
        ask(endpoint.url, key="")
    assert len(endpoint.asked) == 4
    assert "authorization" not in endpoint.headers[-1]
    assert "another-service" not in "".join(map(str, endpoint.headers))


def error_body(message):
    return json.dumps({"error": {"message": message}})


@pytest.mark.parametrize(
    ("status", "text", "requests", "reason"),
    [
        (401, error_body(f"key {SECRET} is unknown"), 1, "401.*unknown"),
        (500, error_body(f"failed on {SECRET}"), 3, "500.*failed on"),
        (200, "{}", 1, "not a chat completion"),
    ],
)
def test_the_error_of_a_failing_judge_does_not_contain_the_key(status, text, requests, reason):
    with judge((status, text)) as endpoint, pytest.raises(UserError, match=reason) as caught:
        ask(endpoint.url)
    assert endpoint.url in str(caught.value)
    assert len(endpoint.asked) == requests
    with pytest.raises(UserError, match="Connection"):  # the server is stopped
        ask(endpoint.url)
    assert SECRET not in f"{caught.value} {Judge('http://x/v1', 'm', SECRET)}"


def test_a_judge_is_set_by_the_command_line_and_the_environment(monkeypatch):
    monkeypatch.setenv(mtbench.KEY, SECRET)
    expected = Judge("http://localhost:1/v1", "m", SECRET)
    assert mtbench.connect("http://localhost:1/v1/", "m") == expected
    for url, model, sentence in (
        (None, "m", "--judge_base_url"),
        ("http://x/v1", None, "--judge_model"),
        ("localhost:8000", "m", '"localhost:8000" is not an address'),
        (f"https://me:{SECRET}@host/v1", "m", mtbench.KEY),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            mtbench.connect(url, model)
        assert SECRET not in str(caught.value)


def measure(url, folder):
    """Return the benchmark's measurement; all answers are cached, so no model is needed."""
    engine = MTBench(QUESTIONS, Judge(url, "judge-1", attempts=1), Decoding(8))
    digest = engine.settings()["questions"]
    for question in QUESTIONS:
        decoding = Decoding(8, temperature=question.temperature)
        cache = Cache(folder, {"decoding": asdict(decoding), "questions": digest})
        cache.put(question.id, f"answer to {question.id}")
    model: Any = None
    return engine.measure(model, "auto", 2, lambda about: Cache(folder, about))


def test_answers_are_rated_and_a_reply_without_a_rating_is_requested_again_and_counted(tmp_path):
    with judge("[[8]]", (500, "down"), "hm", "still hm", "[[4]]", "never") as endpoint:
        with pytest.raises(UserError, match="gave no answer"):
            measure(endpoint.url, tmp_path)
        measurement = measure(endpoint.url, tmp_path)  # continues where it stopped
        assert measure(endpoint.url, tmp_path) == measurement
        # No request was repeated.
        assert len(endpoint.asked) == 2 + 3 + mtbench.RATING_ATTEMPTS
    assert measurement.value == 6
    assert [item.score for item in measurement.items] == [8, 4, None]
    counts = {"items": 3, "without an answer": 1}
    assert measurement.all_metrics() == counts | {"category math": 4, "category writing": 8}
    # The first question has no reference answer, the second one does.
    haiku_request = endpoint.asked[0]["messages"][0]["content"]
    assert "Write a haiku." in haiku_request
    assert "answer to 81" in haiku_request
    assert "right answer" not in haiku_request
    sum_request = endpoint.asked[1]["messages"][0]["content"]
    assert "# A right answer, for comparison\n5" in sum_request
    with judge("nice") as endpoint, pytest.raises(UserError, match="none of the judge's replies"):
        measure(endpoint.url, tmp_path / "other")


def test_cached_answers_are_not_used_for_other_questions_with_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(mtbench, "answers", answered_by_echo)
    model: Any = None
    with judge("[[8]]", "[[4]]") as endpoint:
        for text in ("What is 2 + 2?", "Name a river."):
            questions = [Question("1", "math", text)]
            engine = MTBench(questions, Judge(endpoint.url, "judge-1"), Decoding(8))
            measurement = engine.measure(model, "auto", 2, lambda about: Cache(tmp_path, about))
            assert measurement.items[0].answer == f"answer to {text}"


def answered_by_echo(model, prompts, decoding, template, batch_size, cache):
    """Cache and return answers that name their question, instead of a model's answers."""
    for key, text in prompts.items():
        if key not in cache:
            cache.put(key, f"answer to {text}")
    return {key: cache.get(key) for key in prompts}


def test_questions_are_read_from_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["First.", "Second."]},
        {"prompt_id": 2, "category": "math", "prompt": ["2 + 3?"], "reference": ["5", "6"]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    questions = mtbench.questions(str(path))
    assert questions == [Question("81", "writing", "First."), Question("2", "math", "2 + 3?", "5")]
    assert [question.temperature for question in questions] == [0.7, 0.0]
    assert mtbench.questions(str(path), 1) == questions[:1]
    path.write_text('{"turns": ["a"]}\nno JSON', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2 .* JSON"):
        mtbench.questions(str(path))
    with pytest.raises(UserError, match="with --mtbench_questions"):
        mtbench.questions(None)  # tests have no access to the hub
