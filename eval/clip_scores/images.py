"""Images of several adapters from the same noise, each generated once and stored as a PNG file.

store = Store(folder / "images", Sampling("mini", size=64, steps=25, guidance_scale=4.0))
todo = jobs(subject, prompts, seeds=[0])
store.generate(todo)
image = store.open(todo[0])

On one device and with the same package versions, an image depends only on its parameters, bit for
bit: its noise comes from the seed and the prompt's text, and the other images of the batch have no
influence. Matrix products are rounded differently for other batch shapes and numbers of threads, so
both are fixed: the denoiser always gets ``Sampling.lanes`` images (a smaller batch is padded), and
on a CPU it runs on one thread. To use more cores, start more processes.
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

# Number of images that justifies the start-up time of another process
WORTHWHILE = 32
# Interval at which the files of other processes are counted
COUNT_SECONDS = 1.0
# Name of the PNG text chunk with the parameters
_CHUNK = "parameters"
# Entry of the stored parameters that is ignored when two sets of parameters are compared
_VERSIONS = "versions"
# Packages whose versions are stored in each image
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "bilora_diffusion")


@dataclass(frozen=True)
class Job:
    """One image: its subject, prompt and noise seed, and its file relative to the store's root."""

    subject: Subject
    prompt: Prompt
    seed: int
    file: Path


def jobs(subject: Subject, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Job]:
    """Return a job for each prompt and seed of a subject.

    Scored and general prompts are numbered separately, so that a change to one set does not rename
    the images of the other. The folder depends on the weights, not on the subject's label.
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
    """Return the method's title as a slug, or the kind of weights if the method is unknown.

    The subject's label is not used, because it may change.
    """
    if subject.method is None:
        return "base-model" if subject.kind == BASE else subject.kind
    if subject.method in methods.names():
        return _slug(methods.get(subject.method).title)
    return _slug(subject.method)


def _slug(text: str) -> str:
    """Reduce a text to at most 48 lower-case letters, digits and dashes; "x" if none are left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-") or "x"


@dataclass(eq=False)
class Store:
    """The images under one folder, ``root``."""

    root: Path
    sampling: Sampling
    device: str = "cpu"

    @cached_property
    def pipeline(self) -> Any:
        """Pipeline of the base model, without an adapter."""
        quiet()
        dtype = getattr(torch, self.sampling.dtype)
        return load_pipeline(self.sampling.base_model, dtype=dtype).to(self.device)

    @cached_property
    def _perturbation(self) -> Perturbation:
        """Perturbation of the denoiser's weights; first accessed while no adapter is applied."""
        sampling = self.sampling
        return Perturbation(self.pipeline, sampling.base_precision, sampling.weight_noise)

    @cached_property
    def _base_digest(self) -> str | None:
        """Hash of the weights, JSON and text files in the base model's folder; None for the hub."""
        folder = Path(resolve(self.sampling.base_model)).expanduser()
        if not folder.is_dir():
            return None
        return hash_of_folders(folder, suffixes=(".safetensors", ".json", ".txt"))

    def parameters(self, job: Job) -> dict[str, Any]:
        """Return the parameters that an image's file stores; see the module docstring."""
        sampling = self.sampling.to_dict()
        if job.subject.kind == BASE:
            sampling["scale"] = 1.0  # the base model has no adapter to scale
        # Earlier versions did not store this parameter. Omitting its default keeps their images
        # valid. For the base model, all of its values have the same effect.
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
        """Return the jobs that have no valid file with the same parameters; each file once."""
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
        """Generate this process's share of the missing images, and return their number.

        Args:
            jobs: jobs of all processes.
            batch: number of images that are generated before they are written to disk; jobs are
                also distributed to the processes in such batches. It does not influence an image.
            bar: shows the progress, and counts the images of all processes.
            process: rank of this process, and number of processes that share the jobs.
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
        """Read the image of a job as RGB."""
        path = self.root / job.file
        with (
            as_user_error(f"{path} can't be read", "run the same command to generate it again"),
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
    """A progress bar for missing images, which this process or other processes generate.

    It counts files, because the other processes report no progress.

    Args:
        store: store of the images.
        missing: jobs whose images are missing.
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
        """Count the files again and update the bar."""
        missing = self._store.missing(self._missing)
        self._bar.update(len(self._missing) - len(missing))
        self._missing = missing

    def write(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        self._bar.write(sentence)


def _estimate(seconds: float, num_made: int, num_missing: int) -> str:
    """Return a sentence on the remaining time, estimated from this process's first batch."""
    return (
        f"about {duration(seconds * num_missing)} left to generate images, at {seconds:.2g} s each"
        f" (measured on the first {num_made}); then they are scored"
    )


def generate_in_processes(
    store: Store, jobs: Sequence[Job], batch: int, count: int | None = None
) -> int:
    """Generate the missing images in several processes, and return their number.

    If another process fails or is killed, this process generates its images. The other processes
    end when this one does.

    Args:
        store: store of the images.
        jobs: jobs of all images.
        batch: see :meth:`Store.generate`.
        count: number of processes including this one, 1 or more. The default for the miniature on
            a CPU is one process per core if there are enough images; otherwise it is 1, because
            another model may need all of the memory. No more processes start than there are
            batches.
    """
    missing = store.missing(jobs)
    if count is None:
        count = 1
        if store.device == "cpu" and mini.find_embedded(store.sampling.base_model):
            cores = int(device(store.device)["cpu_cores"] or 1)
            count = min(cores, len(missing) // WORTHWHILE)
    num_batches = math.ceil(len(missing) / batch)
    count = max(1, min(count, num_batches))  # each process gets at least one batch
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
        # Generate the images of processes that ended early.
        store.generate(missing, batch=batch, bar=bar)
    return len(missing)


def _generate_share(rank: int, store: Store, jobs: Sequence[Job], batch: int, count: int) -> None:
    """Generate a child's share; torch numbers the children from 0, but the parent has rank 0."""
    store.generate(jobs, batch=batch, process=(rank + 1, count))


def _sample(pipeline: Any, sampling: Sampling, jobs: Sequence[Job]) -> list[Image.Image]:
    """Sample the images of jobs with a pipeline to which the adapter is applied."""
    # Pad with copies of the last job, so that all batches have the same shape.
    num_copies = -len(jobs) % sampling.lanes
    filled = [*jobs, *[jobs[-1]] * num_copies]
    texts = [job.prompt.text for job in filled]
    # Embed each text alone, so that the text encoder's batch also has a fixed shape.
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
    """Use one thread on a CPU within the context; their number changes the rounding of sums."""
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_valid(path: Path, parameters: Mapping[str, Any]) -> bool:
    """Return whether a file is a complete PNG with exactly these parameters."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info[_CHUNK])
            image.verify()  # reads to the end and checks each chunk's checksum
        # Convert through JSON, so that tuples and lists compare as equal.
        expected = json.loads(json.dumps({**parameters, _VERSIONS: None}))
        return {**record, _VERSIONS: None} == expected
    except (OSError, SyntaxError, ValueError, struct.error, KeyError, TypeError):
        return False
