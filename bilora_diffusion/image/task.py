"""DreamBooth fine-tuning of image models (Ruiz et al. 2023; paper, Section 5.4 and H.3)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from PIL.Image import Image
from torch import Tensor, nn

from ..adapters import AdapterSpec
from ..config.derived import text_encoder_rate
from ..core.files import counted
from ..core.seeds import digest, generator
from ..core.values import ATTENTION
from ..methods import Target
from ..run.data import SampleContent
from ..run.record import validation_folder
from ..train.task import Fold, MicroBatch, inference
from . import disk_cache
from .captions import PromptCache, class_texts, fixed_texts
from .config import DreamBoothConfig
from .families import family_of
from .families.base import Family
from .families.sdxl import tokenize
from .latents import Encoder, weight_map
from .likeness import SampledDistance
from .loss import PRIOR, UNCONDITIONAL, DreamBoothModule, GridLoss
from .noise_schedules import noise_schedule
from .pipeline import select_layers
from .sampling import generate
from .sets import ImageSet
from .stream import INSTANCE, TrainingSample, TrainingStream
from .validation import ValidationSample, write_images

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class DreamBooth:
    """Instance images, optional class and validation images, and the models they train."""

    def __init__(
        self,
        cfg: DreamBoothConfig,
        pipeline: Any,
        stream: TrainingStream,
        validation: ImageSet | None = None,
    ) -> None:
        self.cfg, self.pipeline, self.stream, self.validation = cfg, pipeline, stream, validation
        self.family: Family = type(family_of(pipeline))(**cfg.family_settings)
        denoiser = self.family.model(pipeline)
        self.layers = select_layers(cfg.lora_layers or [ATTENTION], self.family, denoiser)
        names = self.family.encoders if cfg.train_text_encoder else ()
        encoders = [getattr(pipeline, name) for name in names]
        self.module = DreamBoothModule(
            self.family,
            denoiser,
            encoders,
            noise_schedule(cfg, self.family, pipeline),
            cfg.prior_loss_weight if cfg.with_prior_preservation else None,
            cfg.prior_prediction_weight,
            cfg.hold_unconditional,
        )
        if cfg.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            for encoder in encoders:
                encoder.activation_checkpointing_enable()
        if cfg.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        self.prompts: PromptCache | None = None
        self._source: Encoder | None = None  # of the run before, whose latents are used again
        self._searches = False
        self.num_samples, self.has_heldout = stream.num_samples, validation is not None
        # Folds are dealt by name, and each sample is one image.
        self.names = self.sample_names = [entry.name for entry in stream.images.entries]
        self.models: dict[str, nn.Module] = {self.family.denoiser: denoiser}
        self.models |= dict(zip(names, encoders, strict=True))

    def data_summary(self) -> str:
        """A summary of the training images, in a few words."""
        summary = counted(len(self.stream.images), "image")
        if self.cfg.concepts:
            concepts = self.cfg.concept_configs
            names = [concept.concept for concept in concepts]
            counts = Counter(self.stream.images.of_each(names))
            parts = [f"{c.concept} {counts[c.concept]} x {c.repeats}" for c in concepts]
            summary += f" of {counted(len(concepts), 'concept')} ({', '.join(parts)})"
        if self.stream.classes:
            summary += f" and {counted(len(self.stream.classes), 'class image')}"
        sizes = sorted(set(self.stream.sizes))
        if sizes == [(self.cfg.resolution, self.cfg.resolution)]:
            return f"{summary} at {self.cfg.resolution} px"
        return f"{summary} at {', '.join(f'{height} x {width}' for height, width in sizes)} px"

    def targets(self) -> list[Target]:
        """The denoiser's layers that were asked for, and the attention projections of the text
        encoders where they are trained.
        """
        cfg = self.cfg
        spec = AdapterSpec.from_options(cfg, target_modules=self.layers)
        (name, denoiser), *encoders = self.models.items()
        targets = [Target(name, denoiser, spec, cfg.learning_rate, cfg.adam_weight_decay)]
        encoder_spec = replace(spec, target_modules=TEXT_TARGETS)
        for name, encoder in encoders:
            weight_decay = cfg.adam_weight_decay_text_encoder
            rate = text_encoder_rate(cfg)
            targets.append(Target(name, encoder, encoder_spec, rate, weight_decay))
        return targets

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

    def with_config(
        self, cfg: DreamBoothConfig, fold: Fold | None = None, is_trial: bool = False
    ) -> DreamBooth:
        """The same models, latents and prompts for a run of another configuration; see `Task`."""
        images, validation = self.stream.images, self.validation
        if fold is not None:
            images, validation = images.only(fold[0]), images.only(fold[1])
        stream = TrainingStream(cfg, images, self.stream.classes)
        task = DreamBooth(cfg, self.pipeline, stream, validation)
        task.prompts, task._source, task._searches = self.prompts, self.encoder, is_trial
        task.to_device(self.device)
        return task

    def embed(self, device: torch.device) -> None:
        """Embed all prompts that the run can meet; a flow model's encoders are dropped then."""
        disk = disk_cache.of_prompts(self.cfg, self.family, self.pipeline, device)
        self.prompts = PromptCache(self.pipeline, device, self.family, disk, self.read_encoders)
        # Three calls: what is measured and sampled must not change how captions are rounded.
        self.prompts.add(self.stream.captions())
        if self.validation is not None and self.family.flow:
            self.prompts.add(fixed_texts(self.cfg, self.validation))
        if self.cfg.chooses_by_samples:
            self.prompts.add([""])
        if self.cfg.validation_prompts:
            negatives = [sample.negative_prompt for sample in self.cfg.samples]
            self.prompts.add([*self.cfg.validation_prompts, "", *negatives])
        if self.family.flow:  # whose encoders are as large as the denoiser
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
        space = self.family.latent_space(vae)
        if not self.cfg.offload:
            vae.to(device)
        if self._source is None:
            disk, cache = disk_cache.of_latents(self.cfg, space, vae, device), None
        else:
            disk, cache = self._source.disk, self._source.cache
        self.encoder = Encoder(vae, space, device, self.stream.is_cached, disk, cache)
        if self.cfg.train_text_encoder:
            for encoder in self.module.text_encoders:
                encoder.to(device)
        elif self.prompts is None:
            self.embed(device)
        self.module.denoiser.to(device)
        self.grid: GridLoss | None = None
        self.sampled: SampledDistance | None = None
        if self.validation is not None:
            # A search measures the held-out images alone, each by itself.
            self.grid = GridLoss(self, None if self._searches else self.stream, self.validation)
            if self.cfg.chooses_by_samples:
                self.sampled = SampledDistance(self, self.validation, self._searches)

    def condition(self, captions: Sequence[str]) -> dict[str, Any]:
        """The text part of a module's inputs for these captions; an empty one is what guidance
        leads away from.
        """
        if self.cfg.train_text_encoder:
            # The encoders change, so zeros take the place of what they give at each step.
            zeros = self.pipeline.config.force_zeros_for_empty_prompt
            has_text = torch.tensor([bool(caption) or not zeros for caption in captions])
            return {"ids": tokenize(self.pipeline, captions), "has_text": has_text}
        assert self.prompts is not None
        return self.prompts.conditions(captions)

    def inputs(
        self,
        latents: Tensor,
        noise: Tensor,
        index: Tensor,
        instance: Tensor,
        samples: Sequence[TrainingSample],
        masks: Sequence[Tensor | None],
    ) -> dict[str, Any]:
        """A module's inputs for some images, whose masks are on the grid of their latents."""
        time_ids = [sample.time_ids for sample in samples]  # (n, 6)
        inputs = {
            "latents": latents,
            "noise": noise,
            "index": index,
            "instance": instance,
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),
            **self.condition([sample.caption for sample in samples]),
        }
        if any(mask is not None for mask in masks):
            # (n, 1, h, w); without a mask the loss is a plain mean
            inputs["mask_weights"] = weight_map(masks, latents, self.cfg.unmasked_weight)
        return inputs

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Micro-batches in the schedule's order, with their noise and timesteps."""
        for (step, slots), samples in self.stream.batches(schedule, step_size):
            yield self._micro_batch(step, slots, samples)

    def _micro_batch(
        self, step: int, slots: tuple[int, ...], samples: Sequence[TrainingSample]
    ) -> MicroBatch:
        """The micro-batch of samples: one of an instance image for each slot, then the class's."""
        latents, noise, index, masks, digests = [], [], [], [], []  # of each sample
        for sample, posterior in zip(samples, self.encoder(samples), strict=True):
            # Seeded by the sample, so that the result does not depend on how a batch is cut.
            random = generator(self.cfg.seed, "noise", step, sample.index, sample.slot, sample.kind)
            latent = self.encoder.space.encode(posterior.sample(random)[None])[0]
            latents.append(latent)
            sample_noise = torch.randn(latent.shape, generator=random)  # (c, h, w)
            index.append(self.module.denoising.draw(random))
            if self.cfg.noise_offset:
                # The last number, so that noise and timestep are those of a run without it.
                offset = torch.randn(len(latent), 1, 1, generator=random)
                sample_noise += self.cfg.noise_offset * offset
            noise.append(sample_noise)
            masks.append(posterior.mask)
            digests.append(sample.digest(digest(noise[-1], index[-1])))
        is_instance = [sample.kind == INSTANCE for sample in samples]
        inputs = self.inputs(
            torch.stack(latents),
            torch.stack(noise),
            torch.stack(index),
            torch.tensor(is_instance),
            samples,
            masks,
        )
        if self.cfg.prior_prediction_weight:
            inputs[PRIOR] = self.condition([class_texts(sample.cfg)[0] for sample in samples])
        # By the number that the log gives to the step, so a resumed run holds in the same ones.
        if self.cfg.hold_unconditional and (step + 1) % self.cfg.hold_unconditional_every == 0:
            inputs[UNCONDITIONAL] = self.condition([""] * len(samples))
        denoising = self.module.denoising
        ratios = denoising.snr(inputs["index"])
        # Digests of a slot: of its instance image, then of its class image.
        count = len(slots)
        return MicroBatch(
            slots=slots,
            names=tuple(sample.name for sample in samples[:count]),
            digests=tuple("".join(digests[slot::count]) for slot in range(count)),
            inputs=inputs,
            levels=tuple(map(float, denoising.level(inputs["index"]).tolist())),
            samples=tuple(sample.index if sample.kind == INSTANCE else None for sample in samples),
            snr=() if ratios is None else tuple(ratios.tolist()),
        )

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Loss on held-out and on training images over the fixed grid, and the distance of samples
        where the run goes by it; {} without a set.
        """
        if self.grid is None:
            return {}
        with evaluating:
            values = self.grid()
            if self.sampled is not None:
                with inference(self.module):
                    values |= self.sampled()
        return values

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Sample the validation images into ``validation/step-N``; nothing is measured, {}."""
        samples = self.cfg.samples
        if not samples:
            return {}
        images: list[Image] = []
        with evaluating, inference(self.module):
            for _, batch in itertools.groupby(samples, lambda sample: sample.batch_settings):
                images += self.sample_images(list(batch))
        with_settings = bool(self.cfg.validation_settings)
        write_images(validation_folder(folder, step), samples, images, with_settings)
        return {}

    def sample_images(self, samples: Sequence[ValidationSample]) -> list[Image]:
        """Images of samples with the same `ValidationSample.batch_settings`."""
        prompts = [sample.prompt for sample in samples]
        negatives = [sample.negative_prompt for sample in samples]
        embeddings = None  # while the text encoders are trained, they embed anew
        if self.prompts is not None:
            embeddings = self.prompts(prompts), self.prompts.conditions(negatives)
        shared = samples[0]
        scaling: AbstractContextManager[Any] = nullcontext()
        if shared.strength != 1:
            scaling = rescale_adapter_scale(nn.ModuleList(self.models.values()), shared.strength)
        with scaling:
            return generate(
                self.pipeline,
                prompts,
                [sample.seed for sample in samples],
                size=(shared.height, shared.width),
                negatives=negatives,
                steps=shared.steps,
                guidance_scale=shared.guidance,
                guidance_from=shared.guidance_from,
                embeddings=embeddings,
                batch=self.cfg.sample_batch_size,
            )
