"""DreamBooth fine-tuning of image models (Ruiz et al. 2023; paper, Section 5.4 and H.3)."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from ..adapters import AdapterSpec
from ..core.choices import ATTENTION
from ..core.files import counted
from ..core.seeds import digest, generator
from ..methods import Target
from ..run.content import SampleContent
from ..train.task import Fold, MicroBatch, inference
from . import disk_cache
from .captions import texts
from .config import DreamBoothConfig
from .denoising import Denoising, DreamBoothModule, Schedule
from .families import of
from .families.base import Family
from .families.sdxl import tokenize
from .flow import FlowMatching
from .heldout import GridLoss
from .latents import Encoder, weight_map
from .layers import chosen
from .prompts import PromptCache
from .sampling import generate
from .sets import ImageSet
from .visits import Visit, VisitStream

ALIKE = ("height", "width", "guidance", "steps", "strength")
"""Settings that the validation images of one batch share."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class DreamBooth:
    """Instance images, optional class and validation images, and the models they train."""

    def __init__(
        self,
        cfg: DreamBoothConfig,
        pipeline: Any,
        stream: VisitStream,
        validation: ImageSet | None = None,
    ) -> None:
        self.cfg, self.pipeline, self.stream, self.validation = cfg, pipeline, stream, validation
        self.family: Family = type(of(pipeline))(**cfg.family_settings)
        denoiser = self.family.model(pipeline)
        self.layers = chosen(cfg.lora_layers or [ATTENTION], self.family, denoiser)
        names = self.family.encoders if cfg.train_text_encoder else ()
        trained = [getattr(pipeline, name) for name in names]
        weight = cfg.prior_loss_weight if cfg.with_prior_preservation else None
        schedule = _schedule(cfg, self.family, pipeline)
        self.module = DreamBoothModule(
            self.family, denoiser, trained, schedule, weight, cfg.prior_prediction_weight
        )
        if cfg.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            for encoder in trained:
                encoder.activation_checkpointing_enable()
        if cfg.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        self.prompts: PromptCache | None = None
        self._source: Encoder | None = None  # whose latents these are
        self._searches = False
        self.num_samples, self.has_heldout = stream.num_samples, validation is not None
        self.names = self.sample_names = [entry.name for entry in stream.images.entries]
        self.models: dict[str, nn.Module] = {self.family.denoiser: denoiser}
        self.models |= dict(zip(names, trained, strict=True))

    def data_summary(self) -> str:
        """A summary of the training images, in a few words."""
        classes = self.stream.classes
        prior = f" and {counted(len(classes), 'class image')}" if classes else ""
        sizes = sorted(set(self.stream.sizes))
        square = sizes == [(self.cfg.resolution,) * 2]
        shown = ", ".join(f"{height} x {width}" for height, width in sizes)
        images, each = self.stream.images, [own.concept for own in self.cfg.each]
        counts = Counter(images.of_each(each))
        of = [f"{own.concept} {counts[own.concept]} x {own.repeats}" for own in self.cfg.each]
        of = f" of {counted(len(each), 'concept')} ({', '.join(of)})" if self.cfg.concepts else ""
        count = counted(len(images), "image")
        return f"{count}{of}{prior} at {self.cfg.resolution if square else shown} px"

    def targets(self) -> list[Target]:
        """The denoiser's layers that were asked for, and the attention projections of the text
        encoders where they are trained.
        """
        cfg = self.cfg
        spec = AdapterSpec.of(cfg, target_modules=self.layers)
        rate = cfg.text_encoder_lr
        if cfg.optimizer.lower() == "prodigy" or not rate:
            # Prodigy estimates one step size and takes the learning rate as a common factor.
            rate = cfg.learning_rate
        denoiser, *encoders = self.models.items()
        text, decay = replace(spec, target_modules=TEXT_TARGETS), cfg.adam_weight_decay_text_encoder
        return [
            Target(*denoiser, spec, cfg.learning_rate, cfg.adam_weight_decay),
            *(Target(*encoder, text, rate, decay) for encoder in encoders),
        ]

    def training_content(self) -> list[SampleContent]:
        """Names and hashes of the training images, and of the class images beside them."""
        samples = self.stream.images.sample_contents()
        if self.stream.classes is not None:
            for class_image in self.stream.classes.sample_contents():
                hashes = {"class image": class_image.hashes["picture"]}
                samples.append(SampleContent(f"class/{class_image.name}", hashes))
        return samples

    def heldout_content(self) -> list[SampleContent]:
        """Names and hashes of the held-out images."""
        return [] if self.validation is None else self.validation.sample_contents()

    def with_config(self, cfg: Any, fold: Fold | None = None, is_trial: bool = False) -> DreamBooth:
        """The same models, latents and prompts for a run of another configuration; see `Task`."""
        images, held = self.stream.images, self.validation
        if fold is not None:
            images, held = map(images.only, fold)
        task = DreamBooth(cfg, self.pipeline, VisitStream(cfg, images, self.stream.classes), held)
        task.prompts, task._source, task._searches = self.prompts, self.encoder, is_trial
        task.to_device(self.device)
        return task

    def embed(self, device: torch.device) -> None:
        """Embed all prompts that the run can meet; a flow model's encoders are let go of then."""
        disk = disk_cache.of_prompts(self.cfg, self.family, self.pipeline, device)
        self.prompts = PromptCache(self.pipeline, device, self.family, disk, self.read_encoders)
        # Each on its own: what is measured and drawn must not change how captions are rounded.
        self.prompts.add(self.stream.captions())
        if self.validation is not None and self.family.flow:
            self.prompts.add(texts(self.cfg, self.validation))
        if self.cfg.validation_prompts:
            negatives = (sample["negative_prompt"] for sample in self.cfg.samples)
            self.prompts.add([*self.cfg.validation_prompts, "", *negatives])
        if self.family.flow:
            self.prompts.release()

    def read_encoders(self) -> None:
        """Read the text encoders that were left without weights, if embeddings are missing."""
        for name in self.family.encoders:
            if read := self.pipeline.origin.later.pop(name, None):
                setattr(self.pipeline, name, read())

    def to_device(self, device: torch.device) -> None:
        """Move the models, embed all prompts if need be, and set up the latent cache."""
        self.device = device
        vae = self.pipeline.vae
        space = self.family.space(vae)
        source = self._source
        disk = source.disk if source else disk_cache.of_latents(self.cfg, space, vae, device)
        if not self.cfg.offload:
            vae.to(device)
        cached = source.cached if source else None
        self.encoder = Encoder(vae, space, device, self.stream.caches, disk, cached)
        if self.cfg.train_text_encoder:
            for encoder in self.module.text_encoders:
                encoder.to(device)
        elif self.prompts is None:
            self.embed(device)
        self.module.denoiser.to(device)
        held = self.validation
        train = None if self._searches else self.stream
        self.grid = None if held is None else GridLoss(self, train, held)

    def condition(self, captions: Sequence[str]) -> dict[str, Any]:
        """The text part of a module's inputs for these captions; an empty one is what guidance
        leads away from.
        """
        if self.cfg.train_text_encoder:
            # The encoders change, so zeros take the place of what they give at each step.
            zeros = self.pipeline.config.force_zeros_for_empty_prompt
            told = torch.tensor([bool(caption) or not zeros for caption in captions])
            return {"ids": tokenize(self.pipeline, captions), "told": told}
        assert self.prompts is not None
        return self.prompts.conditions(captions)

    def inputs(
        self,
        latents: Tensor,
        noise: Tensor,
        index: Tensor,
        instance: Tensor,
        images: Sequence[Visit],
        masks: Sequence[Tensor | None],
    ) -> dict[str, Any]:
        """A module's inputs for some images, whose masks are on the grid of their latents."""
        inputs = {
            **{"latents": latents, "noise": noise, "index": index, "instance": instance},
            "time_ids": torch.tensor([image.time_ids for image in images], dtype=torch.float32),
            **self.condition([image.caption for image in images]),
        }
        if any(mask is not None for mask in masks):
            inputs["shown"] = weight_map(masks, latents, self.cfg.unmasked_weight)
        return inputs

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Micro-batches in the schedule's order, with their noise and timesteps."""
        for (step, slots), visits in self.stream.visits(schedule, step_size):
            yield self._micro_batch(step, slots, visits)

    def _micro_batch(
        self, step: int, slots: tuple[int, ...], visits: Sequence[Visit]
    ) -> MicroBatch:
        latents, noise, index, masks, digests = [], [], [], [], []
        for visit, posterior in zip(visits, self.encoder(visits), strict=True):
            random = generator(self.cfg.seed, "noise", step, visit.sample, visit.slot, visit.kind)
            draw = self.encoder.space.encode(posterior.sample(random)[None])[0]
            noise.append(torch.randn(draw.shape, generator=random))
            index.append(self.module.denoising.draw(random))
            latents.append(draw)
            masks.append(posterior.mask)
            digests.append(visit.digest(digest(noise[-1], index[-1])))
        parts = (torch.stack(rows) for rows in (latents, noise, index))
        instance = torch.tensor([v.kind == "instance" for v in visits])
        inputs = self.inputs(*parts, instance=instance, images=visits, masks=masks)
        if self.cfg.prior_prediction_weight:
            inputs["prior"] = self.condition([str(visit.cfg.class_prompt) for visit in visits])
        joined = tuple("".join(digests[s :: len(slots)]) for s in range(len(slots)))
        names = tuple(v.name for v in visits[: len(slots)])
        levels = self.module.denoising.level(inputs["index"]).tolist()
        samples = tuple(v.sample if v.kind == "instance" else None for v in visits)
        snr = self.module.denoising.snr(inputs["index"])
        ratios = () if snr is None else tuple(snr.tolist())
        return MicroBatch(slots, names, joined, inputs, tuple(map(float, levels)), samples, ratios)

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Loss on held-out and on training images over the fixed grid; {} without a set."""
        if self.grid is None:
            return {}
        with evaluating:
            return self.grid()

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Images of each validation prompt, as PNG under ``validation/step-N``; {} is measured."""
        samples, images = self.cfg.samples, []
        if not samples:
            return {}
        with evaluating, inference(self.module):
            for _, alike in itertools.groupby(samples, lambda s: [s[name] for name in ALIKE]):
                images += self._draw(list(alike))
        target = folder / "validation" / f"step-{step}"
        target.mkdir(parents=True, exist_ok=True)
        files = [target / f"{number:03d}.png" for number in range(len(images))]
        for image, file, sample in zip(images, files, samples, strict=True):
            info = PngInfo()
            if self.cfg.validation_settings:
                info.add_itxt("settings", json.dumps(sample, ensure_ascii=False))
            image.save(file, pnginfo=info)
        return {}

    def _draw(self, samples: Sequence[Mapping[str, Any]]) -> list[Image]:
        """Images of samples that share what is `ALIKE`."""
        prompts, negatives = ([s[name] for s in samples] for name in ("prompt", "negative_prompt"))
        first, known = samples[0], self.prompts
        factor, models = first["strength"], nn.ModuleList(self.models.values())
        with nullcontext() if factor == 1 else rescale_adapter_scale(models, factor):
            return generate(
                self.pipeline,
                prompts,
                [sample["seed"] for sample in samples],
                size=(first["height"], first["width"]),
                negatives=negatives,
                steps=first["steps"],
                guidance_scale=first["guidance"],
                embeddings=known and (known(prompts), known.conditions(negatives)),
                batch=self.cfg.sample_batch_size,
            )


def _schedule(cfg: DreamBoothConfig, family: Family, pipeline: Any) -> Schedule:
    """The noise levels of the pipeline's scheduler, drawn and weighed as the run says."""
    config = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    if not family.flow:
        return Denoising.from_config(
            config,
            edm=cfg.do_edm_style_training,
            snr_gamma=cfg.snr_gamma,
            snr_weighting=cfg.snr_weighting,
        )
    shifts = cfg.timestep_shift == "pipeline"
    return FlowMatching.from_config(
        config,
        family.mu(pipeline, family.tokens(cfg.resolution, cfg.resolution)) if shifts else None,
        scheme=cfg.weighting_scheme or family.weighting,
        logit_mean=cfg.logit_mean,
        logit_std=cfg.logit_std,
        mode_scale=cfg.mode_scale,
        preconditioned=cfg.precondition_outputs,
    )
