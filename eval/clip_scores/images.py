"""Images of several adapters from the same noise, made once, kept as PNG files and reused.

store = Store(folder / "images", Sampling("mini", size=64, steps=25, guidance_scale=4.0))
todo = jobs(subject, prompts, seeds=[0])
store.generate(todo)
image = store.open(todo[0])

An image is a function of its parameters alone, bit for bit on one machine: its noise comes from
seed and prompt text, and the arithmetic does not see what else is made. Batched products are
rounded by the shape of the batch and the number of threads, so both are fixed: the denoiser always
gets ``Sampling.lanes`` images (a short rest is filled up), and one thread on a CPU. More cores are
used by more processes.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from bilora_diffusion import methods, mini
from bilora_diffusion.core.durable import write_bytes
from bilora_diffusion.core.errors import translated
from bilora_diffusion.core.files import duration, without_paths
from bilora_diffusion.core.seeds import seed_of
from bilora_diffusion.core.values import ADAPTER_GUIDANCE
from bilora_diffusion.image.families.base import join_rows
from bilora_diffusion.image.pipeline import load_pipeline, resolve
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.run.console import quiet
from bilora_diffusion.run.provenance import device, versions

from ..cache import of_folders
from ..load import applied
from ..subjects import BASE, Subject
from .prompts import Prompt

LANES = 4
WORTHWHILE = 32
"""Images for which another process is worth its start."""
_CHUNK = "parameters"
_VERSIONS = "versions"
"""The one entry that informs and determines nothing."""
_STATED = ("torch", "diffusers", "transformers", "peft", "bilora_diffusion")


@dataclass(frozen=True)
class Sampling:
    """Sampling of all images of a comparison.

    Args:
        base_model: folder, hub id, or "mini".
        size: side of the images, pixels.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        scale: factor of each adapter's change of the weights.
        dtype: of the UNet and the text encoders; the autoencoder decodes in float32.
        lanes: images in each call of the denoiser. More take more memory; another number may
            change an image by one step of 255 in single pixels, so it counts as a parameter.
        guidance_from: the model of guidance's unconditional prediction, "adapter" or "base".
    """

    base_model: str
    size: int
    steps: int
    guidance_scale: float
    scale: float = 1.0
    dtype: str = "float32"
    lanes: int = LANES
    guidance_from: str = ADAPTER_GUIDANCE


@dataclass(frozen=True)
class Job:
    """One image: whose, of which prompt and noise, and its file relative to the store's root."""

    subject: Subject
    prompt: Prompt
    seed: int
    file: Path


def jobs(subject: Subject, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """Every image of a subject, by prompt and seed.

    Scored and general prompts are numbered apart, so that a change in one set leaves the images of
    the other as they are. The folder is the same for the same weights whatever their label.
    """
    folder = f"{_family(subject)}-{subject.digest[:8]}".strip("-")
    counts = {True: 0, False: 0}  # of general prompts and of scored ones
    subject_jobs = []
    for prompt in prompts:
        counts[prompt.general] += 1
        number = f"{'general-' if prompt.general else ''}{counts[prompt.general]:03d}"
        for seed in seeds:
            file = Path(folder, f"seed-{seed}", f"{number}-{_slug(prompt.text)}.png")
            subject_jobs.append(Job(subject, prompt, seed, file))
    return subject_jobs


def _family(subject: Subject) -> str:
    """Kind of the weights, whatever they are called: a name may change and its images stay."""
    if subject.method is None:
        return "base-model" if subject.kind == BASE else subject.kind
    if subject.method in methods.names():
        return _slug(methods.get(subject.method).title)
    return _slug(subject.method)


def _slug(text: str) -> str:
    """Letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "x"


class Store:
    """The images under one folder."""

    def __init__(self, root: Path, sampling: Sampling, device: str = "cpu") -> None:
        self.root, self.sampling, self.device = Path(root), sampling, device

    @cached_property
    def pipeline(self) -> Any:
        """The base model's, without an adapter."""
        quiet()
        dtype = getattr(torch, self.sampling.dtype)
        return load_pipeline(self.sampling.base_model, dtype=dtype).to(self.device)

    @cached_property
    def _base_digest(self) -> str | None:
        """Hash of the base model's folder, whose name is not enough; None for a hub id."""
        folder = Path(resolve(self.sampling.base_model)).expanduser()
        if not folder.is_dir():
            return None
        return of_folders(folder, suffixes=(".safetensors", ".json", ".txt"))

    def parameters(self, job: Job) -> dict[str, Any]:
        """All that determines an image."""
        sampling = asdict(self.sampling)
        if job.subject.kind == BASE:
            sampling["scale"] = 1.0  # there is nothing to scale
        # Images that have no such parameter stay valid; the base model's are the same by both.
        if job.subject.kind == BASE or self.sampling.guidance_from == ADAPTER_GUIDANCE:
            del sampling["guidance_from"]
        sampling["base_model"] = without_paths(self.sampling.base_model)
        return {
            **sampling,
            "base_digest": self._base_digest,
            "adapter": job.subject.digest,
            "prompt": job.prompt.text,
            "seed": job.seed,
        }

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those without a whole file that was made with the same parameters; each file once."""
        distinct = {job.file: job for job in jobs}.values()
        return [job for job in distinct if not _matches(self.root / job.file, self.parameters(job))]

    def generate(
        self,
        jobs: Sequence[Job],
        *,
        batch: int = 16,
        progress: bool = True,
        process: tuple[int, int] = (0, 1),
    ) -> int:
        """Make what is missing.

        Args:
            batch: images between two visits to the disk, and the share that a process takes at a
                time; it changes no image.
            progress: show a bar (in the first process).
            process: rank and number of the processes that were given the same jobs; each makes its
                own part, and no file is written by two.
        """
        rank, count = process
        distinct = list({job.file: job for job in jobs}.values())
        # A process takes every count-th batch.
        share = [job for i, job in enumerate(distinct) if i // batch % count == rank]
        todo = self.missing(share)
        if not todo:
            return 0
        bar = tqdm(
            desc="images",
            unit="image",
            total=len(share),
            initial=len(share) - len(todo),
            disable=not progress or rank > 0,
        )
        num_made = 0
        with bar, _one_thread(self.device):
            for subject, group in groupby(todo, key=lambda job: job.subject):
                with applied(self.pipeline, subject, self.sampling.scale):
                    subject_jobs = list(group)
                    for start in range(0, len(subject_jobs), batch):
                        part = subject_jobs[start : start + batch]
                        began = time.monotonic()
                        self._write(part, _sample(self.pipeline, self.sampling, part))
                        bar.update(len(part))
                        num_made += len(part)
                        if num_made == len(part):
                            _say_how_long(bar, time.monotonic() - began, num_made, len(todo))
        return len(todo)

    def open(self, job: Job) -> Image.Image:
        """The image of a job, RGB."""
        path = self.root / job.file
        with (
            translated(f"{path} can't be read", "the same command makes it again"),
            Image.open(path, formats=["PNG"]) as image,
        ):
            return image.convert("RGB")

    def _write(self, part: Sequence[Job], images: Sequence[Image.Image]) -> None:
        stated = {name: version for name, version in versions().items() if name in _STATED}
        for job, image in zip(part, images, strict=True):
            record = {**self.parameters(job), _VERSIONS: stated}
            information, content = PngInfo(), BytesIO()
            information.add_text(_CHUNK, json.dumps(record, sort_keys=True))
            image.save(content, format="PNG", pnginfo=information)
            path = self.root / job.file
            with translated(f"{path} can't be written", "give another output folder"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content.getvalue())


def _say_how_long(bar: Any, seconds: float, num_made: int, num_missing: int) -> None:
    """Say how long the rest of a process' share takes; all work on theirs at the same time."""
    if num_made < num_missing and not bar.disable:
        rate = seconds / num_made
        bar.write(
            f"about {duration(rate * (num_missing - num_made))} for the other images, by the first"
            f" {num_made} ({rate:.2g} s each); then they are scored"
        )


def generate_in_processes(
    store: Store, jobs: Sequence[Job], batch: int, count: int | None = None
) -> int:
    """Make what is missing with ``count`` processes, this one included; returns how many images.

    What another process leaves undone, because it was killed or failed, is made here; the others
    end with this one.

    Args:
        batch: see :meth:`Store.generate`.
        count: 1 or more; by default as many cores as are worth it for the miniature on a CPU, and
            otherwise 1, since another model may fill the memory by itself.
    """
    missing = store.missing(jobs)
    if count is None:
        small = store.device == "cpu" and mini.embedded(store.sampling.base_model)
        cores = int(device(store.device)["cpu_cores"] or 1)
        count = min(cores, len(missing) // WORTHWHILE) if small else 1
    count = max(1, min(count, -(-len(missing) // batch)))  # none without a part of its own
    shared = (store, missing, batch, count)
    children: Any = torch.multiprocessing.start_processes(
        _generate_share, shared, nprocs=count - 1, join=False, daemon=True, start_method="spawn"
    )
    store.generate(missing, batch=batch, process=(0, count))
    for process in children.processes:
        process.join()
    # What a process that ended early has left.
    store.generate(missing, batch=batch, progress=False)
    return len(missing)


def _generate_share(rank: int, store: Store, jobs: Sequence[Job], batch: int, count: int) -> None:
    store.generate(jobs, batch=batch, process=(rank + 1, count))


def _sample(pipeline: Any, sampling: Sampling, jobs: Sequence[Job]) -> list[Image.Image]:
    """Images from a pipeline as it is; each text is embedded alone: always the same shape."""
    # Filled up with copies of the last, so that all batches have one shape.
    filled = [*jobs, *[jobs[-1]] * (-len(jobs) % sampling.lanes)]
    texts = [job.prompt.text for job in filled]
    embedded = {text: embed(pipeline, [text]) for text in dict.fromkeys(texts)}
    negative = embed_negative(pipeline, 1, guidance_from=sampling.guidance_from)
    positives = join_rows([embedded[text] for text in texts])
    negatives = join_rows([negative] * len(texts))
    images = generate(
        pipeline,
        texts,
        [seed_of("image", job.seed, job.prompt.text) for job in filled],
        size=sampling.size,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        guidance_from=sampling.guidance_from,
        embeddings=(positives, negatives),
        batch=sampling.lanes,
    )
    return images[: len(jobs)]


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Within the context a CPU uses one thread: sums are rounded by the number of threads."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matches(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Test that a whole PNG with exactly these parameters is there; every byte is checked."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[_CHUNK])
            image.verify()  # reads to the end and compares each chunk's checksum
        return record | {_VERSIONS: 0} == json.loads(json.dumps({**parameters, _VERSIONS: 0}))
    except (OSError, SyntaxError, ValueError, struct.error, KeyError, TypeError):
        return False
