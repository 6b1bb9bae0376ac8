"""Scores of images on the disk. The same files get the same scores in any order and batch."""

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

# Images in memory at a time
CHUNK = 64
NONE = "none"
# Options of a run, or of one of its concepts, that say which images it has
OF_IMAGES = ("concept", "dataset_name", "instance_data_dir", "dataset_config_name", "image_column")


class EmbeddedImage(NamedTuple):
    """The embeddings of an image, and its caption; None where they are not needed."""

    vector: Tensor  # by the scorer, (d,)
    caption: str | None = None
    caption_vector: Tensor | None = None  # by the scorer, (d,)
    dino_vector: Tensor | None = None  # by the image model, (e,)


class EmbeddedSet(NamedTuple):
    """Names of a set's images, and their embeddings, (n, d)."""

    names: list[str]
    vectors: Tensor


class Pictures:
    """Held-out pictures and training sets, embedded by one model.

    Args:
        truths: picture by the text of its prompt.
        training: set by the label of the run that learned it.
    """

    def __init__(
        self, embedder: ImageEmbedder, truths: Mapping[str, Image], training: Mapping[str, ImageSet]
    ) -> None:
        self.truths: dict[str, Tensor] = {}
        if truths:
            vectors = embedder.images(list(truths.values()))
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

    With an image model, such as DINOv2, images and pictures are compared by its embeddings too.

    Args:
        truths: held-out picture by the text of its prompt.
        training: training set by the label of the run.
        originals: the base model's images of the general prompts, from which drift is measured.
        image_model: None for no scores by DINOv2.
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
        """The scores of each image, and a row "image" that names its file."""
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
            if subject.kind != BASE:  # which has no drift from itself
                original = self._originals[job.prompt.text, job.seed]
                yield self._row(subject, job, "drift", cosine(image.vector, original))

    def truth_i2t(self) -> float | None:
        """Mean score "i2t" of the held-out pictures with their own prompts; None without pictures.

        A sample that is its held-out picture has this score, so that higher ones are not better.
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
        """All scores of an image; ``prompt`` is its prompt's embedding, (d,)."""
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
        """Cosines with the held-out picture and the nearest training picture, by one model."""
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
        """Each job with its embedded image.

        Equal images are embedded once, so their scores are equal to the last bit. Images of general
        prompts are not scored: they need neither captions nor the image model.
        """
        is_captioned = is_scored and self._captioner is not None
        title = "embedding and captioning" if is_captioned else "embedding"
        with tqdm(total=len(jobs), desc=title, unit="image", disable=not jobs) as bar:
            for chunk in in_batches(jobs, CHUNK):
                keys = []
                new: dict[tuple[bytes, bool], Image] = {}
                for job in chunk:
                    picture = self._store.open(job)
                    # The size too: pictures of 2 x 8 and 4 x 4 can have the same bytes.
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
        """Embed pictures; if they are scored, with their captions and by the image model too."""
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
    """Embed all images of a set, `CHUNK` of them in memory at a time."""
    vectors = []
    for numbers in in_batches(range(len(images)), CHUNK):
        pictures = [images.image(number) for number in numbers]
        vectors.append(embedder.images(pictures))
    names = images.names()
    # Icons in other colors have the file names of the plain icons.
    if mini.color_map(images.label) is not None:
        names = [f"{images.label}/{name}" for name in names]
    return EmbeddedSet(names, torch.cat(vectors))


def truth_pictures(prompts: Sequence[Prompt], base: str) -> dict[str, Image]:
    """The held-out picture of each scored prompt that has one, by the prompt's text.

    The miniature's own icons are not ground truth for another model.
    """
    pictures = {}
    for prompt in prompts:
        file = prompt.reference
        if file is None or prompt.general:
            continue
        if base not in mini.PIPELINES and mini.heldout_dir() in file.resolve().parents:
            continue
        sentence = f'the reference {file} of "{prompt.text}" can\'t be read'
        with as_user_error(sentence, "correct the file of prompts"):
            picture = read_rgb(file)
        if prompt.colors is not None:
            picture = MAPS[prompt.colors](picture)
        pictures[prompt.text] = picture
    return pictures


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors (d,) of unit length, summed in float64."""
    # Of unit length in float32 only, so that the sum may be beyond 1.
    return max(-1.0, min(1.0, float(torch.dot(a.double(), b.double()))))


def nearest(image: Tensor, train: Tensor) -> tuple[float, int]:
    """The largest cosine of an image, (d,), with training pictures, (m, d), and its position.

    Of several equal cosines it is the first one's position.
    """
    cosines = normalize(train.double(), dim=1) @ normalize(image.double(), dim=0)  # (m,)
    index = int(cosines.argmax())
    return max(-1.0, min(1.0, float(cosines[index]))), index


def training_sets(subjects: Sequence[Subject], dataset: str | None) -> dict[str, ImageSet]:
    """The training images by the subjects' labels.

    A run folder names its training images; a LoRA file does not. The base model is compared with
    the images of the runs, if these are the same for all runs. It has not been trained on them, so
    it shows the likeness without memorization.

    Args:
        dataset: ``--train_data``: a folder or set for all subjects, or "none" for no memorization.
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
    """The images of all concepts of a run, as one set."""
    left_out = f"or --train_data {NONE} to leave memorization out."
    sets = {}
    for concept in parts:
        place = concept["dataset_name"] or concept["instance_data_dir"]
        if not place:
            raise UserError(
                f"{subject.folder} does not say what it was trained on: give --train_data,"
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
    assert joined is not None  # there are several
    return joined
