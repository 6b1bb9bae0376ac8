"""Settings of all tests: no network, one thread per process, separate caches.

The environment is set here, at import, because the libraries read it when they are first imported,
and because the processes that tests start inherit it.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

os.environ.update(
    HF_HUB_OFFLINE="1",  # huggingface_hub, transformers, diffusers and datasets obey it
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
    MPLBACKEND="Agg",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not _IS_WORKER:  # workers share the folder of the process that started them
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="bilora-tests-")
    os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["HF_HOME"], "cache")
# With a launcher's variables, a script under test would act as one of several processes.
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

import hypothesis  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# The same examples on every machine, and no deadline: the first call of an operator is always slow.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a hub on which the miniature is every image model, and every language model exists.

    The kind of a language model is that of `--task_type`; the default is causal.
    """
    from bilora_diffusion import mini
    from bilora_diffusion.text import models

    text_source = models.TextSource

    def source(options: Any) -> Any:
        if os.path.isdir(options.model_name_or_path):
            return text_source(options)
        return SimpleNamespace(kind=options.task_type.replace("auto", "causal"))

    folder = mini.pipeline_dir()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file, **__: folder / file)
    monkeypatch.setattr(models, "TextSource", source)


@pytest.fixture(autouse=True)
def _foreground() -> Iterator[None]:
    """Make Ctrl-C interrupt this process and its children, and restore its handler after the test.

    A shell starts its background jobs with Ctrl-C ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no process starts one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # a stable sort keeps files together


def pytest_unconfigure() -> None:
    """Remove the caches that the tests filled."""
    if not _IS_WORKER:
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
