"""All scores of images on disk. The same files give the same scores, in any order and batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError, translated
from bilora_diffusion.image.decode import read_rgb
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet

from ..subjects import BASE, Subject
from ..table import Row
from .captioners import Captioner
from .images import Job, Store
from .models import Scorer, in_batches
from .prompts import Prompt

CHUNK = 64
"""Images that are held in memory at once."""
NONE = "none"
OF_IMAGES = ("concept", "dataset_name", "instance_data_dir", "dataset_config_name", "image_column")
"""Options of a run, or of one of its concepts, that say which images it has."""


class Seen(NamedTuple):
    """An image as the models see it: embedding (d,), and the caption and its own if asked for."""

    vector: Tensor
    caption: str | None = None
    words: Tensor | None = None


class ImageJudge:
    """Scores images by what they are held against."""

    def __init__(
        self,
        store: Store,
        scorer: Scorer,
        captioner: Captioner | None,
        truths: Mapping[str, Image],
        training: Mapping[str, ImageSet],
        originals: Sequence[Job],
        progress: bool = True,
    ) -> None:
        self._store, self._scorer, self._captioner = store, scorer, captioner
        self._progress = progress
        self._seen: dict[tuple[bytes, bool], Seen] = {}
        vectors = scorer.images(list(truths.values())) if truths else []
        self._truths = dict(zip(truths, vectors, strict=True))
        distinct = {id(images): images for images in training.values()}
        embedded = {number: _embedded(images, scorer) for number, images in distinct.items()}
        self._training = {label: embedded[id(images)] for label, images in training.items()}
        self._originals = {
            (job.prompt.text, job.seed): image.vector
            for job, image in self.look(originals, captioned=False)
        }

    def rows(self, subject: Subject, jobs: Sequence[Job]) -> Iterator[Row]:
        """The scores of each image, and a row "image" that names its file."""
        scored = [job for job in jobs if not job.prompt.general]
        general = [job for job in jobs if job.prompt.general]
        texts = list(dict.fromkeys(job.prompt.text for job in scored))
        prompts = dict(zip(texts, self._scorer.texts(texts), strict=True))
        for job, image in self.look(scored, captioned=self._captioner is not None):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            yield from self._scores(subject, job, image, prompts[job.prompt.text])
        for job, image in self.look(general, captioned=False):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            if subject.kind != BASE:
                original = self._originals[job.prompt.text, job.seed]
                yield self._row(subject, job, "drift", cosine(image.vector, original))

    def _scores(self, subject: Subject, job: Job, image: Seen, prompt: Tensor) -> Iterator[Row]:
        yield self._row(subject, job, "i2t", cosine(image.vector, prompt))
        if image.caption is not None and image.words is not None:
            yield self._row(subject, job, "t2t", cosine(prompt, image.words), image.caption)
        if job.prompt.text in self._truths:
            truth = self._truths[job.prompt.text]
            yield self._row(subject, job, "truth", cosine(image.vector, truth))
        if subject.label in self._training:
            names, pictures = self._training[subject.label]
            likeness, index = nearest(image.vector, pictures)
            yield self._row(subject, job, "nearest", likeness, names[index])

    @staticmethod
    def _row(subject: Subject, job: Job, metric: str, value: float | None, note: str = "") -> Row:
        return subject.row(metric, value, item=job.prompt.text, seed=job.seed, note=note)

    def look(self, jobs: Sequence[Job], captioned: bool) -> Iterator[tuple[Job, Seen]]:
        """Each image, equal ones looked at once: they get equal scores to the last bit."""
        what = "embedding and captioning" if captioned else "embedding"
        with tqdm(total=len(jobs), desc=what, unit="image", disable=not self._progress) as bar:
            for chunk in in_batches(jobs, CHUNK):
                pictures = [self._store.open(job) for job in chunk]
                contents = [repr(p.size).encode() + p.tobytes() for p in pictures]
                keys = [(blake2b(one, digest_size=16).digest(), captioned) for one in contents]
                new = dict(zip(keys, pictures, strict=True))
                new = {key: picture for key, picture in new.items() if key not in self._seen}
                if new:
                    looked = self._looked_at(list(new.values()), captioned)
                    self._seen.update(zip(new, looked, strict=True))
                yield from ((job, self._seen[key]) for job, key in zip(chunk, keys, strict=True))
                bar.update(len(chunk))

    def _looked_at(self, pictures: Sequence[Image], captioned: bool) -> list[Seen]:
        vectors = self._scorer.images(pictures)
        if not captioned or self._captioner is None:
            return [Seen(vector) for vector in vectors]
        captions = self._captioner(pictures)
        words = self._scorer.texts(captions)
        return [Seen(*parts) for parts in zip(vectors, captions, words, strict=True)]


def _embedded(images: ImageSet, scorer: Scorer) -> tuple[list[str], Tensor]:
    """Names and embeddings (n, d) of a set."""
    numbers = range(len(images))
    parts = [scorer.images([images.image(i) for i in part]) for part in in_batches(numbers, CHUNK)]
    return [entry.name for entry in images.entries], torch.cat(parts)


def truth_pictures(prompts: Sequence[Prompt], base: str) -> dict[str, Image]:
    """The held-out picture of each scored prompt that has one, by the prompt's text.

    The miniature's own icons are no ground truth for another model.
    """
    pictures = {}
    for prompt in prompts:
        file = prompt.reference
        if file is None or prompt.general:
            continue
        if base not in mini.PIPELINES and mini.heldout_dir() in file.resolve().parents:
            continue
        what = f'the reference {file} of "{prompt.text}" can\'t be read'
        with translated(what, "correct the file of prompts"):
            pictures[prompt.text] = read_rgb(file)
    return pictures


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors (d,) of unit length, summed in float64."""
    return max(-1.0, min(1.0, float(torch.dot(a.double(), b.double()))))


def nearest(image: Tensor, train: Tensor) -> tuple[float, int]:
    """Cosine of an image, (d,), with the training picture that is most like it, of (m, d), and that
    one's position: the first of several that are equally near.
    """
    cosines = normalize(train.double(), dim=1) @ normalize(image.double(), dim=0)
    index = int(cosines.argmax())  # documented: the first of equal maxima
    return max(-1.0, min(1.0, float(cosines[index]))), index


def training_sets(subjects: Sequence[Subject], given: str | None) -> dict[str, ImageSet]:
    """The training images by the subjects' labels.

    A run's folder says what it was trained on; a LoRA file does not. The base model is held
    against the images of the runs, where these are the same for all: it has not seen them, and so
    shows how alike images are without any memory.

    Args:
        given: ``--train_data``: a folder or set for all subjects, "none" for no memorization, or
            None.
    """
    if given == NONE:
        return {}
    if given is not None:
        return dict.fromkeys((subject.label for subject in subjects), open_images(given))
    opened: dict[str, ImageSet] = {}
    sets: dict[str, ImageSet] = {}
    for subject in subjects:
        if subject.folder is not None:
            config = subject.record.get("config", {})
            each = config.get("concepts") or [config]
            parts = [{name: own.get(name) for name in OF_IMAGES} for own in each]
            key = repr(parts)
            sets[subject.label] = opened[key] = opened.get(key) or _open(subject, parts)
    if len(opened) == 1:
        (shared,) = opened.values()
        sets |= {subject.label: shared for subject in subjects if subject.kind == BASE}
    return sets


def _open(subject: Subject, parts: Sequence[Mapping[str, str | None]]) -> ImageSet:
    """The images of all concepts of a run."""
    left_out = f"or --train_data {NONE} to leave memorization out."
    places = [own["dataset_name"] or own["instance_data_dir"] for own in parts]
    if not all(places):
        raise UserError(
            f"{subject.folder} does not say what it was trained on: give --train_data, {left_out}"
        )
    try:
        sets = {
            f"{own['concept']}": open_images(
                str(place),
                image_column=own["image_column"] or "image",
                config_name=own["dataset_config_name"],
                skip_bad_images=True,
            )
            for place, own in zip(places, parts, strict=True)
        }
    except UserError as error:
        raise UserError(
            f"the training images of {subject.label} can't be opened ({str(error).rstrip('.')}):"
            f" give their folder as --train_data, {left_out}"
        ) from error
    joined = ImageSet.joined(subject.label, sets)
    return next(iter(sets.values())) if joined is None or len(sets) == 1 else joined
