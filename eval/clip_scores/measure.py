"""Scores of stored images.

Up to rounding, a file's scores do not depend on the other files of its batch or on their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from bilora_diffusion import mini
from bilora_diffusion.core.errors import UserError, as_user_error
from bilora_diffusion.image.image_files import read_rgb
from bilora_diffusion.image.opening import open_images
from bilora_diffusion.image.sets import ImageSet
from bilora_diffusion.mini.colors import MAPS

from ..results.compare import mean
from ..results.table import Row
from ..subjects import BASE, Subject
from .captioners import Captioner
from .images import Job, Store
from .models import ImageEmbedder, Scorer, in_batches
from .prompts import Prompt

# Number of images in memory at a time
CHUNK = 64
NONE = "none"
# Options of a run, or of one of its concepts, that specify its training images
OF_IMAGES = ("concept", "dataset_name", "instance_data_dir", "dataset_config_name", "image_column")


class EmbeddedImage(NamedTuple):
    """The embeddings of an image, and its caption; None for a value that is not needed."""

    vector: Tensor  # from the scorer, (d,)
    caption: str | None = None
    caption_vector: Tensor | None = None  # from the scorer, (d,)
    dino_vector: Tensor | None = None  # from the image model, (e,)


class EmbeddedSet(NamedTuple):
    """Names of the n images of a set, and their embeddings, (n, d)."""

    names: list[str]
    vectors: Tensor


class Pictures:
    """Held-out pictures and training sets, embedded by one model.

    Args:
        embedder: the model.
        truths: text of a prompt -> its held-out picture.
        training: label of a run -> its training images.
    """

    def __init__(
        self, embedder: ImageEmbedder, truths: Mapping[str, Image], training: Mapping[str, ImageSet]
    ) -> None:
        self.truths: dict[str, Tensor] = {}
        if truths:
            vectors = embedder.images(list(truths.values()))
            self.truths = dict(zip(truths, vectors, strict=True))
        # Runs with the same training set share its embeddings.
        embedded_sets: dict[int, EmbeddedSet] = {}
        self.training: dict[str, EmbeddedSet] = {}
        for label, images in training.items():
            if id(images) not in embedded_sets:
                embedded_sets[id(images)] = embed_set(images, embedder)
            self.training[label] = embedded_sets[id(images)]


class ImageJudge:
    """Scores images against prompts, captions, held-out pictures and training images.

    With an image model, such as DINOv2, images and pictures are also compared by its embeddings.

    Args:
        store: store of the images.
        scorer: model that embeds images and texts.
        captioner: model that captions the images for T2T; None if T2T is not measured.
        truths: text of a prompt -> its held-out picture.
        training: label of a run -> its training images.
        originals: jobs of the base model for the general prompts; drift is measured from their
            images.
        image_model: image model, such as DINOv2; None to leave out its scores.
    """

    def __init__(
        self,
        store: Store,
        scorer: Scorer,
        captioner: Captioner | None,
        truths: Mapping[str, Image],
        training: Mapping[str, ImageSet],
        originals: Sequence[Job],
        image_model: ImageEmbedder | None = None,
    ) -> None:
        self._store = store
        self._scorer = scorer
        self._captioner = captioner
        self._image_model = image_model
        self._embedded: dict[tuple[bytes, bool], EmbeddedImage] = {}
        self._pictures = Pictures(scorer, truths, training)
        self._dino_pictures: Pictures | None = None
        if image_model is not None:
            self._dino_pictures = Pictures(image_model, truths, training)
        self._originals: dict[tuple[str, int], Tensor] = {}  # by prompt and seed
        for job, image in self.embed_images(originals, is_scored=False):
            self._originals[job.prompt.text, job.seed] = image.vector

    def rows(self, subject: Subject, jobs: Sequence[Job]) -> Iterator[Row]:
        """Yield the scores of each image, and a row with the metric "image" that names its file."""
        scored, general = [], []
        for job in jobs:
            if job.prompt.general:
                general.append(job)
            else:
                scored.append(job)
        texts = list(dict.fromkeys(job.prompt.text for job in scored))
        prompts = dict(zip(texts, self._scorer.texts(texts), strict=True))
        for job, image in self.embed_images(scored, is_scored=True):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            yield from self._scores(subject, job, image, prompts[job.prompt.text])
        for job, image in self.embed_images(general, is_scored=False):
            yield self._row(subject, job, "image", None, f"{self._store.root.name}/{job.file}")
            if subject.kind != BASE:  # the base model has no drift from itself
                original = self._originals[job.prompt.text, job.seed]
                yield self._row(subject, job, "drift", cosine(image.vector, original))

    def truth_i2t(self) -> float | None:
        """Return the mean "i2t" score of the held-out pictures themselves; None if there are none.

        Samples that equal their held-out pictures get this score, so a score above this is not
        an improvement.
        """
        truths = self._pictures.truths
        if not truths:
            return None
        prompts = self._scorer.texts(list(truths))
        scores = []
        for picture, prompt in zip(truths.values(), prompts, strict=True):
            scores.append(cosine(picture, prompt))
        return mean(scores)

    def _scores(
        self, subject: Subject, job: Job, image: EmbeddedImage, prompt: Tensor
    ) -> Iterator[Row]:
        """Yield all scores of an image; ``prompt`` is the embedding of its prompt, (d,)."""
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
        """Yield an image's cosines to its held-out picture and to the nearest training picture."""
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

    def embed_images(
        self, jobs: Sequence[Job], is_scored: bool
    ) -> Iterator[tuple[Job, EmbeddedImage]]:
        """Yield each job with its embedded image.

        Identical images are embedded once, so their embeddings are bitwise equal.

        Args:
            jobs: jobs whose images are stored.
            is_scored: whether the images also need captions and DINOv2's embeddings. Images of
                general prompts do not.
        """
        is_captioned = is_scored and self._captioner is not None
        title = "embedding and captioning" if is_captioned else "embedding"
        with tqdm(total=len(jobs), desc=title, unit="image", disable=not jobs) as bar:
            for chunk in in_batches(jobs, CHUNK):
                keys = []
                new: dict[tuple[bytes, bool], Image] = {}
                for job in chunk:
                    picture = self._store.open(job)
                    # Include the size, since images of 2 x 8 and 4 x 4 can have the same bytes.
                    content = repr(picture.size).encode() + picture.tobytes()
                    key = blake2b(content, digest_size=16).digest(), is_scored
                    keys.append(key)
                    if key not in self._embedded:
                        new[key] = picture
                if new:
                    embedded_images = self._embed(list(new.values()), is_scored)
                    self._embedded.update(zip(new, embedded_images, strict=True))
                for job, key in zip(chunk, keys, strict=True):
                    yield job, self._embedded[key]
                bar.update(len(chunk))

    def _embed(self, pictures: Sequence[Image], is_scored: bool) -> list[EmbeddedImage]:
        """Embed pictures; if they are scored, also caption them and use the image model."""
        vectors = self._scorer.images(pictures)
        captions: Sequence[str | None] = [None] * len(pictures)
        caption_vectors: Iterable[Tensor | None] = [None] * len(pictures)
        dino_vectors: Iterable[Tensor | None] = [None] * len(pictures)
        if is_scored and self._captioner is not None:
            texts = self._captioner(pictures)
            captions, caption_vectors = texts, self._scorer.texts(texts)
        if is_scored and self._image_model is not None:
            dino_vectors = self._image_model.images(pictures)
        columns = zip(vectors, captions, caption_vectors, dino_vectors, strict=True)
        return [EmbeddedImage(*values) for values in columns]


def embed_set(images: ImageSet, embedder: ImageEmbedder) -> EmbeddedSet:
    """Embed all images of a set, with at most `CHUNK` of them in memory at a time."""
    vectors = []
    for numbers in in_batches(range(len(images)), CHUNK):
        pictures = [images.image(number) for number in numbers]
        vectors.append(embedder.images(pictures))
    names = images.names()
    # Icons in other colors have the same file names as the plain icons.
    if mini.color_map(images.label) is not None:
        names = [f"{images.label}/{name}" for name in names]
    return EmbeddedSet(names, torch.cat(vectors))


def truth_pictures(prompts: Sequence[Prompt], base: str) -> dict[str, Image]:
    """Read the held-out pictures of the scored prompts: text of the prompt -> picture.

    The icons of the miniature are left out for other base models.
    """
    pictures = {}
    for prompt in prompts:
        file = prompt.reference
        if file is None or prompt.general:
            continue
        if base not in mini.PIPELINES and mini.heldout_dir() in file.resolve().parents:
            continue
        sentence = f'the reference {file} of "{prompt.text}" can\'t be read'
        with as_user_error(sentence, "replace this picture, or give other --prompts"):
            picture = read_rgb(file)
        if prompt.colors is not None:
            picture = MAPS[prompt.colors](picture)
        pictures[prompt.text] = picture
    return pictures


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors (d,) of unit length, summed in float64."""
    # The vectors have unit length only up to float32 rounding, so the sum may exceed 1.
    return max(-1.0, min(1.0, float(torch.dot(a.double(), b.double()))))


def nearest(image: Tensor, train: Tensor) -> tuple[float, int]:
    """Find the training picture with the largest cosine to an image.

    Args:
        image: embedding of the image, (d,).
        train: embeddings of m training pictures, (m, d).

    Returns:
        The cosine, and the picture's index; a tie goes to the first picture.
    """
    cosines = normalize(train.double(), dim=1) @ normalize(image.double(), dim=0)  # (m,)
    index = int(cosines.argmax())
    return max(-1.0, min(1.0, float(cosines[index]))), index


def training_sets(subjects: Sequence[Subject], dataset: str | None) -> dict[str, ImageSet]:
    """Open the subjects' training images: label -> images.

    A run folder names its training images; a LoRA file does not. If all runs have the same training
    images, the base model is also compared with these. It was not trained on them, so it shows how
    similar images are without memorization.

    Args:
        subjects: the scored subjects.
        dataset: value of ``--train_data``: a folder or set for all subjects, "none" for no
            memorization score, or None for the runs' own images.
    """
    if dataset == NONE:
        return {}
    if dataset is not None:
        images = open_images(dataset)
        return {subject.label: images for subject in subjects}
    opened: dict[str, ImageSet] = {}  # runs with the same options share a set
    sets: dict[str, ImageSet] = {}
    for subject in subjects:
        if subject.folder is None:
            continue
        config = subject.record.get("config", {})
        parts = []
        for concept in config.get("concepts") or [config]:
            parts.append({name: concept.get(name) for name in OF_IMAGES})
        key = repr(parts)
        if key not in opened:
            opened[key] = _open(subject, parts)
        sets[subject.label] = opened[key]
    if len(opened) == 1:
        (shared,) = opened.values()
        for subject in subjects:
            if subject.kind == BASE:
                sets[subject.label] = shared
    return sets


def _open(subject: Subject, parts: Sequence[Mapping[str, str | None]]) -> ImageSet:
    """Open the training images of all concepts of a run, as one set."""
    left_out = f"or --train_data {NONE} to leave memorization out."
    sets = {}
    for concept in parts:
        place = concept["dataset_name"] or concept["instance_data_dir"]
        if not place:
            raise UserError(
                f"{subject.folder} does not record its training images: give --train_data,"
                f" {left_out}"
            )
        try:
            sets[f"{concept['concept']}"] = open_images(
                place,
                image_column=concept["image_column"] or "image",
                config_name=concept["dataset_config_name"],
                skip_bad_images=True,
            )
        except UserError as error:
            raise UserError(
                f"the training images of {subject.label} can't be opened"
                f" ({str(error).rstrip('.')}): give their folder as --train_data, {left_out}"
            ) from error
    if len(sets) == 1:
        return next(iter(sets.values()))
    joined = ImageSet.join(subject.label, sets)
    assert joined is not None  # `join` returns None only if it gets no images
    return joined
