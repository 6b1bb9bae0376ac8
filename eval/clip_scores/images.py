"""Images of several adapters from the same noise, generated once and stored as PNG files.

store = Store(folder / "images", Sampling("mini", size=64, steps=25, guidance_scale=4.0))
todo = jobs(subject, prompts, seeds=[0])
store.generate(todo)
image = store.open(todo[0])

An image depends on its parameters only, bit for bit on one machine: its noise comes from seed and
prompt text, and the other images of the batch don't influence it. Batched products are rounded
differently for other batch shapes and numbers of threads, so both are fixed: the denoiser always
gets ``Sampling.lanes`` images (a smaller batch is filled up), and on a CPU it has one thread. More
cores are used by more processes.
"""

from __future__ import annotations

import json
import math
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from bilora_diffusion.core.errors import as_user_error
from bilora_diffusion.core.files import duration
from bilora_diffusion.core.seeds import seed_of
from bilora_diffusion.core.values import ADAPTER_GUIDANCE
from bilora_diffusion.image.families.tensors import join_rows
from bilora_diffusion.image.pipeline import load_pipeline, resolve
from bilora_diffusion.image.sampling import embed, embed_negative, generate
from bilora_diffusion.run.console import quiet
from bilora_diffusion.run.provenance import device, versions

from ..cache import hash_of_folders
from ..load import applied
from ..subjects import BASE, Subject
from .perturbation import Perturbation
from .prompts import Prompt
from .sampling import Sampling

# Images for which another process is worth its start
WORTHWHILE = 32
# From one look at the files of other processes to the next
COUNT_SECONDS = 1.0
# Name of the PNG's text with the parameters
_CHUNK = "parameters"
# The entry of the parameters that does not influence the image
_VERSIONS = "versions"
# Whose versions are in each image
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "bilora_diffusion")


@dataclass(frozen=True)
class Job:
    """One image: its subject, prompt and noise seed, and its file relative to the store's root."""

    subject: Subject
    prompt: Prompt
    seed: int
    file: Path


def jobs(subject: Subject, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """Every image of a subject, by prompt and seed.

    Scored and general prompts are numbered separately, so that a change of one set renames no image
    of the other. The folder depends on the weights, not on the subject's label.
    """
    folder = f"{_kind_of_weights(subject)}-{subject.digest[:8]}".strip("-")
    counts = {True: 0, False: 0}  # of general prompts and of scored ones
    subject_jobs = []
    for prompt in prompts:
        counts[prompt.general] += 1
        number = f"{counts[prompt.general]:03d}"
        if prompt.general:
            number = f"general-{number}"
        for seed in seeds:
            file = Path(folder, f"seed-{seed}", f"{number}-{_slug(prompt.text)}.png")
            subject_jobs.append(Job(subject, prompt, seed, file))
    return subject_jobs


def _kind_of_weights(subject: Subject) -> str:
    """Title of the weights' method, else their kind; not their label, which may change."""
    if subject.method is None:
        return "base-model" if subject.kind == BASE else subject.kind
    if subject.method in methods.names():
        return _slug(methods.get(subject.method).title)
    return _slug(subject.method)


def _slug(text: str) -> str:
    """The text as lower-case letters, digits and dashes, at most 48; "x" if it has none."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "x"


@dataclass(eq=False)
class Store:
    """The images under one folder, ``root``."""

    root: Path
    sampling: Sampling
    device: str = "cpu"

    @cached_property
    def pipeline(self) -> Any:
        """The base model's pipeline, without an adapter."""
        quiet()
        dtype = getattr(torch, self.sampling.dtype)
        return load_pipeline(self.sampling.base_model, dtype=dtype).to(self.device)

    @cached_property
    def _perturbation(self) -> Perturbation:
        """What is done to the denoiser's weights; read first while no adapter is on it."""
        sampling = self.sampling
        return Perturbation(self.pipeline, sampling.base_precision, sampling.weight_noise)

    @cached_property
    def _base_digest(self) -> str | None:
        """Hash of the files in the base model's folder; None for a hub id."""
        folder = Path(resolve(self.sampling.base_model)).expanduser()
        if not folder.is_dir():
            return None
        return hash_of_folders(folder, suffixes=(".safetensors", ".json", ".txt"))

    def parameters(self, job: Job) -> dict[str, Any]:
        """All that an image depends on."""
        sampling = self.sampling.to_dict()
        if job.subject.kind == BASE:
            sampling["scale"] = 1.0  # it has no adapter to scale
        # The parameter is newer than others: without it, images of earlier versions stay valid. For
        # the base model all values mean the same.
        if job.subject.kind == BASE or self.sampling.guidance_from == ADAPTER_GUIDANCE:
            del sampling["guidance_from"]
        return {
            **sampling,
            "base_digest": self._base_digest,
            "adapter": job.subject.digest,
            "prompt": job.prompt.text,
            "seed": job.seed,
        }

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs without a valid file of the same parameters; each file once."""
        missing = []
        for job in {job.file: job for job in jobs}.values():
            if not _is_valid(self.root / job.file, self.parameters(job)):
                missing.append(job)
        return missing

    def generate(
        self,
        jobs: Sequence[Job],
        *,
        batch: int = 16,
        bar: ImageBar | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> int:
        """Generate the missing images; returns their number.

        Args:
            batch: images that are generated before they are written, and the share that a process
                takes at a time. It does not influence an image.
            bar: it shows the progress, and counts the images of all processes.
            process: rank of this process, and number of the processes with the same jobs; each
                generates its own share.
        """
        rank, count = process
        share = []
        for number, job in enumerate({job.file: job for job in jobs}.values()):
            # A process takes every count-th batch.
            if number // batch % count == rank:
                share.append(job)
        todo = self.missing(share)
        if not todo:
            return 0
        num_made = 0
        perturbation = self._perturbation
        with _one_thread(self.device):
            for subject, group in groupby(todo, key=lambda job: job.subject):
                with (
                    applied(self.pipeline, subject, self.sampling.scale, self.sampling.lora),
                    perturbation.acting(self.pipeline),
                ):
                    subject_jobs = list(group)
                    for start in range(0, len(subject_jobs), batch):
                        part = subject_jobs[start : start + batch]
                        began = time.monotonic()
                        self._write(part, _sample(self.pipeline, self.sampling, part))
                        num_made += len(part)
                        if bar is None:
                            continue
                        bar.count()
                        is_first_part = num_made == len(part)
                        if is_first_part and num_made < len(todo):
                            seconds = (time.monotonic() - began) / num_made
                            bar.write(_estimate(seconds, num_made, len(todo) - num_made))
        return len(todo)

    def open(self, job: Job) -> Image.Image:
        """The image of a job, RGB."""
        path = self.root / job.file
        with (
            as_user_error(f"{path} can't be read", "the same command makes it again"),
            Image.open(path, formats=["PNG"]) as image,
        ):
            return image.convert("RGB")

    def _write(self, part: Sequence[Job], images: Sequence[Image.Image]) -> None:
        all_versions = versions()
        stated = {name: all_versions[name] for name in all_versions if name in _PACKAGES}
        for job, image in zip(part, images, strict=True):
            record = {**self.parameters(job), _VERSIONS: stated}
            information = PngInfo()
            content = BytesIO()
            information.add_text(_CHUNK, json.dumps(record, sort_keys=True))
            image.save(content, format="PNG", pnginfo=information)
            path = self.root / job.file
            with as_user_error(f"{path} can't be written", "give another output folder"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content.getvalue())


class ImageBar:
    """A progress bar of the images that are to be made, by this process or by others.

    It counts the files that are there, as other processes report nothing.

    Args:
        store: the files.
        missing: jobs whose images are to be made.
    """

    def __init__(self, store: Store, missing: Sequence[Job]) -> None:
        self._store = store
        self._missing = missing
        self._bar = tqdm(desc="images", unit="image", total=len(missing), disable=not missing)

    def __enter__(self) -> ImageBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self) -> None:
        """Show how many images are there by now."""
        missing = self._store.missing(self._missing)
        self._bar.update(len(self._missing) - len(missing))
        self._missing = missing

    def write(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self._bar.write(sentence)


def _estimate(seconds: float, num_made: int, num_missing: int) -> str:
    """How long this process takes for its missing images; the other processes work meanwhile."""
    return (
        f"about {duration(seconds * num_missing)} for the other images, by the first"
        f" {num_made} ({seconds:.2g} s each); then they are scored"
    )


def generate_in_processes(
    store: Store, jobs: Sequence[Job], batch: int, count: int | None = None
) -> int:
    """Generate the missing images in ``count`` processes with this one; returns their number.

    This process also generates the images of a process that was killed or failed. The others end
    with this one.

    Args:
        batch: see :meth:`Store.generate`.
        count: 1 or more. By default one for each core, if there are enough images, for the
            miniature on a CPU; otherwise 1, since another model may need all of the memory.
    """
    missing = store.missing(jobs)
    if count is None:
        count = 1
        if store.device == "cpu" and mini.find_embedded(store.sampling.base_model):
            cores = int(device(store.device)["cpu_cores"] or 1)
            count = min(cores, len(missing) // WORTHWHILE)
    num_batches = math.ceil(len(missing) / batch)
    count = max(1, min(count, num_batches))  # each has a batch
    shared = (store, missing, batch, count)
    children: Any = torch.multiprocessing.start_processes(
        _generate_share, shared, nprocs=count - 1, join=False, daemon=True, start_method="spawn"
    )
    with ImageBar(store, missing) as bar:
        store.generate(missing, batch=batch, bar=bar, process=(0, count))
        for process in children.processes:
            while process.is_alive():
                process.join(COUNT_SECONDS)
                bar.count()
        # Images of a process that ended early
        store.generate(missing, batch=batch, bar=bar)
    return len(missing)


def _generate_share(rank: int, store: Store, jobs: Sequence[Job], batch: int, count: int) -> None:
    """Generate a child process's share; torch counts children from 0, and rank 0 is the parent."""
    store.generate(jobs, batch=batch, process=(rank + 1, count))


def _sample(pipeline: Any, sampling: Sampling, jobs: Sequence[Job]) -> list[Image.Image]:
    """Sample the images of jobs with a pipeline, whose adapter is on."""
    # Filled up with copies of the last job, so that all batches have the same shape.
    num_copies = -len(jobs) % sampling.lanes
    filled = [*jobs, *[jobs[-1]] * num_copies]
    texts = [job.prompt.text for job in filled]
    # Each text is embedded alone, so that this batch has the same shape too.
    embeddings = {text: embed(pipeline, [text]) for text in dict.fromkeys(texts)}
    negative = embed_negative(pipeline, 1, guidance_from=sampling.guidance_from)
    positives = join_rows([embeddings[text] for text in texts])
    negatives = join_rows([negative] * len(texts))
    images = generate(
        pipeline,
        texts,
        [seed_of("image", job.seed, job.prompt.text) for job in filled],
        size=sampling.size,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        guidance_from=sampling.guidance_from,
        scheduler=sampling.scheduler,
        embeddings=(positives, negatives),
        batch=sampling.lanes,
    )
    return images[: len(jobs)]


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Context manager: one thread on a CPU, since the rounding of sums depends on the number."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_valid(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Test that a file is a whole PNG with exactly these parameters."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[_CHUNK])
            image.verify()  # reads to the end and compares each chunk's checksum
        # As JSON, so that tuples and lists are equal.
        expected = json.loads(json.dumps({**parameters, _VERSIONS: None}))
        return {**record, _VERSIONS: None} == expected
    except (OSError, SyntaxError, ValueError, struct.error, KeyError, TypeError):
        return False
