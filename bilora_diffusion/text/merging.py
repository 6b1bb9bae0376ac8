"""Merge the primary of a text run into its base model: a folder that Transformers loads by itself.

    bilora export runs/answers --to merged

Each adapted weight is computed in float64 and rounded once, to the base model's precision. An
adapter that began with PiSSA or LoRA-GA is exported for the original base weights, so it is merged
like any other.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from ..adapters import is_quantized, peft_key
from ..adapters.saving import PEFT_PREFIX
from ..core.durable import readable_as, sync
from ..core.errors import TrainingError, UserError, as_user_error
from ..core.lora_names import CONFIG, MERGED, WEIGHTS
from ..core.seeds import digest
from ..export.conversion import Export, primaries_of_step
from ..export.formats import require_effect
from ..export.lorafile import inspect
from ..export.peft_config import PeftConfig, read_config
from ..methods import get
from ..run import console, runlog
from ..run.folder import EXPORTS
from ..train.task import inference
from .models import TextModel, TextSource
from .options import TextModelOptions

# Options of a run that say which base model and tokenizer it used.
BASE_OPTIONS = (
    "model_name_or_path",
    "task_type",
    "tokenizer_name",
    "revision",
    "trust_remote_code",
    "cache_dir",
)
LARGEST_SHARD = "5GB"  # as on the hub
# Vocabularies that llama.cpp reads and Transformers does not write.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
# Types of encoder-decoder models that llama.cpp converts.
LLAMA_CPP_SEQ2SEQ = ("t5", "mt5", "umt5")
# Ids of the tokens with which a written model is compared with the merged one.
PROBE = (5, 3, 4, 2, 7)
RESTORE = "restore the base model that the adapter was trained on"


@dataclass(frozen=True)
class Adapter:
    """The primary of a text run: tensors by PEFT's keys, and PEFT's configuration of them."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def merge_run(
    folder: str | Path, step: int | None = None, output: str | Path | None = None
) -> Export:
    """Write the base model of a text run with its primary merged; nothing is replaced.

    The folder has the weights in shards of safetensors, the configurations of the model and of its
    generation, and the tokenizer. Transformers loads it, and the weights and the logits of a few
    tokens are compared, before it gets its name.

    Args:
        folder: run folder.
        step: step of a checkpoint; None for the weights that the run exported at its end.
        output: folder to write; by default ``exports/step-N/merged`` in the run folder.

    Returns:
        The folder, with sentences on precision and commands of llama.cpp as notes.

    Raises:
        UserError: it is a run on images or of whole models, the adapter does not fit the base
            model, or the output exists and differs.
        TrainingError: the written folder differs from the merged model.
    """
    console.quiet()
    folder = Path(folder)
    record = runlog.read_run(folder)
    config, results = record["config"], record["results"]
    if "model_name_or_path" not in config:
        raise UserError(
            f"{folder} is a run on images, whose base model is not written: use --to diffusers, and"
            " merge the file in memory by pipeline.fuse_lora() after loading it."
        )
    if get(record["method"]).exports_weights:
        raise UserError(f"{folder} trained all weights: {folder / 'model'} is the whole model.")
    if step is None:
        adapter = _read_adapter(folder)
        step = results.get("best_step") or results.get("steps")
    else:
        (primary,) = primaries_of_step(folder, step).values()
        adapter = Adapter(primary.tensors, primary.file_config)
    target = Path(output or folder / EXPORTS / f"step-{step}" / MERGED)
    labels = results.get("export", {}).get("labels") or None

    source = _open_base(config)
    is_new = not target.exists()
    if is_new:
        notes = _write(target, source, labels, adapter)
    else:
        text_model, notes = _merged_model(source, labels, adapter)
        expected = _hash_model(text_model)
        del text_model
        if not _holds_model(target, source, expected):
            raise UserError(f"{target} exists; name another --output, or delete it.")
    if config.get("quantize", "none") != "none":
        notes.append(
            "It was trained on NF4 weights, and is merged into the unquantized base model."
        )
    return Export(target, is_new, (*notes, *_llama_cpp_lines(source, target)))


def _read_adapter(folder: Path) -> Adapter:
    """The adapter that a run exported at its end."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}, since it has not ended: resume it, or add --step with the"
            " step of a checkpoint."
        )
    inspect(path)  # refuses an incomplete adapter
    tensors = {}
    for key, value in load_file(path).items():
        tensors[peft_key(key.removeprefix(PEFT_PREFIX))] = value
    return Adapter(tensors, read_config(folder / CONFIG))


def _open_base(config: Mapping[str, Any]) -> TextSource:
    """The base model of a run's options, whose weights are not read yet."""
    options = TextModelOptions(**{name: config[name] for name in BASE_OPTIONS if name in config})
    source = TextSource(options)
    if getattr(source.config, "quantization_config", None) is not None:
        raise UserError(
            f"{options.model_name_or_path} is stored quantized, and a merge needs weights of 16 or"
            " 32 bits: put the adapter on the unquantized model with PEFT."
        )
    return source


def _write(
    target: Path, source: TextSource, labels: Sequence[str] | None, adapter: Adapter
) -> list[str]:
    """Write a base model with an adapter merged, and its tokenizer; return notes on it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of an earlier command that was killed
    try:
        text_model, notes = _merged_model(source, labels, adapter)
        expected = _hash_model(text_model)
        with as_user_error("The merged model can't be written", "correct the base model's files"):
            text_model.model.save_pretrained(aside, max_shard_size=LARGEST_SHARD)
            text_model.tokenizer.save_pretrained(aside)
        del text_model
        _copy_vocabulary(source, aside)
        readable_as(aside / "config.json", *aside.glob("*.safetensors"))
        if not _holds_model(aside, source, expected):
            raise TrainingError(
                f"{target} is not written, since the model that Transformers loads from it differs"
                " from the merged one: look at the versions of Transformers and safetensors."
            )
        for path in aside.iterdir():
            sync(path)
        aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return notes


def _merged_model(
    source: TextSource, labels: Sequence[str] | None, adapter: Adapter
) -> tuple[TextModel, list[str]]:
    """Load a base model in the precision of its weights and merge an adapter; also return notes."""
    precision: Any = "auto"
    if "gguf_file" in source.arguments:
        precision = torch.float32  # which has every value of GGUF's quantized weights
    text_model = source.load(precision, labels)
    return text_model, merge(text_model.model, adapter)


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> list[str]:
    """Merge an adapter into a base model, in place.

    Returns:
        A sentence on the error of rounding; none for weights in fp32.

    Raises:
        UserError: the adapter does not fit the model.
        TrainingError: it has no effect, or a value is not finite.
    """
    require_effect("the model", adapter.tensors)
    config = PeftConfig.model_validate(dict(adapter.config))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    remaining = dict(adapter.tensors)
    squared_change = squared_error = 0.0
    precisions: set[torch.dtype] = set()
    for key in adapter.tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        A = remaining.pop(key)  # (rank, n)
        B = remaining.pop(f"{name}.lora_B.weight")  # (m, rank)
        magnitude = remaining.pop(f"{name}.lora_magnitude_vector", None)  # (m,)
        weight = _plain_weight(model, parameters, name)
        if isinstance(model.get_submodule(name), Conv1D):  # its weight is (n, m)
            weight = weight.T
        if weight.shape != (B.shape[0], A.shape[1]):
            raise UserError(f"{name} of the base model has another shape; {RESTORE}.")
        base = weight.double()  # (m, n)
        merged = merged_weight(base, A, B, config.scale(name, A.shape[0]), magnitude)
        if not merged.isfinite().all():
            raise TrainingError(f"The merged {name} is not finite: merge a good checkpoint.")
        weight.copy_(merged)  # rounds
        precisions.add(weight.dtype)
        squared_change += float((merged - base).square().sum())
        squared_error += float((weight.double() - merged).square().sum())
    # The remaining tensors are modules that were trained whole, such as a classifier's new head.
    for key, value in remaining.items():
        if key not in parameters or parameters[key].shape != value.shape:
            raise UserError(f"The base model has no {key} of the trained shape; {RESTORE}.")
        parameters[key].copy_(value)
    if precisions == {torch.float32}:
        return []
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in precisions))
    share = 100 * (squared_error / squared_change) ** 0.5
    return [f"Rounding to {names} moves the weights by {share:.2g} % of the adapter's change."]


def merged_weight(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None
) -> Tensor:
    """The weight of a layer with its adapter merged, in float64.

    Args:
        weight: W of the base model, (m, n), in float64.
        A, B: factors, (rank, n) and (m, rank).
        scale: s, as in `PeftConfig.scale`.
        magnitude: of DoRA, (m,); None without it.
    """
    merged = weight + scale * (B.double() @ A.double())  # W + s B A
    if magnitude is None:
        return merged
    # Eq. 5 of DoRA (https://arxiv.org/abs/2402.09353): a row's norm is its magnitude.
    return magnitude.double().reshape(-1, 1) / merged.norm(dim=1, keepdim=True) * merged


def _plain_weight(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], name: str
) -> nn.Parameter:
    """The weight of a layer, which is not quantized, and which no other layer shares."""
    weight = parameters.get(f"{name}.weight")
    if weight is None or is_quantized(model.get_submodule(name)):
        raise UserError(f"The base model has no plain layer {name}; {RESTORE}.")
    for key, parameter in parameters.items():
        if parameter is weight and key != f"{name}.weight":
            raise UserError(
                f"{name} shares its weight with {key.removesuffix('.weight')}, which a merge would"
                " change too: load the adapter with PEFT, or train without this layer."
            )
    return weight


def _llama_cpp_lines(source: TextSource, target: Path) -> list[str]:
    """The commands that make a GGUF file of a folder, for the models that llama.cpp has."""
    is_supported = source.kind == "causal"
    if source.kind == "seq2seq":
        # It reads the vocabulary of these models from SentencePiece's file alone.
        has_vocabulary = any((target / name).exists() for name in SENTENCEPIECE_FILES)
        is_supported = has_vocabulary and source.config.model_type in LLAMA_CPP_SEQ2SEQ
    if not is_supported:
        return []
    folder = shlex.quote(str(target))
    return [
        "To convert it to GGUF with llama.cpp:",
        f"  python llama.cpp/convert_hf_to_gguf.py {folder} --outfile model.gguf",
        "  llama-quantize model.gguf model-Q4_K_M.gguf Q4_K_M",
    ]


def _copy_vocabulary(source: TextSource, folder: Path) -> None:
    """Copy the SentencePiece file of the tokenizer, if it has one."""
    options = source.options
    tokenizer_name = options.tokenizer_name or source.location
    # The revision is that of the model, not of another tokenizer.
    revision = None if options.tokenizer_name else options.revision
    for name in SENTENCEPIECE_FILES:
        path = cached_file(
            tokenizer_name,
            name,
            cache_dir=options.cache_dir,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            shutil.copyfile(path, folder / name)


def _holds_model(folder: Path, source: TextSource, expected: Mapping[str, str]) -> bool:
    """Test that the model that Transformers loads from a folder is bitwise the merged one."""
    options = TextModelOptions(
        model_name_or_path=str(folder),
        task_type=source.kind,
        trust_remote_code=source.options.trust_remote_code,
    )
    precision: Any = "auto"
    try:
        text_model = TextSource(options).load(precision)
    except UserError:
        return False
    return _hash_model(text_model) == expected


def _hash_model(text_model: TextModel) -> dict[str, str]:
    """Hash each tensor of a model, and the logits of a few tokens, which its configuration changes.

    Models are compared by hashes, so that only one is in memory at a time.
    """
    model = text_model.model
    hashes = {name: digest(value) for name, value in model.state_dict().items()}
    last_token = model.config.get_text_config().vocab_size - 1
    tokens = torch.tensor([[min(token, last_token) for token in PROBE]])
    inputs = {"input_ids": tokens}
    if text_model.kind == "seq2seq":
        inputs["decoder_input_ids"] = tokens
    with inference(model):
        hashes["logits"] = digest(model(**inputs).logits)
    return hashes
