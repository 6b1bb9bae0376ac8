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
from bilora_diffusion.image.image_files import read_rgb
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.mini.colors import MAPS

from ..subjects import BASE, Subject
from ..table import Row
from .captioners import Captioner
from .images import Job, Store
from .models import ImageEmbedder, Scorer, in_batches
from .prompts import Prompt

CHUNK = 64
"""Images that are held in memory at once."""
NONE = "none"
OF_IMAGES = ("concept", "dataset_name", "instance_data_dir", "dataset_config_name", "image_column")
"""Options of a run, or of one of its concepts, that say which images it has."""


class EmbeddedImage(NamedTuple):
    """An image as the models see it: its embedding (d,); if asked for, its caption and the
    caption's embedding (d,), and its embedding by the image model, (e,).
    """

    vector: Tensor
    caption: str | None = None
    caption_vector: Tensor | None = None
    dino_vector: Tensor | None = None


class EmbeddedSet(NamedTuple):
    """Names of a set's images, and their embeddings, (n, d)."""

    names: list[str]
    vectors: Tensor


class Pictures:
    """Held-out pictures and training sets as one model embeds them.

    Args:
        truths: picture by the text of its prompt.
        training: set by the label of the run that learned it.
    """

    def __init__(
        self, embedder: ImageEmbedder, truths: Mapping[str, Image], training: Mapping[str, ImageSet]
    ) -> None:
        vectors = embedder.images(list(truths.values())) if truths else []
        self.truths = dict(zip(truths, vectors, strict=True))
        # Runs on one set share its embeddings.
        embedded_sets: dict[int, EmbeddedSet] = {}
        self.training: dict[str, EmbeddedSet] = {}
        for label, images in training.items():
            if id(images) not in embedded_sets:
                embedded_sets[id(images)] = embed_set(images, embedder)
            self.training[label] = embedded_sets[id(images)]


class ImageJudge:
    """Scores images against prompts, captions, held-out pictures and training images.

    With an image model, such as DINOv2, they are held against the pictures by its embeddings too.
    """

    def __init__(
        self,
        store: Store,
        scorer: Scorer,
        captioner: Captioner | None,
        truths: Mapping[str, Image],
        training: Mapping[str, ImageSet],
        originals: Sequence[Job],
        progress: bool = True,
        image_model: ImageEmbedder | None = None,
    ) -> None:
        self._store, self._scorer, self._captioner = store, scorer, captioner
        self._progress, self._image_model = progress, image_model
        self._embedded: dict[tuple[bytes, bool], EmbeddedImage] = {}
        self._pictures = Pictures(scorer, truths, training)
        self._dino_pictures: Pictures | None = None
        if image_model is not None:
            self._dino_pictures = Pictures(image_model, truths, training)
        self._originals: dict[tuple[str, int], Tensor] = {}  # by prompt and seed
        for job, image in self.look(originals, is_scored=False):
            self._originals[job.prompt.text, job.seed] = image.vector

    def rows(self, subject: Subject, jobs: Sequence[Job]) -> Iterator[Row]:
        """The scores of each image, and a row "image" that names its file."""
        scored = [job for job in jobs if not job.prompt.general]
        general = [job for job in jobs if job.prompt.general]
        texts = list(dict.fromkeys(job.prompt.text for job in scored))
        prompts = dict(zip(texts, self._scorer.texts(texts), strict=True))
        for job, image in self.look(scored, is_scored=True):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            yield from self._scores(subject, job, image, prompts[job.prompt.text])
        for job, image in self.look(general, is_scored=False):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            if subject.kind != BASE:  # whose drift from itself is none
                original = self._originals[job.prompt.text, job.seed]
                yield self._row(subject, job, "drift", cosine(image.vector, original))

    def _scores(
        self, subject: Subject, job: Job, image: EmbeddedImage, prompt: Tensor
    ) -> Iterator[Row]:
        yield self._row(subject, job, "i2t", cosine(image.vector, prompt))
        if image.caption is not None and image.caption_vector is not None:
            likeness = cosine(prompt, image.caption_vector)
            yield self._row(subject, job, "t2t", likeness, image.caption)
        yield from self._likeness(subject, job, image.vector, self._pictures)
        if image.dino_vector is not None and self._dino_pictures is not None:
            yield from self._likeness(
                subject, job, image.dino_vector, self._dino_pictures, prefix="dino_"
            )

    def _likeness(
        self, subject: Subject, job: Job, vector: Tensor, pictures: Pictures, prefix: str = ""
    ) -> Iterator[Row]:
        """Likeness to the held-out picture and to the nearest training picture, by one model."""
        if job.prompt.text in pictures.truths:
            truth = pictures.truths[job.prompt.text]
            yield self._row(subject, job, f"{prefix}truth", cosine(vector, truth))
        if subject.label in pictures.training:
            training = pictures.training[subject.label]
            likeness, index = nearest(vector, training.vectors)
            name = training.names[index]
            yield self._row(subject, job, f"{prefix}nearest", likeness, name)

    @staticmethod
    def _row(subject: Subject, job: Job, metric: str, value: float | None, note: str = "") -> Row:
        return subject.row(metric, value, item=job.prompt.text, seed=job.seed, note=note)

    def look(self, jobs: Sequence[Job], is_scored: bool) -> Iterator[tuple[Job, EmbeddedImage]]:
        """Each image, equal ones looked at once: they get equal scores to the last bit.

        Those of general prompts are not scored: they need neither captions nor the image model.
        """
        is_captioned = is_scored and self._captioner is not None
        title = "embedding and captioning" if is_captioned else "embedding"
        is_hidden = not self._progress or not jobs
        with tqdm(total=len(jobs), desc=title, unit="image", disable=is_hidden) as bar:
            for chunk in in_batches(jobs, CHUNK):
                pictures = [self._store.open(job) for job in chunk]
                # By content: equal images of two adapters are embedded once.
                keys = []
                new: dict[tuple[bytes, bool], Image] = {}
                for picture in pictures:
                    content = repr(picture.size).encode() + picture.tobytes()
                    key = blake2b(content, digest_size=16).digest(), is_scored
                    keys.append(key)
                    if key not in self._embedded:
                        new[key] = picture
                if new:
                    embedded = self._embed(list(new.values()), is_scored)
                    self._embedded.update(zip(new, embedded, strict=True))
                for job, key in zip(chunk, keys, strict=True):
                    yield job, self._embedded[key]
                bar.update(len(chunk))

    def _embed(self, pictures: Sequence[Image], is_scored: bool) -> list[EmbeddedImage]:
        embedded = [EmbeddedImage(vector) for vector in self._scorer.images(pictures)]
        if is_scored and self._captioner is not None:
            captions = self._captioner(pictures)
            caption_vectors = self._scorer.texts(captions)
            for number, caption in enumerate(captions):
                embedded[number] = embedded[number]._replace(
                    caption=caption, caption_vector=caption_vectors[number]
                )
        if is_scored and self._image_model is not None:
            for number, vector in enumerate(self._image_model.images(pictures)):
                embedded[number] = embedded[number]._replace(dino_vector=vector)
        return embedded


def embed_set(images: ImageSet, embedder: ImageEmbedder) -> EmbeddedSet:
    """Embed all images of a set, `CHUNK` of them in memory at once."""
    vectors = []
    for numbers in in_batches(range(len(images)), CHUNK):
        pictures = [images.image(number) for number in numbers]
        vectors.append(embedder.images(pictures))
    names = [entry.name for entry in images.entries]
    if mini.color_map(images.label) is not None:  # the plain icon has that name
        names = [f"{images.label}/{name}" for name in names]
    return EmbeddedSet(names, torch.cat(vectors))


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
        sentence = f'the reference {file} of "{prompt.text}" can\'t be read'
        with translated(sentence, "correct the file of prompts"):
            picture = read_rgb(file)
        pictures[prompt.text] = MAPS[prompt.colors](picture) if prompt.colors else picture
    return pictures


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors (d,) of unit length, summed in float64."""
    return max(-1.0, min(1.0, float(torch.dot(a.double(), b.double()))))


def nearest(image: Tensor, train: Tensor) -> tuple[float, int]:
    """Cosine of an image, (d,), with the training picture that is most like it, of (m, d), and that
    one's position: the first of several that are equally near.
    """
    cosines = normalize(train.double(), dim=1) @ normalize(image.double(), dim=0)  # (m,)
    index = int(cosines.argmax())  # documented: the first of equal maxima
    return max(-1.0, min(1.0, float(cosines[index]))), index


def training_sets(subjects: Sequence[Subject], dataset: str | None) -> dict[str, ImageSet]:
    """The training images by the subjects' labels.

    A run's folder says what it was trained on; a LoRA file does not. The base model is held
    against the images of the runs, where these are the same for all: it has not seen them, and so
    shows how alike images are without any memory.

    Args:
        dataset: ``--train_data``: a folder or set for all subjects, "none" for no memorization, or
            None.
    """
    if dataset == NONE:
        return {}
    if dataset is not None:
        images = open_images(dataset)
        return {subject.label: images for subject in subjects}
    opened: dict[str, ImageSet] = {}
    sets: dict[str, ImageSet] = {}
    for subject in subjects:
        if subject.folder is not None:
            config = subject.record.get("config", {})
            concepts = config.get("concepts") or [config]
            parts = [{name: concept.get(name) for name in OF_IMAGES} for concept in concepts]
            key = repr(parts)
            sets[subject.label] = opened[key] = opened.get(key) or _open(subject, parts)
    if len(opened) == 1:  # else the base model belongs to no set
        (shared,) = opened.values()
        sets |= {subject.label: shared for subject in subjects if subject.kind == BASE}
    return sets


def _open(subject: Subject, parts: Sequence[Mapping[str, str | None]]) -> ImageSet:
    """The images of all concepts of a run."""
    left_out = f"or --train_data {NONE} to leave memorization out."
    places = [concept["dataset_name"] or concept["instance_data_dir"] for concept in parts]
    if not all(places):
        raise UserError(
            f"{subject.folder} does not say what it was trained on: give --train_data, {left_out}"
        )
    try:
        sets = {}
        for place, concept in zip(places, parts, strict=True):
            sets[f"{concept['concept']}"] = open_images(
                str(place),
                image_column=concept["image_column"] or "image",
                config_name=concept["dataset_config_name"],
                skip_bad_images=True,
            )
    except UserError as error:
        raise UserError(
            f"the training images of {subject.label} can't be opened ({str(error).rstrip('.')}):"
            f" give their folder as --train_data, {left_out}"
        ) from error
    joined = ImageSet.joined(subject.label, sets)
    return next(iter(sets.values())) if joined is None or len(sets) == 1 else joined
