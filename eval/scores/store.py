"""Images of several adapters from the same noise, made once, kept as PNG files and reused.

store = Store(folder / "images", Sampling("mini", size=64, steps=25, guidance_scale=4.0))
todo = jobs(adapters, prompts, seeds=[0])
store.generate(todo)
image = store.open(todo[0])

An image is a function of its parameters alone, bit for bit on one machine: its noise comes from
seed and prompt text, and the arithmetic does not see what else is made. Batched products are
rounded by the shape of the batch and the number of threads, so both are fixed: the denoiser always
gets ``Sampling.lanes`` images (a short rest is filled up), and one thread on a CPU. More cores are
used by more processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from bilora_diffusion.adapters import names
from bilora_diffusion.errors import UserError, did_you_mean
from bilora_diffusion.image.pipeline import load_pipeline
from bilora_diffusion.image.prompts import PromptEmbedding
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.run.console import quiet
from bilora_diffusion.run.provenance import versions
from bilora_diffusion.seeds import seed_of

from ..provenance import without_paths
from . import store_png
from .adapters import Adapter, applied, slug
from .prompts import Prompt

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LANES = 4
_STATED = ("torch", "diffusers", "transformers", "peft", "bilora_diffusion")


@dataclass(frozen=True)
class Sampling:
    """How all images of a comparison are made.

    Args:
        base_model: folder, hub id, or "mini".
        size: side of the images, pixels.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        scale: factor of each adapter's change of the weights.
        dtype: of the UNet and the text encoders; the autoencoder decodes in float32.
        lanes: images in each call of the denoiser. More take more memory; another number may
            change an image by one step of 255 in single pixels, so it counts as a parameter.

    Raises:
        UserError: a value outside its range.
    """

    base_model: str
    size: int
    steps: int
    guidance_scale: float
    scale: float = 1.0
    dtype: str = "float32"
    lanes: int = LANES

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            hint = did_you_mean(self.dtype, DTYPES)
            raise UserError(f'dtype is "{self.dtype}"{hint}: use one of {", ".join(DTYPES)}.')
        if self.size < 8 or self.size % 8:
            raise UserError(f"size is {self.size}: use a multiple of 8 pixels, such as 1024.")
        for name in ("steps", "lanes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: use 1 or more.")


@dataclass(frozen=True)
class Job:
    """One image: who draws what from which noise, and its file relative to the store's root."""

    adapter: Adapter
    prompt: Prompt
    seed: int
    file: Path


def jobs(adapters: Sequence[Adapter], prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """Every image of a comparison, ordered by adapter, prompt and seed.

    Raises:
        UserError: a seed is given twice or is negative.
    """
    for seed in seeds:
        if seed < 0 or list(seeds).count(seed) > 1:
            raise UserError(f"the seed {seed} is negative or given twice: give different ones.")
    return [
        Job(adapter, prompt, seed, _file(adapter, number, prompt, seed))
        for adapter in adapters
        for number, prompt in enumerate(prompts, start=1)
        for seed in seeds
    ]


def _file(adapter: Adapter, number: int, prompt: Prompt, seed: int) -> Path:
    return Path(adapter.slug, f"seed-{seed}", f"{number:03d}-{slug(prompt.text)}.png")


class Store:
    """The images under one folder.

    Args:
        root: made when the first image is.
        sampling: of all images; one that was made otherwise counts as missing.
    """

    def __init__(self, root: Path, sampling: Sampling) -> None:
        self.root, self.sampling = Path(root), sampling

    @cached_property
    def _base_digest(self) -> str | None:
        return store_png.base_digest(self.sampling.base_model)

    def parameters(self, job: Job) -> dict[str, Any]:
        """All that determines an image."""
        sampling = asdict(self.sampling)
        if job.adapter.weights is None:
            sampling["scale"] = 1.0  # the base model has nothing to scale
        sampling["base_model"] = without_paths(self.sampling.base_model)
        return {
            **sampling,
            "base_digest": self._base_digest,
            "adapter": job.adapter.digest,
            "prompt": job.prompt.text,
            "seed": job.seed,
        }

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those without a whole file that was made with the same parameters; each file once."""
        distinct = {job.file: job for job in jobs}.values()
        return [
            job
            for job in distinct
            if not store_png.matches(self.root / job.file, self.parameters(job))
        ]

    def generate(
        self,
        jobs: Sequence[Job],
        *,
        pipeline: Any = None,
        batch: int = 16,
        progress: bool = True,
        process: tuple[int, int] = (0, 1),
    ) -> int:
        """Make what is missing.

        Args:
            pipeline: the base model's, without an adapter; loaded when it is needed.
            batch: images between two visits to the disk, and the share that a process takes at a
                time; it changes no image.
            progress: show a bar (in the first process).
            process: rank and number of the processes that were given the same jobs; each makes its
                own part, and no file is written by two.

        Returns:
            How many images were made here.

        Raises:
            UserError: the base model or an adapter can't be loaded, or a file not be written.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}: use 1 or more.")
        rank, count = process
        distinct = list({job.file: job for job in jobs}.values())
        own = [job for i, job in enumerate(distinct) if i // batch % count == rank]
        todo = self.missing(own)
        if not todo:
            return 0
        if pipeline is None:
            pipeline = self._load(rank)
        painter = _Painter(pipeline, self.sampling)
        bar = tqdm(
            desc="images",
            unit="image",
            total=len(own),
            initial=len(own) - len(todo),
            disable=not progress or rank > 0,
        )
        with bar, _one_thread(pipeline.unet.device):
            for adapter, run in groupby(todo, key=lambda job: job.adapter):
                with applied(pipeline, adapter, self.sampling.scale):
                    for part in _parts(list(run), batch):
                        self._write(part, painter(part))
                        bar.update(len(part))
        return len(todo)

    def open(self, job: Job) -> Image:
        """The image of a job, RGB.

        Raises:
            UserError: it is not there or damaged.
        """
        return store_png.read(self.root / job.file)

    def _write(self, part: Sequence[Job], images: Sequence[Image]) -> None:
        found = versions()
        stated = {name: found.get(name) for name in _STATED}
        for job, image in zip(part, images, strict=True):
            record = {**self.parameters(job), store_png.VERSIONS: stated}
            store_png.write(self.root / job.file, image, record)

    def _load(self, rank: int) -> Any:
        quiet()
        pipeline = load_pipeline(self.sampling.base_model, dtype=DTYPES[self.sampling.dtype])
        if not torch.cuda.is_available():
            return pipeline
        local = int(os.environ.get("LOCAL_RANK", rank))
        return pipeline.to(f"cuda:{local % torch.cuda.device_count()}")


class _Painter:
    """Images for jobs from a pipeline as it is; text is embedded once and kept."""

    def __init__(self, pipeline: Any, sampling: Sampling) -> None:
        self._pipeline, self._sampling = pipeline, sampling
        self._encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        self._known: dict[str, PromptEmbedding] = {}

    def __call__(self, jobs: Sequence[Job]) -> list[Image]:
        sampling = self._sampling
        filled = [*jobs, *[jobs[-1]] * (-len(jobs) % sampling.lanes)]
        texts = [job.prompt.text for job in filled]
        images = generate(
            self._pipeline,
            texts,
            [seed_of("image", job.seed, job.prompt.text) for job in filled],
            size=sampling.size,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            embeddings=self._embeddings(texts),
            batch=sampling.lanes,
        )
        return images[: len(jobs)]

    def _embeddings(self, texts: Sequence[str]) -> tuple[PromptEmbedding, PromptEmbedding]:
        known = {} if self._text_is_adapted() else self._known
        for text in dict.fromkeys(texts):  # one at a time: always the same shape
            if text not in known:
                known[text] = _on_cpu(embed(self._pipeline, [text]))
        negative = _on_cpu(embed_negative(self._pipeline, 1))
        return _joined([known[text] for text in texts]), _joined([negative] * len(texts))

    def _text_is_adapted(self) -> bool:
        now = (self._pipeline.text_encoder, self._pipeline.text_encoder_2)
        swapped = any(a is not b for a, b in zip(now, self._encoders, strict=True))
        return swapped or any(names(encoder) for encoder in now)


def _on_cpu(embedding: PromptEmbedding) -> PromptEmbedding:
    return PromptEmbedding(embedding.sequence.cpu(), embedding.pooled.cpu())


def _joined(rows: Sequence[PromptEmbedding]) -> PromptEmbedding:
    return PromptEmbedding(
        torch.cat([row.sequence for row in rows]), torch.cat([row.pooled for row in rows])
    )


def _parts(items: list[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
