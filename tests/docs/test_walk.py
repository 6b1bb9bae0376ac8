"""The commands of README and of each page run in order, each page in a fresh folder."""

import re

import pytest

from eval.results import table
from tests.docs.pages import DOCS, README, ROOT
from tests.docs.stand_ins import stand_ins
from tests.docs.walk import Walk

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hub"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Install the stand-ins for all pages, and yield the values of names in braces."""
    with stand_ins(tmp_path_factory.mktemp("stand_ins")) as names:
        yield names


@pytest.fixture
def reader(tmp_path, monkeypatch, names):
    """Return ``reader(page)``, which runs a page's commands in a fresh folder and yields the steps.

    The viewer is started only for README.
    """
    monkeypatch.chdir(tmp_path)

    def read(page):
        return Walk(tmp_path, names, has_viewer=page == README).page(page)

    return read


def test_the_commands_of_the_readme_run_in_order_and_write_the_files_that_it_names(
    reader, tmp_path
):
    names = [step.name for step in reader(README)]
    for name in ("app.viewer", "eval.clip_scores", "bilora_diffusion.export"):
        assert name in names
    text = README.read_text(encoding="utf-8")
    _, _, after_heading = text.partition("## What is in the run folder")
    section = after_heading.partition("\n## ")[0]
    files = re.findall("`(.*?)`", section)
    assert len(files) > 5
    for name in files:
        if not name.endswith(".comfy.json"):  # ComfyUI does not read the miniature
            assert (tmp_path / "runs" / "dog" / name).exists(), name


def pages():
    """Yield all pages but README; the pages in results/ take long, so they are marked matrix."""
    for page in DOCS:
        marks = [pytest.mark.matrix] if page.parent.name == "results" else []
        yield pytest.param(page, marks=marks, id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", list(pages()))
def test_the_commands_of_a_page_run_in_order(page, reader, tmp_path):
    for _ in reader(page):
        pass
    if page.name == "paper.md":
        glue = table.read(tmp_path / "runs" / "scores" / "glue")
        assert set(glue.groups) == {"LoRA", "LoRA-SAM", "Bi-LoRA", "Full FT"}
        for group in glue.groups:
            assert len(glue.members(group)) == 5  # five tasks with one seed
