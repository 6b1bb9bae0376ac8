"""Run records, harness tasks and a judge's server, for the tests of text scores."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bilora_diffusion.run.runlog import RunLog
from tests.text.text_builders import write_rows

Rows = Sequence[tuple[int, dict[str, float]]]
ROWS: Rows = [(1, {"loss": 1.0}), (2, {"heldout_loss": 2.0, "heldout_accuracy": 0.5})]


def save_record(
    folder: Path, method: str = "lora", seed: int = 0, rows: Rows = ROWS, **config: Any
) -> Path:
    """Write a run folder without weights; its ``metrics.jsonl`` has a line for each of ``rows``."""
    log = RunLog(folder)
    options = {"model_name_or_path": "owner/base", "task_type": "causal", "task": "cola"}
    run_options = {"method": method, "seed": seed}
    log.start(options | config | run_options, method=method, seed=seed, resume_step=None)
    for step, metrics in rows:
        log.metric(step, **metrics)
    log.close("finished")
    return folder


def save_tasks(folder: Path) -> Path:
    """Write two local harness tasks with twelve items each: ``toy_choice`` and ``toy_text``."""
    folder.mkdir()
    questions = [{"question": f"Letter {n}?", "gold": n % 2, "answer": str(n)} for n in range(12)]
    data = str(write_rows(folder / "rows.jsonl", questions))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data, "train": data}},
        "test_split": "test",
        "training_split": "train",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1.0},
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    digits = [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]
    tasks = {
        "toy_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": ["A", "B"],
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "toy_text": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
            "filter_list": [{"name": "digits", "filter": digits}],
        },
    }
    for name, task in tasks.items():  # YAML reads JSON
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    return folder


@contextmanager
def judge(*replies: str | tuple[int, str]) -> Iterator[SimpleNamespace]:
    """Run an OpenAI-compatible server; yields its URL, and the bodies and headers of its requests.

    Args:
        replies: text of each reply, or its status and body. They are sent in this order, and the
            last one is repeated.
    """
    remaining = list(replies)
    endpoint = SimpleNamespace(asked=[], headers=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            endpoint.asked.append(json.loads(self.rfile.read(length)))
            endpoint.headers.append(self.headers)
            reply = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if isinstance(reply, tuple):
                status, text = reply
            else:
                message = {"role": "assistant", "content": reply}
                status, text = 200, json.dumps({"choices": [{"message": message}]})
            self.send_response(status if self.path == "/v1/chat/completions" else 404)
            self.send_header("retry-after-ms", "1")  # keeps the tests fast
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield endpoint
        server.shutdown()
