"""What goes to the hub: a run folder without checkpoints, and without places on this machine."""

import json
from pathlib import Path
from typing import Any

from bilora_diffusion.run import publish
from bilora_diffusion.run.runlog import RunLog, read_run


def test_no_path_of_this_machine_is_published(tmp_path, monkeypatch):
    home = str(Path("/", "home", "Jane Doe", "clients", "acme"))
    log = RunLog(tmp_path)
    config = {
        "pretrained_model_name_or_path": "owner/base",
        "instance_data_dir": f"{home}/images",
        "output_dir": str(tmp_path),
        "validation_prompts": ["a cat and/or a dog"],
        "learning_rate": 1e-4,
    }
    log.start(config, method="lora", seed=0, resume_step=None)
    log.metric(1, loss=0.5)
    log.close("finished")
    own = {"_name_or_path": f"{home}/base", "sample_size": 64}
    for name in ("unet/config.json", "adapter_config.json", "checkpoints/step-1/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(own))
    (tmp_path / "fit.json").write_text(json.dumps({"settings": config, "steps": [0]}))
    sent: dict[str, bytes] = {}
    folders: list[dict[str, Any]] = []

    def commit(repo_id: str, operations: list[Any], **_: Any) -> None:
        sent.update((one.path_in_repo, one.path_or_fileobj) for one in operations)

    monkeypatch.setattr(publish, "upload_folder", lambda **given: folders.append(given))
    monkeypatch.setattr(publish, "create_commit", commit)
    publish.push(tmp_path, "me/run", None)
    assert set(sent) == {"run.json", "fit.json", "unet/config.json", "adapter_config.json"}
    left = publish.filter_repo_objects(
        [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()],
        ignore_patterns=folders[0]["ignore_patterns"],
    )
    assert list(left) == ["metrics.jsonl"]
    for content in sent.values():
        assert b"Jane" not in content
        assert str(tmp_path).encode() not in content
    assert json.loads(sent["adapter_config.json"]) == own | {"_name_or_path": "base"}
    told = json.loads(sent["run.json"])["config"]
    assert told == config | {"instance_data_dir": "images", "output_dir": tmp_path.name}
    assert read_run(tmp_path)["config"] == config, "the folder itself keeps them"
