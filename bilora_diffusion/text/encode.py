"""Tokenize examples, cache the result on disk, and pack a causal model's examples into rows.

Positions restart at 0 in every packed example, and Transformers derives an attention mask for each
example from them. An example's first token has no loss, because no token of the same example
precedes it. The loss of every token is therefore the same as without packing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from accelerate.utils import send_to_device
from datasets import config
from torch import Tensor

from ..core.errors import UserError
from ..core.seeds import digest_texts
from ..train.task import inference
from .config import TextConfig
from .examples import Example
from .models import TextModel
from .module import collate
from .tokenizing import IGNORED, ROW_BUILDERS, Row, resolve_template, tokenizer_hash

# Version of the tokenization, part of a cache file's name: increase it when tokenization changes.
FORMAT = "4"
MODEL_COLUMNS = ("input_ids", "labels", "token_type_ids", "position_ids")
# Columns whose values are summed when examples are packed into one row.
SUMMED = ("length", "target_tokens", "truncated")
WRITE_ROWS = 1000
# Limits of this many tokens or more are ignored: tokenizers without a limit report 10^30.
NO_LIMIT = 10**9
# Attention implementations whose mask Transformers derives from positions, for any batch size.
ATTENTION = ("sdpa", "eager")
logger = logging.getLogger(__name__)


class Encoded:
    """A tokenized dataset, built by `encode` or `pack`.

    Args:
        data: rows with some of `MODEL_COLUMNS`, with the column "sources" (indices of the row's
            examples) and with those of `SUMMED`; "truncated" counts the row's truncated examples.
        kind: "seq2seq", "causal" or "classification".
        examples: the examples before tokenization.

    Attributes:
        sources: indices of the examples in each row.
        lengths: length of each row in tokens (`Row.length`); a packed row's is the sum over its
            examples.
        target_tokens: number of tokens with a loss in each row.
        truncated: number of truncated examples.
        dropped: number of examples that were skipped, because their answer is blank or no token
            has a loss.
    """

    def __init__(self, data: datasets.Dataset, kind: str, examples: Sequence[Example]) -> None:
        self.data = data
        self.kind = kind
        self.examples = examples
        columns = [name for name in MODEL_COLUMNS if name in data.column_names]
        self._rows = data.select_columns(columns)
        columns_of_rows: Any = data.with_format("arrow")[:]  # much faster than row by row
        self.sources: list[list[int]] = columns_of_rows["sources"].to_pylist()
        self.lengths: list[int] = columns_of_rows["length"].to_pylist()
        self.target_tokens: list[int] = columns_of_rows["target_tokens"].to_pylist()
        self.truncated = sum(columns_of_rows["truncated"].to_pylist())
        self.dropped = len(examples) - sum(len(row_sources) for row_sources in self.sources)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, number: int) -> dict[str, Any]:
        """Return a row as lists for `collate`: "input_ids", "labels" and other model inputs."""
        return dict(self._rows[number])

    def name(self, number: int) -> str:
        """Return a row's name, "line 17 of train.jsonl"; a packed row has all examples' names."""
        return " and ".join(self.examples[source].where for source in self.sources[number])

    def example(self, number: int) -> Example:
        """Return the example of a row that is not packed."""
        (source,) = self.sources[number]
        return self.examples[source]


def encode(
    examples: Sequence[Example], cfg: TextConfig, text_model: TextModel, name: str
) -> Encoded:
    """Tokenize examples, or read them from the cache of the same texts, tokenizer and settings.

    Examples with a blank answer are skipped, and long examples are truncated. The log reports both
    counts.

    Args:
        examples: examples to tokenize.
        cfg: training configuration.
        text_model: model and tokenizer.
        name: name of the dataset for messages.

    Raises:
        UserError: the model does not support a length, an example can't be tokenized, or no example
            has an answer.
    """
    tokenizer = text_model.tokenizer
    kind = text_model.kind
    settings: dict[str, Any] = {"max_length": cfg.max_length}
    if kind == "seq2seq":
        settings["max_target_length"] = cfg.max_target_length
    # Rows with more tokens than the model has positions would fail in the middle of training.
    for option, length in settings.items():
        _check_length(option, length, text_model)
    if kind == "causal":
        settings["template"] = resolve_template(cfg.template, tokenizer)
    # Hash everything that determines the tokens, and nothing else, so that runs share the cache.
    hashed_texts = [FORMAT, kind, repr(settings), tokenizer_hash(tokenizer)]
    hashed_texts += [repr(example) for example in examples]
    cache_hash = digest_texts(hashed_texts)
    has_sentence_ids = kind == "classification" and "token_type_ids" in tokenizer("a", "b")
    features = _features(kind, has_sentence_ids)
    folder = Path(cfg.cache_dir or config.HF_DATASETS_CACHE) / "bilora_text"
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(cfg.preprocessing_num_workers or 1, len(examples))
    columns_of_examples = []
    for number, example in enumerate(examples):
        columns_of_examples.append({**vars(example), "number": number})
    # With a fixed fingerprint, `datasets` does not hash the table.
    table = pyarrow.Table.from_pylist(columns_of_examples)
    source = datasets.Dataset(table, fingerprint="examples")
    data = source.map(
        _tokenize,
        batched=True,
        remove_columns=source.column_names,
        features=features,
        fn_kwargs={
            "build_rows": partial(ROW_BUILDERS[kind], tokenizer=tokenizer, **settings),
            "columns": features.keys() - {"sources"},
        },
        cache_file_name=str(folder / f"{cache_hash}.arrow"),
        load_from_cache_file=not cfg.overwrite_cache,
        new_fingerprint=cache_hash,
        num_proc=workers if workers > 1 else None,
        writer_batch_size=WRITE_ROWS,
    )
    if not len(data):
        raise UserError(
            f"no row of {name} has an answer to learn from: fill in its answers, or name their"
            " column with --target_column."
        )
    encoded = Encoded(data, kind, examples)
    limit = "--max_length"
    if kind == "seq2seq":
        limit = "--max_length or --max_target_length"
    outcomes = {f"truncated to {limit}": encoded.truncated, "skipped": encoded.dropped}
    for outcome, count in outcomes.items():
        if count:
            logger.warning("%s: %d of %d rows are %s", name, count, len(examples), outcome)
    return encoded


def _features(kind: str, has_sentence_ids: bool) -> datasets.Features:
    """Return the column types of a tokenized dataset.

    Args:
        kind: kind of model.
        has_sentence_ids: whether the tokenizer returns, for each token, which sentence it belongs
        to.
    """
    number = datasets.Value("int64")
    ids = datasets.List(datasets.Value("int32"))
    features: dict[str, Any] = {
        "input_ids": ids,
        # One class number, or a label for each token.
        "labels": number if kind == "classification" else ids,
        "sources": datasets.List(number),
    }
    for name in SUMMED:
        features[name] = number
    if has_sentence_ids:
        features["token_type_ids"] = ids
    return datasets.Features(features)


def _tokenize(
    batch: Mapping[str, list[Any]],
    build_rows: Callable[[list[Example]], list[Row]],
    columns: Collection[str],
) -> dict[str, list[Any]]:
    """Convert columns of examples to columns of tokenized rows; `datasets.map` calls this function.

    Args:
        batch: one list per field of the examples, and the list "number" of their indices.
        build_rows: function that tokenizes examples.
        columns: fields of `Row` that become columns.
    """
    examples = []
    indices = []
    # `map` passes one list per column: rebuild the examples.
    for values in zip(*batch.values(), strict=True):
        fields = dict(zip(batch, values, strict=True))
        index = fields.pop("number")
        if fields["answer"].strip():
            examples.append(Example(**fields))
            indices.append(index)
    # All answers of a batch can be blank.
    rows = build_rows(examples) if examples else []
    output: dict[str, list[Any]] = {name: [] for name in (*columns, "sources")}
    for row, index in zip(rows, indices, strict=True):
        if row.target_tokens:
            for name in columns:
                output[name].append(getattr(row, name))
            output["sources"].append([index])
    return output


def _check_length(option: str, length: int, text_model: TextModel) -> None:
    limits = {"tokenizer": text_model.tokenizer.model_max_length, "model": text_model.max_tokens}
    for owner, limit in limits.items():
        if limit is not None and limit < NO_LIMIT and length > limit:
            raise UserError(
                f"--{option} {length} is more than the {limit} tokens that the {owner} allows: give"
                f" --{option} {limit} or less."
            )


def pack(encoded: Encoded, max_length: int) -> Encoded:
    """Pack examples of at most `max_length` tokens into rows of at most `max_length` tokens.

    The result depends only on the examples. The additional column "position_ids" restarts at 0 in
    each example.
    """
    rows = []
    # In each packed row, tokens are concatenated and counts are summed.
    for members in best_fit(encoded.lengths, max_length):
        parts = [encoded.data[number] for number in members]
        row: dict[str, Any] = join_parts(parts)
        for name in SUMMED:
            row[name] = sum(part[name] for part in parts)
        row["sources"] = []
        for part in parts:
            row["sources"] += part["sources"]
        rows.append(row)
    columns = encoded.data.features
    features = datasets.Features({**columns, "position_ids": columns["input_ids"]})
    data = datasets.Dataset.from_list(rows, features=features)
    return Encoded(data, encoded.kind, encoded.examples)


def join_parts(parts: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Concatenate the tokens and labels of several examples to one row, and add positions."""
    row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for part in parts:
        row["input_ids"] += part["input_ids"]
        # The first token has no loss, since the token before it belongs to another example.
        row["labels"] += [IGNORED, *part["labels"][1:]]
        row["position_ids"] += range(len(part["input_ids"]))
    return row


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Assign examples to rows by best-fit decreasing.

    Starting with the longest, each example goes into the row where it leaves the fewest free
    tokens, or into a new row if it fits into none. Rows are indexed by their free tokens, so the
    search does not slow down as rows are added.

    Args:
        lengths: number of tokens of each example, at most `size`.
        size: maximum number of tokens of a row.

    Returns:
        Indices of the examples in each row, in the order in which the rows were started.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    open_rooms = 0  # bit r is set if a row has exactly r free tokens
    for example in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        length = lengths[example]
        fitting_rooms = open_rooms >> length
        if fitting_rooms:
            # x & -x is the lowest set bit: the smallest number of free tokens that is enough.
            room = length + (fitting_rooms & -fitting_rooms).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room = size
            row = len(rows)
            rows.append([])
        rows[row].append(example)
        rows_by_room.setdefault(room - length, []).append(row)
        open_rooms |= 1 << (room - length)
    return rows


def require_packable(model: Any) -> None:
    """Raise UserError if a model's outputs differ between packed and unpacked examples.

    A configuration does not show whether a model carries a state from token to token. The model is
    therefore run on a few tokens: alone, and packed after each of two different examples.

    Raises:
        UserError: the model does not take positions as an input, its attention implementation is
            not one of `ATTENTION`, or it mixes packed examples or their positions.
    """
    config = model.config.get_text_config()
    unsuited = f"--packing does not work with the model type {config.model_type}, which"
    base_model = model
    if hasattr(model, "get_base_model"):  # PEFT's wrapper, whose forward accepts any argument
        base_model = model.get_base_model()
    if "position_ids" not in inspect.signature(base_model.forward).parameters:
        raise UserError(
            f"{unsuited} takes no position_ids, so positions would continue from one example to the"
            " next: drop --packing."
        )
    if config._attn_implementation not in ATTENTION:
        raise UserError(
            f'--packing needs the attention "sdpa" or "eager", but the model has'
            f' "{config._attn_implementation}": give --attn_implementation sdpa.'
        )
    if next(model.parameters()).is_meta:
        return  # a dry run has no weights
    unpacked, packed_first, packed_second = _probe(model)
    scale = float(unpacked.abs().max())
    # Positions are equal in both packings, so only the preceding examples can cause a difference.
    if float((packed_first - packed_second).abs().max()) > 1e-6 * scale:
        raise UserError(f"{unsuited} lets a token see the preceding example: drop --packing.")
    # The tolerance is large because the weights can be in half precision.
    if float((packed_first - unpacked).abs().max()) > 0.05 * scale:
        raise UserError(
            f"{unsuited} computes the positions of packed examples incorrectly: drop --packing."
        )


def _probe(model: Any) -> list[Tensor]:
    """Compute logits of three tokens, (3, vocabulary): alone, and after each of two examples."""
    last_token = model.config.get_text_config().vocab_size - 1
    probe_tokens = [5, 3, 4]
    logits = []
    with inference(model):
        # Both preceding examples have the same length, so the probe has the same place in the row.
        for preceding_tokens in ([], [2, 6, 7, 8], [1, 0, 1, 0]):
            parts = []
            for part_tokens in (preceding_tokens, probe_tokens):
                if part_tokens:
                    # A tiny model's vocabulary can be smaller than these ids.
                    ids = [min(token, last_token) for token in part_tokens]
                    parts.append({"input_ids": ids, "labels": ids})
            batch = collate([join_parts(parts)], "causal", pad_token_id=0)
            inputs: Any = send_to_device(batch, next(model.parameters()).device)
            del inputs["labels"]
            row_logits = model(**inputs, use_cache=False).logits[0]  # (tokens, vocabulary)
            # (3, vocabulary)
            logits.append(row_logits[-len(probe_tokens) :].float())
    return logits
