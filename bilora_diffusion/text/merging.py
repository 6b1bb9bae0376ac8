"""Merge a text run's primary into its base model and write a folder that Transformers loads.

    bilora export runs/answers --to merged

Each adapted weight is computed in float64 and rounded once, to the base model's precision. An
adapter that was initialized with PiSSA or LoRA-GA is exported for the original base weights, so it
is merged like any other adapter.
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

# Options that choose a run's base model and tokenizer, and control how they are loaded.
BASE_OPTIONS = (
    "model_name_or_path",
    "task_type",
    "tokenizer_name",
    "revision",
    "trust_remote_code",
    "cache_dir",
)
LARGEST_SHARD = "5GB"  # usual on the hub
# Vocabulary files that llama.cpp reads and Transformers does not write.
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
# Model types of the encoder-decoder models that llama.cpp converts.
LLAMA_CPP_SEQ2SEQ = ("t5", "mt5", "umt5")
# Token ids on which the logits of the written and the merged model are compared.
PROBE = (5, 3, 4, 2, 7)
RESTORE = "restore the base model that the adapter was trained on"


@dataclass(frozen=True)
class Adapter:
    """The primary of a text run: tensors by PEFT key, and their PEFT configuration."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def merge_run(
    folder: str | Path, step: int | None = None, output: str | Path | None = None
) -> Export:
    """Merge a text run's primary into its base model and write the model; replace no files.

    The written folder has the weights in safetensors shards, the configuration of the model and of
    its generation, and the tokenizer. Before the folder gets its final name, Transformers loads it,
    and its weights and its logits of a few tokens are compared with those of the merged model.

    Args:
        folder: run folder.
        step: step of a checkpoint; None for the weights that the run exported at its end.
        output: folder to write; by default ``exports/step-N/merged`` in the run folder.

    Returns:
        The merged folder; its notes are sentences on precision and llama.cpp's commands.

    Raises:
        UserError: the run is an image run, trained whole models, or has no adapter for this step;
            the base model can't be read or is stored quantized; the adapter does not fit the base
            model, or a layer shares its weight with another; or the output exists and differs.
        TrainingError: the adapter has no effect, a merged weight is not finite, or the written
            folder differs from the merged model.
    """
    console.quiet()
    folder = Path(folder)
    record = runlog.read_run(folder)
    config, results = record["config"], record["results"]
    if "model_name_or_path" not in config:
        raise UserError(
            f"{folder} is an image run, and only text runs are merged: use --to diffusers, load the"
            " file with diffusers, and merge it in memory with pipeline.fuse_lora()."
        )
    if get(record["method"]).exports_weights:
        raise UserError(
            f"{folder} trained all weights, so it has no adapter to merge: use the whole model in"
            f" {folder / 'model'}."
        )
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
            "The adapter was trained on NF4 weights and is merged into the unquantized base model."
        )
    return Export(target, is_new, (*notes, *_llama_cpp_lines(source, target)))


def _read_adapter(folder: Path) -> Adapter:
    """Read the adapter that a run exported at its end."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS}, since the run has not ended: resume it, or add --step with"
            " the step of a checkpoint."
        )
    inspect(path)  # refuses an incomplete adapter
    tensors = {}
    for key, value in load_file(path).items():
        tensors[peft_key(key.removeprefix(PEFT_PREFIX))] = value
    return Adapter(tensors, read_config(folder / CONFIG))


def _open_base(config: Mapping[str, Any]) -> TextSource:
    """Open the base model that a run's options name, without reading its weights."""
    options = TextModelOptions(**{name: config[name] for name in BASE_OPTIONS if name in config})
    source = TextSource(options)
    if getattr(source.config, "quantization_config", None) is not None:
        raise UserError(
            f"{options.model_name_or_path} is stored quantized, but a merge needs 16-bit or 32-bit"
            " weights: load the adapter with PEFT on the unquantized model."
        )
    return source


def _write(
    target: Path, source: TextSource, labels: Sequence[str] | None, adapter: Adapter
) -> list[str]:
    """Write a base model with its adapter merged, and its tokenizer; return notes for the user."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by an earlier command that was killed
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
                f"{target} is not written, since the model that Transformers loads from the new"
                " files differs from the merged one: check the versions of Transformers and"
                " safetensors."
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
    """Load a base model in its own precision and merge an adapter; return the model and notes."""
    precision: Any = "auto"
    if "gguf_file" in source.arguments:
        precision = torch.float32  # exact for all values of GGUF's quantized weights
    text_model = source.load(precision, labels)
    return text_model, merge(text_model.model, adapter)


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> list[str]:
    """Merge an adapter into a base model, in place.

    Returns:
        A list with one sentence about the rounding error; [] if all adapted weights are in fp32.

    Raises:
        UserError: the adapter does not fit the model, or a layer's weight is quantized or shared.
        TrainingError: the adapter has no effect, or a merged weight is not finite.
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
            raise UserError(f"{name} of the base model does not have the trained shape; {RESTORE}.")
        base = weight.double()  # (m, n)
        merged = merged_weight(base, A, B, config.scale(name, A.shape[0]), magnitude)
        if not merged.isfinite().all():
            raise TrainingError(
                f"The merged weight of {name} is not finite: merge an earlier checkpoint."
            )
        weight.copy_(merged)  # rounds to the weight's precision
        precisions.add(weight.dtype)
        squared_change += float((merged - base).square().sum())
        squared_error += float((weight.double() - merged).square().sum())
    # The remaining tensors belong to fully trained modules, such as a classifier's new head.
    for key, value in remaining.items():
        if key not in parameters or parameters[key].shape != value.shape:
            raise UserError(f"The base model has no {key} with the trained shape; {RESTORE}.")
        parameters[key].copy_(value)
    if precisions == {torch.float32}:
        return []
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in precisions))
    share = 100 * (squared_error / squared_change) ** 0.5
    return [f"Rounding to {names} changes the weights by {share:.2g} % of the adapter's change."]


def merged_weight(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None
) -> Tensor:
    """Compute a layer's weight with its adapter merged, in float64.

    Args:
        weight: W of the base model, (m, n), in float64.
        A, B: factors, (rank, n) and (m, rank).
        scale: s, from `PeftConfig.scale`.
        magnitude: DoRA's magnitude, (m,); None if the adapter is a plain LoRA.
    """
    merged = weight + scale * (B.double() @ A.double())  # W + s B A
    if magnitude is None:
        return merged
    # Eq. 5 of DoRA (https://arxiv.org/abs/2402.09353): the norm of each row is its magnitude.
    return magnitude.double().reshape(-1, 1) / merged.norm(dim=1, keepdim=True) * merged


def _plain_weight(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], name: str
) -> nn.Parameter:
    """Return a layer's weight; raise UserError if it is missing, quantized or shared."""
    weight = parameters.get(f"{name}.weight")
    if weight is None or is_quantized(model.get_submodule(name)):
        raise UserError(f"The base model has no unquantized layer {name}; {RESTORE}.")
    for key, parameter in parameters.items():
        if parameter is weight and key != f"{name}.weight":
            raise UserError(
                f"{name} shares its weight with {key.removesuffix('.weight')}, which a merge would"
                " change too: load the adapter with PEFT, or train without this layer."
            )
    return weight


def _llama_cpp_lines(source: TextSource, target: Path) -> list[str]:
    """Return commands that convert a folder to GGUF; [] for a kind that llama.cpp can't convert."""
    is_supported = source.kind == "causal"
    if source.kind == "seq2seq":
        # llama.cpp reads the vocabulary of these models only from a SentencePiece file.
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
    """Copy the tokenizer's SentencePiece files, if it has any."""
    options = source.options
    tokenizer_name = options.tokenizer_name or source.location
    # --revision applies to the model, not to another tokenizer.
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
    """Return whether Transformers loads exactly the merged model from a folder, bit by bit."""
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
    """Hash each tensor of a model, and the logits of a few tokens.

    The logits show differences in the configuration. Models are compared by their hashes, so only
    one model is in memory at a time.
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
