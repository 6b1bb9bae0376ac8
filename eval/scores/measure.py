"""All scores of images on disk. The same files give the same scores, in any order and batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bilora_diffusion import mini
from bilora_diffusion.errors import UserError
from bilora_diffusion.image.decode import DECODE_ERRORS, read_rgb
from bilora_diffusion.image.sources import ImageSet

from .captioners import Captioner
from .nearest import nearest, pairwise_diversity
from .plan import Plan
from .prompts import Prompt
from .schema import ImageScore, PromptEntry
from .scorers import Scorer
from .store import Job

CHUNK = 64
"""Images that are held in memory at once."""


class Images(Protocol):
    """Where images come from: the store."""

    def open(self, job: Job) -> Image.Image:
        """The image of a job."""
        ...


@dataclass(frozen=True)
class Measured:
    """What :func:`measure` finds, in the terms of ``scores.json``."""

    prompts: list[PromptEntry]
    images: list[ImageScore]
    diversity: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Seen:
    """An image as the models see it: embedding (d,), and caption where one was asked for."""

    vector: Tensor
    caption: str | None = None


def measure(
    plan: Plan,
    store: Images,
    scorer: Scorer,
    captioner: Captioner | None,
    *,
    folder: str = "images",
    progress: bool = True,
) -> Measured:
    """Score every image of the plan.

    Args:
        plan: what there is.
        store: holds all its images.
        scorer: embeds images and texts, the captions included.
        captioner: None for no T2T.
        folder: of the store, as the result is to name it.
        progress: show bars.

    Raises:
        UserError: a training picture or a reference can't be read.
    """
    jobs, references = plan.jobs(), plan.references()
    scored = [job for job in jobs.values() if not job.prompt.general]
    general = [job for job in jobs.values() if job.prompt.general]
    seen = look(scored, store, scorer, captioner, progress)
    seen |= look([*general, *references.values()], store, scorer, None, progress)
    judge = _Judge.of(plan, seen.values(), scorer)
    rows = []
    for (adapter, prompt, seed), job in jobs.items():
        image = seen[job.file.as_posix()]
        if job.prompt.general:
            original = seen[references[prompt, seed].file.as_posix()]
            scores = judge.drift(adapter, image, original)
        else:
            scores = judge.scores(adapter, prompt, image)
        file = f"{folder}/{job.file.as_posix()}"
        rows.append(ImageScore(adapter=adapter, prompt=prompt, seed=seed, file=file, **scores))
    entries = [judge.entry(prompt) for prompt in range(len(plan.prompts))]
    return Measured(entries, rows, _diversity(plan, seen))


def look(
    jobs: Iterable[Job],
    store: Images,
    scorer: Scorer,
    captioner: Captioner | None,
    progress: bool = True,
) -> dict[str, Seen]:
    """Embed and caption images, equal ones once: equal images get equal scores to the last bit.

    Returns:
        By the job's file.
    """
    by_file = {job.file.as_posix(): job for job in jobs}
    by_content: dict[bytes, Seen] = {}
    found: dict[str, Seen] = {}
    what = "embedding" if captioner is None else "embedding and captioning"
    with tqdm(total=len(by_file), desc=what, unit="image", disable=not progress) as bar:
        for files in _chunks(list(by_file)):
            opened = {file: store.open(by_file[file]).convert("RGB") for file in files}
            contents = {file: _digest(image) for file, image in opened.items()}
            new = {
                content: opened[file]
                for file, content in contents.items()
                if content not in by_content
            }
            by_content |= _looked_at(new, scorer, captioner)
            found |= {file: by_content[content] for file, content in contents.items()}
            bar.update(len(files))
    return found


def _looked_at(
    images: dict[bytes, Image.Image], scorer: Scorer, captioner: Captioner | None
) -> dict[bytes, Seen]:
    if not images:
        return {}
    pictures = list(images.values())
    captions: Sequence[str | None] = captioner(pictures) if captioner else [None] * len(pictures)
    vectors = scorer.images(pictures)
    return {
        content: Seen(vector, caption)
        for content, vector, caption in zip(images, vectors, captions, strict=True)
    }


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class _Judge:
    """What images are held against.

    Args:
        texts: embeddings of prompts and captions.
        truths: prompt's position -> embedding of its held-out picture.
        training: adapter's position -> names and embeddings (n, d) of its training pictures.
    """

    plan: Plan
    scorer: Scorer
    texts: dict[str, Tensor]
    truths: dict[int, Tensor]
    training: dict[int, tuple[list[str], Tensor]]

    @classmethod
    def of(cls, plan: Plan, seen: Iterable[Seen], scorer: Scorer) -> _Judge:
        texts = {prompt.text for prompt in plan.prompts if not prompt.general}
        texts |= {image.caption for image in seen if image.caption is not None}
        ordered = sorted(texts)
        embeddings = scorer.texts(ordered) if ordered else torch.empty(0, 0)
        truths = truth_pictures(plan)
        vectors = scorer.images(list(truths.values())) if truths else torch.empty(0, 0)
        sets = {id(images): images for images in plan.training.values()}
        embedded = {number: _embedded(images, scorer) for number, images in sets.items()}
        return cls(
            plan,
            scorer,
            dict(zip(ordered, embeddings, strict=True)),
            dict(zip(truths, vectors, strict=True)),
            {adapter: embedded[id(images)] for adapter, images in plan.training.items()},
        )

    def scores(self, adapter: int, prompt: int, image: Seen) -> dict[str, Any]:
        """I2T, T2T, ground truth and memorization of one image."""
        text = self.texts[self.plan.prompts[prompt].text]
        scores: dict[str, Any] = {"i2t": cosine(image.vector, text), "caption": image.caption}
        if image.caption is not None:
            scores["t2t"] = cosine(text, self.texts[image.caption])
        if prompt in self.truths:
            scores["truth"] = cosine(image.vector, self.truths[prompt])
        if adapter in self.training:
            names, vectors = self.training[adapter]
            likeness, index = nearest(image.vector[None], vectors)
            scores["nearest"] = float(likeness[0])
            scores["nearest_image"] = names[int(index[0])]
        return scores

    def drift(self, adapter: int, image: Seen, original: Seen) -> dict[str, Any]:
        """How like the base model's image it is; nothing for the base model itself."""
        if self.plan.adapters[adapter].kind == "base":
            return {}
        return {"drift": cosine(image.vector, original.vector)}

    def entry(self, position: int) -> PromptEntry:
        """A prompt as the result lists it."""
        prompt = self.plan.prompts[position]
        held = position in self.truths and prompt.reference is not None
        return PromptEntry(
            text=prompt.text,
            instance=prompt.instance,
            reference=prompt.reference.name if held and prompt.reference else None,
            general=prompt.general,
            truncated=self.scorer.is_cut(prompt.text),
        )


def truth_pictures(plan: Plan) -> dict[int, Image.Image]:
    """The held-out picture of each scored prompt that has one, by the prompt's position.

    The miniature's own icons are no ground truth for another model.

    Raises:
        UserError: a picture can't be read.
    """
    return {
        position: _reference(prompt)
        for position, prompt in enumerate(plan.prompts)
        if prompt.reference is not None
        and not prompt.general
        and (plan.on_miniature or mini.heldout_dir() not in prompt.reference.resolve().parents)
    }


def _reference(prompt: Prompt) -> Image.Image:
    assert prompt.reference is not None
    try:
        return read_rgb(prompt.reference)
    except DECODE_ERRORS as error:
        raise UserError(
            f'the reference {prompt.reference} of "{prompt.text}" can\'t be read: correct the file'
            " of prompts."
        ) from error


def _embedded(images: ImageSet, scorer: Scorer) -> tuple[list[str], Tensor]:
    parts = [
        scorer.images([images.image(i) for i in chunk]) for chunk in _chunks(range(len(images)))
    ]
    return [images.name(i) for i in range(len(images))], torch.cat(parts)


def _diversity(plan: Plan, seen: dict[str, Seen]) -> dict[str, dict[str, float]]:
    """How different one prompt's images from several seeds are, by label and text."""
    vectors: dict[tuple[int, int], list[Tensor]] = {}
    for (adapter, prompt, _), job in plan.jobs().items():
        if not job.prompt.general:
            vectors.setdefault((adapter, prompt), []).append(seen[job.file.as_posix()].vector)
    found: dict[str, dict[str, float]] = {}
    for (adapter, prompt), images in vectors.items():
        if len(images) > 1:
            label, text = plan.adapters[adapter].label, plan.prompts[prompt].text
            found.setdefault(label, {})[text] = pairwise_diversity(torch.stack(images))
    return found


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors (d,) of unit length, summed in float64."""
    return max(-1.0, min(1.0, float(torch.dot(a.double(), b.double()))))


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
