"""Fixtures: a UNet and two text encoders with adapters, and their exported files."""

from pathlib import Path

import pytest
from torch import nn

from tests.export.export_models import all_models, export_all


@pytest.fixture(scope="session")
def models() -> dict[str, nn.Module]:
    return all_models(rank=4, alpha=6)


@pytest.fixture(scope="session")
def folder(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_all(tmp_path_factory.mktemp("export") / "icons", models)
