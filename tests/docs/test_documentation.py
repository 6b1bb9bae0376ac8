"""Every command on the pages is accepted by its real parser, and every Python block compiles.

Bash expands the commands (`tests.docs.pages`).
"""

import argparse
import ast
import re
import tomllib
from typing import Any

import pytest
import torch
from PIL import Image

from bilora_diffusion.api import BiLoRA
from bilora_diffusion.config import constraints
from bilora_diffusion.image.config import resolve
from bilora_diffusion.text.config import resolve as resolve_text
from docs import make
from tests.docs.pages import (
    AGENTS,
    BLOCK,
    CONTRIBUTING,
    DOCS,
    IMAGE_SCRIPT,
    README,
    ROOT,
    TEXT_SCRIPT,
    commands,
    load_program,
    program,
    scripts,
)
from tests.docs.walk import RULES, understood
from tests.references.diffusers_flags import DEFAULTS

pytestmark = pytest.mark.usefixtures("hub")

PAGES = [README, CONTRIBUTING, AGENTS, *DOCS]
TRAINING = {IMAGE_SCRIPT: resolve, TEXT_SCRIPT: resolve_text}


class Understood(BaseException):
    """Raised when a parser has accepted all arguments."""


def check(words, monkeypatch):
    """Check that a command is valid; for training commands, also the combination of options."""
    name, arguments = program(words)
    if name == "make":
        makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
        targets = re.findall(r"^([\w./-]+):", makefile, re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif name == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert arguments[0] in ("install", "wheel")
        for names in re.findall(r"\.\[(.*?)\]", " ".join(arguments)):  # such as .[app,scores]
            assert set(names.split(",")) <= project["optional-dependencies"].keys()
    elif name == "pytest":
        for word in arguments:
            assert not word.startswith("tests/") or (ROOT / word).exists()
    elif name == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif name in ("activate", "venv"):  # as for the environment that `make` creates
        assert arguments in ([], [".venv"])
    elif name in TRAINING:
        TRAINING[name](arguments)
    else:
        check_module(load_program(name), arguments, monkeypatch)


def check_module(module, argv, monkeypatch):
    """Run a command, and stop it when its parser has accepted the arguments."""
    original = argparse.ArgumentParser.parse_known_args

    def stopping(self, *args, **kwargs):
        namespace, unknown_flags = original(self, *args, **kwargs)
        if not unknown_flags:
            raise Understood
        return namespace, unknown_flags

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stopping)
        with pytest.raises(Understood):
            module.main(argv)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_accepted_by_its_parser(page, tmp_path, monkeypatch):
    for name in ("my_photos", "held_out"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    for name in ("answers.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    for lora in ("zimage_turbo_training_adapter_v2", "sdxl_lightning_8step_lora"):
        (tmp_path / f"{lora}.safetensors").touch()
    for name in ("recipes", "eval", "bilora_diffusion"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    page_commands = []
    for script in scripts(page):
        page_commands += commands(script, tmp_path)
    for words in page_commands:
        check(words, monkeypatch)
    if page.name in ("README.md", "guide.md", "paper.md", "models.md"):
        assert len(page_commands) > 3  # these pages consist mainly of commands


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_the_docstring_of_an_example_shows_the_command_that_runs_it(example, tmp_path, monkeypatch):
    docstring = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8"))) or ""
    # Commands are the indented lines.
    script = "".join(re.findall(r"^    .*\n", docstring, re.MULTILINE))
    example_commands = commands(script, tmp_path)
    assert any(f"examples/{example.name}" in words for words in example_commands)
    for words in example_commands:
        name, arguments = program(words)
        if name != "examples/minimal.py":
            check(words, monkeypatch)
        else:
            assert not arguments  # it has no parser


def anchors(page):
    """Return the anchors of a page's headings, in GitHub's form."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    names = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        names.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return names


def test_the_walk_has_a_rule_for_every_command_and_no_unused_rule(tmp_path):
    rules = set()
    for page in (README, *DOCS):
        for script in scripts(page):
            for words in commands(script, tmp_path):
                _, rule = understood(words)
                rules.add(rule)
    assert rules == set(RULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_has_a_target_and_the_python_compiles(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"
    for language, body in BLOCK.findall(text):
        if language == "python":
            compile(body, page.name, "exec")


def test_the_files_that_contributing_names_exist():
    text = CONTRIBUTING.read_text(encoding="utf-8")
    files = [path.as_posix() for path in ROOT.glob("*.*")]
    for folder in ("bilora_diffusion", "app", "eval", "docs", "examples", "tests"):
        files += [path.as_posix() for path in (ROOT / folder).rglob("*.*")]
    names = set(re.findall(r"`([\w./]+\.(?:py|toml|yaml))`", text))
    assert len(names) > 60
    # Tables have paths below a folder, or only the file's name.
    missing = [name for name in names if not any(file.endswith(f"/{name}") for file in files)]
    assert missing == ["bilora_diffusion/methods/NAME.py"]


def test_the_readme_is_short_and_its_loop_trains():
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    (example,) = (body for _, body in BLOCK.findall(readme) if "attach(model" in body)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Tanh(), torch.nn.Linear(12, 12))
    names: dict[str, Any] = {"model": model, "torch": torch}
    exec(compile(example, "README.md", "exec"), names)
    inputs, losses = torch.randn(4, 12), []
    for _ in range(20):
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert 0 < names["bilora"].auxiliary_norm() <= 0.05 * (1 + 1e-6)


def generated_pages():
    """Return the names of all generated pages; two are slow, as they count large models' memory."""
    names = []
    for name in make.PAGES:
        is_slow = name in ("../README.md", "models.md")
        names.append(pytest.param(name, marks=[pytest.mark.slow] if is_slow else []))
    return names


@pytest.mark.parametrize("name", generated_pages())
def test_a_generated_page_is_up_to_date(name):
    content = (make.FOLDER / name).read_text(encoding="utf-8")
    assert content == make.page(name), "the page is out of date: run `python -m docs.make`"


def test_every_picture_is_small_and_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in make.FOLDER.rglob("*.png"):
        assert path.relative_to(make.FOLDER).as_posix() in text
        assert path.stat().st_size < 200_000, path


def test_the_pages_list_every_flag_constraint_and_method():
    options = make.page("options.md")
    our_options, flags_of_diffusers = options.split("## Flags of diffusers' scripts")
    for name in DEFAULTS:
        assert f"`--{name}`" in our_options
        assert f"| `--{name}` |" in flags_of_diffusers
    for constraint in constraints.table().constraints:
        assert constraint.reason in options
    assert "without prior preservation" in options
    python = make.page("python.md")
    for name in vars(BiLoRA):
        assert name.startswith("_") or f"| `{name}(" in python
