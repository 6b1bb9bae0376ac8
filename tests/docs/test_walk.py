"""The commands of README and of each page run one after another, each page in a fresh folder."""

import re

import pytest

from bilora_diffusion import mini
from eval import table
from tests.docs.pages import BLOCK, ROOT
from tests.docs.stand_ins import stand_ins
from tests.docs.walk import Walk

README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "results").glob("*.md"))]
CODE_STAND_INS = {
    "stabilityai/stable-diffusion-xl-base-1.0": str(mini.pipeline_dir()),
    "torch.float16": "torch.float32",
    "cuda": "cpu",
}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hub"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What words in braces stand for in commands; the stand-ins of all pages are in place."""
    with stand_ins(tmp_path_factory.mktemp("stand_ins")) as names:
        yield names


@pytest.fixture
def walk(tmp_path, monkeypatch, names):
    monkeypatch.chdir(tmp_path)
    return Walk(tmp_path, names)


def test_the_commands_of_the_readme_run_in_their_order_and_its_code_loads_what_they_left(
    walk, tmp_path
):
    names = [step.name for step in walk.page(README)]
    for name in ("app.viewer", "eval.clip_scores", "bilora_diffusion.export"):
        assert name in names
    text = README.read_text(encoding="utf-8")

    (code,) = (body for _, body in BLOCK.findall(text) if "StableDiffusionXLPipeline" in body)
    for pattern, stand_in in CODE_STAND_INS.items():
        assert pattern in code
        code = code.replace(pattern, stand_in)
    *statements, expression = code.strip().splitlines()
    variables = {}
    exec(compile("\n".join(statements), "README.md", "exec"), variables)
    assert eval(expression, variables).size == (64, 64)

    _, _, section = text.partition("## What lies in the run folder")
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 5
    for name in re.findall("`(.*?)`", " ".join(rows)):
        assert list((tmp_path / "runs" / "dog").glob(name.replace("-N", "-*"))), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run_in_their_order(page, walk):
    for _ in walk.page(page):
        pass
    if page.name == "paper.md":
        glue = table.read(walk.folder / "runs" / "scores" / "glue")
        assert set(glue.groups) == {"LoRA", "LoRA-SAM", "Bi-LoRA", "Full FT"}
        assert all(len(glue.members(group)) == 5 for group in glue.groups)
