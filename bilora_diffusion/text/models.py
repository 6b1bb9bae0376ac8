"""Load text models: T5 and similar models, causal language models, and classifiers.

    text_model = load_text_model("google-t5/t5-base")
    text_model.model, text_model.tokenizer
    text_model.kind                          # seq2seq, causal or classification

A name can be a hub id, a folder that Transformers wrote, a folder with one GGUF file, or a key of
`places.PACKAGED`, which lists models in installed packages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError, as_user_error
from ..core.seeds import seed_of
from ..core.values import KINDS
from ..train.dry_run import empty
from ..train.soundness import read_or_refuse, require_safetensors, require_words
from .options import TextModelOptions
from .places import gguf_file, locate

FIX = "correct --model_name_or_path, or install the missing package"
# Possible names of the layer that computes class scores. It is fully trained, as in PEFT.
CLASS_HEADS = ("classifier", "score")
# Model types whose position ids begin after the id of the padding token.
POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer", "xmod", "ibert")
AUTO_CLASSES = {
    "seq2seq": "ModelForSeq2SeqLM",
    "causal": "ModelForCausalLM",
    "classification": "ModelForSequenceClassification",
}


@dataclass(frozen=True)
class TextModel:
    """A loaded model in evaluation mode.

    Attributes:
        model: Transformers model.
        tokenizer: the model's tokenizer.
        kind: "seq2seq", "causal" or "classification".
        new_modules: names of a classifier's layers without stored weights: its head, and layers
            before the head such as DistilBERT's "pre_classifier".
    """

    model: Any
    tokenizer: Any
    kind: str
    new_modules: tuple[str, ...] = ()

    @property
    def whole_modules(self) -> tuple[str, ...]:
        """Names of a classifier's head and new layers, which are fully trained and saved."""
        if self.kind != "classification":
            return ()
        heads = [name for name in CLASS_HEADS if hasattr(self.model, name)]
        other_modules = [name for name in self.new_modules if name.split(".")[0] not in heads]
        return tuple(heads + other_modules)

    @property
    def max_tokens(self) -> int | None:
        """Maximum number of tokens of a row; None if there is no limit, as with T5's positions."""
        config = self.model.config
        limit = getattr(config, "max_position_embeddings", None)
        # T5's configuration has "n_positions" too, but it is not a limit.
        if limit is None and not getattr(config, "relative_attention_num_buckets", None):
            limit = getattr(config, "n_positions", None)
        if limit is None:
            return None
        if any(name in str(config.model_type) for name in POSITIONS_AFTER_PADDING):
            return int(limit) - (config.pad_token_id or 0) - 1
        return int(limit)


class TextSource:
    """A model whose configuration is read first; `load` reads the weights.

    Args:
        options: name of the model, and options that control loading.

    Attributes:
        config: Transformers configuration.
        kind: "seq2seq", "causal" or "classification".

    Raises:
        UserError: the model can't be found or read, does not have the requested kind, or needs a
            missing package or remote code.
    """

    def __init__(self, options: TextModelOptions) -> None:
        self.options = options
        self.name = options.model_name_or_path
        self.location = locate(self.name, "--model_name_or_path")
        # Without this argument, Transformers asks in the terminal whether it may run remote code.
        self.arguments: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
        settings = {
            "revision": options.revision,
            "cache_dir": options.cache_dir,
            "gguf_file": gguf_file(self.location),
        }
        for key, value in settings.items():
            if value:
                self.arguments[key] = value
        self._attention: dict[str, Any] = {}  # an argument that only the model takes
        if options.attn_implementation is not None:
            self._attention["attn_implementation"] = options.attn_implementation
        self._weights_label = f'the weights of "{self.name}"'  # for messages

        with as_user_error(f'the configuration of "{self.name}" can\'t be read', FIX):
            self.config = _auto("Config").from_pretrained(self.location, **self.arguments)
            self.kind = kind_of(self.config, self.name, options.task_type)

    def load(
        self,
        dtype: torch.dtype = torch.float32,
        labels: Sequence[str] | None = None,
        seed: int = 0,
        weights: bool = True,
    ) -> TextModel:
        """Load model and tokenizer, on the CPU and without adapters.

        Args:
            dtype: dtype of the weights.
            labels: names of a classifier's classes; None for those in the configuration.
            seed: seed of a new head's initial values.
            weights: False for an empty model on the "meta" device (`dry_run.empty`).

        Raises:
            UserError: the weights or the tokenizer can't be read, are damaged, or do not fit.
        """
        tokenizer = self._load_tokenizer()
        has_labels = False
        if self.kind == "classification" and labels is not None:
            has_labels = True
            # Transformers creates a head with as many classes as labels.
            self.config.id2label = dict(enumerate(labels))
            self.config.label2id = {label: number for number, label in enumerate(labels)}
        if weights:
            model, new_modules = self._load_model(dtype, has_labels, seed)
        else:
            model, new_modules = self._build_empty_model(dtype)
        _resolve_padding(model, tokenizer)
        return TextModel(model.eval(), tokenizer, self.kind, new_modules)

    def _build_empty_model(self, dtype: torch.dtype) -> tuple[Any, tuple[str, ...]]:
        """Build the model without weights; also return the layers that can be new."""

        def build() -> Any:
            trusts_code = self.options.trust_remote_code
            return _auto(AUTO_CLASSES[self.kind]).from_config(
                self.config, trust_remote_code=trusts_code, **self._attention
            )

        model = read_or_refuse(self._weights_label, FIX, lambda: empty(build, dtype))
        if self.kind != "classification":
            return model, ()
        # Only stored weights show which layers outside the body are new: assume all of them.
        body = f"{model.base_model_prefix}."
        keys = [key for key, _ in model.named_parameters() if not key.startswith(body)]
        return model, _modules_of(keys)

    def _load_model(
        self, dtype: torch.dtype, has_labels: bool, seed: int
    ) -> tuple[Any, tuple[str, ...]]:
        """Load the model; also return the layers without stored weights."""
        arguments = {**self.arguments, **self._attention, "config": self.config, "dtype": dtype}
        if has_labels:  # a stored head can have another number of classes
            arguments["ignore_mismatched_sizes"] = True
        is_gguf = "gguf_file" in self.arguments
        if not is_gguf:
            arguments["use_safetensors"] = True
            require_safetensors(self._weights_label, Path(self.location))

        arguments["output_loading_info"] = True
        auto_class = _auto(AUTO_CLASSES[self.kind])
        # Transformers initializes a new head at random.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "head"))
            model, report = read_or_refuse(
                self._weights_label,
                FIX,
                lambda: auto_class.from_pretrained(self.location, **arguments),
            )
        if is_gguf:
            model = _without_quantization(model, dtype)
        return model, self._new_modules(model, report)

    def _new_modules(self, model: Any, report: dict[str, Any]) -> tuple[str, ...]:
        """Return the layers without stored weights that a classifier adds to a language model.

        Raises:
            UserError: other layers lack weights; Transformers would only warn and initialize them
                at random.
        """
        new_modules = _modules_of(report["missing_keys"])
        mismatched_keys = []
        for entry in report["mismatched_keys"]:  # keys, or (key, shape, shape)
            mismatched_keys.append(entry if isinstance(entry, str) else entry[0])
        # A layer with another shape counts as missing, since its stored weights are not used.
        missing = sorted({*new_modules, *_modules_of(mismatched_keys)})
        if self.kind == "classification":
            # A head, or BERT's pooler before it, can be new or have another shape.
            body = f"{model.base_model_prefix}."
            missing = [name for name in missing if name.startswith(body) and ".pooler" not in name]
        if missing:
            raise UserError(
                f'"{self.name}" has no weights for {", ".join(missing[:3])}, which a {self.kind}'
                " model needs: give another --model_name_or_path."
            )
        return new_modules

    def _load_tokenizer(self) -> Any:
        """Load the tokenizer: the model's own, or the one that ``--tokenizer_name`` names."""
        location = self.location
        arguments = self.arguments
        tokenizer_name = self.options.tokenizer_name
        if tokenizer_name is not None:
            location = locate(tokenizer_name, "--tokenizer_name")
            # The revision and the GGUF file belong to the model.
            arguments = {}
            for key in ("cache_dir", "trust_remote_code"):
                if key in self.arguments:
                    arguments[key] = self.arguments[key]
        part = f'the tokenizer of "{tokenizer_name or self.name}"'
        fix = "give another tokenizer with --tokenizer_name"
        tokenizer = read_or_refuse(
            part,
            f"add its files, {fix}, or install the missing package",
            lambda: _auto("Tokenizer").from_pretrained(location, **arguments),
        )
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        require_words(part, tokenizer, rows, f"add its files, or {fix}")
        return tokenizer


def load_text_model(name_or_path: str, task_type: str = "auto", **options: Any) -> TextModel:
    """Find and load a model; see `TextSource`.

    Args:
        name_or_path: name of the model.
        task_type: kind of model; "auto" takes the kind from the model's configuration.
        options: further fields of `TextModelOptions`, and the arguments "dtype", "labels" and
            "seed" of `TextSource.load`.
    """
    load_arguments = {}
    for name in ("dtype", "labels", "seed"):
        if name in options:
            load_arguments[name] = options.pop(name)
    model_options = TextModelOptions(
        model_name_or_path=name_or_path, task_type=task_type, **options
    )
    return TextSource(model_options).load(**load_arguments)


def kind_of(config: Any, name: str, task_type: str) -> str:
    """Determine a model's kind from its configuration.

    Args:
        config: Transformers configuration.
        name: name of the model for messages.
        task_type: requested kind, or "auto".

    Raises:
        UserError: the model does not have the requested kind, or has none of the kinds.
    """
    possible_kinds = [kind for kind in KINDS if _has_class(config, kind)]
    # Encoder-decoder models are not causal, although Transformers has classes such as
    # BartForCausalLM, which use only the decoder.
    if config.is_encoder_decoder and "causal" in possible_kinds:
        possible_kinds.remove("causal")
    if task_type != "auto":
        if task_type not in possible_kinds:
            raise UserError(
                f'--task_type {task_type} does not fit "{name}", a {config.model_type} model, which'
                f" supports {', '.join(possible_kinds) or 'no task type'}: give another --task_type"
                " or model."
            )
        return task_type
    likely_kinds = ["seq2seq"]
    architectures = " ".join(getattr(config, "architectures", None) or ())
    if "SequenceClassification" in architectures:
        # A model that was saved as a classifier is used as a classifier.
        likely_kinds.insert(0, "classification")
    # Transformers lists encoders such as BERT among the causal models too.
    is_encoder = type(config) in _auto("ModelForMaskedLM")._model_mapping
    likely_kinds.append("classification" if is_encoder else "causal")
    for kind in likely_kinds:
        if kind in possible_kinds:
            return kind
    raise UserError(
        f'"{name}" is a {config.model_type} model, neither a language model nor a text classifier:'
        " give another --model_name_or_path."
    )


def _modules_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the modules that own parameters with these names, sorted."""
    modules = {key.rpartition(".")[0] for key in keys}
    modules.discard("")  # the owner of a parameter of the model itself
    return tuple(sorted(modules))


def _has_class(config: Any, kind: str) -> bool:
    """Return whether Transformers or the model's repository has a model class of this kind."""
    name = AUTO_CLASSES[kind]
    classes_of_repository = getattr(config, "auto_map", None) or {}
    return f"Auto{name}" in classes_of_repository or type(config) in _auto(name)._model_mapping


def _auto(name: str) -> Any:
    """Return one of Transformers' Auto classes; the late import keeps this module fast to load."""
    import transformers

    return getattr(transformers, f"Auto{name}")


def _without_quantization(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a model that was loaded from GGUF, without the quantization entry in its configuration.

    The loaded weights are not quantized, but Transformers refuses to save or quantize a model whose
    configuration has this entry.
    """
    gguf_model: Any = model
    values = gguf_model.config.to_dict()
    values.pop("quantization_config", None)
    plain_model = type(gguf_model)(type(gguf_model.config).from_dict(values)).to(dtype)
    plain_model.load_state_dict(gguf_model.state_dict())
    # Tie the copy's output head to its embedding again.
    plain_model.tie_weights()
    plain_model.generation_config = getattr(gguf_model, "generation_config", None)
    plain_model.name_or_path = gguf_model.name_or_path
    return plain_model


def _resolve_padding(model: Any, tokenizer: Any) -> None:
    """Set a padding token for models that were trained without one; padding has no loss."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has neither a padding token nor an EOS token: give another tokenizer"
                " with --tokenizer_name."
            )
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        # Classifiers use this id to find the last token of a row.
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
