"""``README.md`` of a run folder: a model card with the front matter of the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..adapters import CHANGE_BASE
from ..durable import write_text
from ..methods import get
from ..mini import embedded


def write_card(
    cfg: Any,
    folder: Path,
    steps: int,
    *,
    meta: ModelCardData,
    base: str,
    data: str | None,
    use: Sequence[str],
    results: Sequence[str],
) -> None:
    """Write ``folder/README.md``; only what is given is said.

    Args:
        cfg: the run's configuration.
        folder: the run folder.
        steps: optimizer steps taken.
        meta: the front matter.
        base, data: what base model and data set are called; no paths of this machine.
        use: parts of the text on what the weights are used with and how.
        results: parts of the text that stand at its end.
    """
    trained = get(cfg.method)
    parts = [
        f"# {base} fine-tuned with {trained.title}",
        f"{trained.title} weights for {code(base)}"
        + (f", trained on {code(data)}." if data else "."),
        trained.summary,
        *use,
        *table("## Method", run_settings(cfg, steps) | {"method": trained.title}),
        *results,
    ]
    text = f"---\n{meta.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    write_text(folder / "README.md", text)


def run_settings(cfg: Any, steps: int) -> dict[str, Any]:
    """What a model card says of how the run was made; None where there is nothing to say."""
    adapter = {
        "rank": cfg.rank,
        "alpha": cfg.lora_alpha,
        "init": None if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
        "rank of the file": 2 * cfg.rank if cfg.init_lora_weights in CHANGE_BASE else None,
        "DoRA": "yes" if cfg.use_dora else None,
        "quantized base": None if cfg.quantize == "none" else cfg.quantize,
    }
    return {
        "method": cfg.method,
        **({} if get(cfg.method).exports_weights else adapter),
        "learning rate": cfg.learning_rate,
        "optimizer steps": steps,
        "seed": cfg.seed,
        **method_settings(cfg),
        **({"weight averaging, decay": cfg.ema_decay} if cfg.use_ema else {}),
    }


def when_it_stopped(cfg: Any, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a model card says of how the held-out loss had a say in the number of steps."""
    early = results["steps"] if results.get("stopped_early") else None
    return {
        "step of these weights, with the lowest held-out loss": results.get("best_step"),
        "stopped early, after steps": early,
        f"steps chosen by {cfg.folds} folds": results.get("chosen_steps"),
    }


def method_settings(cfg: Any) -> dict[str, Any]:
    """What was set of the method's own options: its radius, and what is not as usual."""
    own = {}
    for name, usual in get(cfg.method).usual().items():
        value = getattr(cfg, name)
        if name == "rho" or value != usual:
            own[name.replace("_", " ")] = value
    if "auxiliary_rank" in get(cfg.method).reads:
        own["auxiliary rank"] = cfg.auxiliary_rank or cfg.rank
    return own


def source(name: str) -> str:
    """What may be published of a model's or data set's name: not where it lies on this machine."""
    if known := embedded(name):
        return known
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub and is no folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def loaded_from(name: str) -> str:
    """What a reader of the card gives ``from_pretrained``: a hub id, or where he has the folder."""
    return name if is_hub_id(name) else f"path/to/{name}"


def table(heading: str, rows: Mapping[str, str | int | float | None]) -> list[str]:
    """A heading and a table of two columns; [] where there is nothing to say."""
    given = {key: value for key, value in rows.items() if value is not None}
    if not given:
        return []
    lines = [f"| {escaped(key)} | {escaped(_text(value))} |" for key, value in given.items()]
    return [heading, "\n".join(["| | |", "|---|---|", *lines])]


def _text(value: str | int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """One line of text as inline code, whatever backticks it has."""
    line = " ".join(text.split())
    marks = _fence(line, 1)
    pad = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{marks}{pad}{line}{pad}{marks}"


def python_block(lines: Sequence[str]) -> str:
    """Lines of Python as a block, whatever backticks they have."""
    text = "\n".join(lines)
    marks = _fence(text, 3)
    return f"{marks}python\n{text}\n{marks}"


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
