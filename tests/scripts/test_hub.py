"""Runs with ``--push_to_hub``, which create the repository before training and upload after it."""

import json
import re
from types import SimpleNamespace

import pytest

from bilora_diffusion.core.errors import UserError
from bilora_diffusion.run import hub, runlog
from tests.scripts.runs import column, weights
from tests.text.text_builders import material, train_text

PUSH = {"push_to_hub": True, "hub_token": "hf_secret", "method": "lora", "checkpointing_steps": 1}


class Hub:
    """Replacements for the hub's functions that a run calls.

    `calls` records the calls. `errors` has the exception that a function raises, by its name.
    """

    def __init__(self, monkeypatch):
        self.calls = []
        self.errors = {}
        for name in ("create_repo", "auth_check", "upload_folder", "create_commit"):
            monkeypatch.setattr(hub, name, self.function(name))

    def function(self, name):
        def call(*arguments, **options):
            if name == "create_commit":
                options["operations"] = arguments[1]
            self.calls.append((name, options))
            if name in self.errors:
                raise self.errors[name]
            repo_id = options.get("repo_id", "")
            if "/" not in repo_id:  # the hub adds the user's name
                repo_id = f"me/{repo_id}"
            return SimpleNamespace(repo_id=repo_id)

        return call


@pytest.fixture
def stub_hub(monkeypatch):
    return Hub(monkeypatch)


@pytest.mark.slow
def test_a_run_is_pushed_to_a_repository_with_its_name(tmp_path, stub_hub):
    run = train_text(tmp_path / "icons", **material("classification"), **PUSH)
    names = [name for name, _ in stub_hub.calls]
    assert names == ["create_repo", "auth_check", "upload_folder", "create_commit"]
    repository, access, upload, commit = [options for _, options in stub_hub.calls]
    assert repository == {"repo_id": "icons", "exist_ok": True, "token": "hf_secret"}
    assert access == {"token": "hf_secret", "write": True}
    # The id that the hub returned, not the requested name
    assert upload["repo_id"] == "me/icons"
    assert upload["folder_path"] == run
    assert upload["token"] == commit["token"] == "hf_secret"
    assert "me/icons" in (run / "README.md").read_text(encoding="utf-8")
    assert "hf_secret" not in (run / runlog.RUN).read_text()
    # The published record is that of a finished run.
    assert runlog.read_run(run)["status"] == "finished"
    contents = {op.path_in_repo: op.path_or_fileobj for op in commit["operations"]}
    record = json.loads(contents[runlog.RUN])
    assert record["status"] == "finished"
    assert record["results"]["steps"] == 2


@pytest.mark.parametrize("name", ["create_repo", "auth_check"])
def test_a_refused_repository_gives_one_sentence_before_training(name, tmp_path, stub_hub):
    stub_hub.errors[name] = OSError("403 Forbidden.")
    values = {**material("classification"), **PUSH, "hub_model_id": "them/run"}
    sentence = r"--push_to_hub cannot write to the repository 'them/run' \(403 Forbidden\): log in"
    with pytest.raises(UserError, match=sentence):
        train_text(tmp_path / "run", **values)
    assert stub_hub.calls[-1][0] == name
    assert not (tmp_path / "run" / runlog.RUN).exists()


@pytest.mark.parametrize("name", ["upload_folder", "create_commit"])
def test_a_failed_upload_leaves_the_run_complete_and_names_the_command(name, tmp_path, stub_hub):
    stub_hub.errors[name] = OSError("no connection")
    folder = tmp_path / "run"
    with pytest.raises(UserError) as error:
        train_text(folder, **material("classification"), **PUSH, hub_model_id="them/run")
    sentence = str(error.value)
    assert f"{folder} is complete, but the upload to 'them/run' failed (no connection)" in sentence
    # The command uploads neither checkpoints nor files with paths of this machine.
    for pattern in ("'checkpoints/*'", "run.json"):
        assert re.search(rf"hf upload them/run {folder} .*--exclude {re.escape(pattern)}", sentence)
    assert runlog.read_run(folder)["status"] == "finished"
    assert column(folder, "step") == [1, 2]
    assert weights(folder)
    assert (folder / "README.md").exists()
