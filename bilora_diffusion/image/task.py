"""DreamBooth fine-tuning of image models (Ruiz et al. 2023; paper, Sections 5.4 and H.3)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from .. import adapters
from ..adapters import ASSISTANT, SAMPLING, AdapterSpec
from ..config.derived import text_encoder_rate
from ..core.seeds import digest, generator
from ..core.values import ATTENTION
from ..methods import Target
from ..run.data import SampleContent
from ..run.record import validation_folder
from ..train.task import MicroBatch, inference
from . import disk_cache
from .captions import PromptCache, fixed_texts
from .config import DreamBoothConfig
from .families import family_of
from .families.base import Family
from .families.sdxl import tokenize
from .first_values import read_start
from .frozen_loras import read_frozen_of_run
from .latents import Encoder, weight_map
from .likeness import SampledDistance
from .loss import GUIDANCE_SHARE, HELD_WEIGHTS, PRIOR, UNCONDITIONAL, DreamBoothModule, GridLoss
from .noise_schedules import noise_schedule
from .pipeline import select_layers
from .sampling import SMALLER_IMAGES, generate
from .sets import ImageSet
from .stream import INSTANCE, TrainingSample, TrainingStream
from .validation import ValidationSample, write_images
from .validation_model import ValidationModel

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # attention in CLIP's text encoders


class DreamBooth:
    """The task of an image run: images, trained models and the inputs of a step.

    It implements `train.task.Task`.

    Args:
        pipeline: a loaded pipeline with its `Origin`.
        stream: the instance images, and the class images if there are any.
        validation: the held-out images.
        validation_model: another model that generates the validation images.
    """

    def __init__(
        self,
        cfg: DreamBoothConfig,
        pipeline: Any,
        stream: TrainingStream,
        validation: ImageSet | None = None,
        validation_model: ValidationModel | None = None,
    ) -> None:
        self.cfg = cfg
        self.pipeline = pipeline
        self.stream = stream
        self.validation = validation
        self.validation_model = validation_model
        # The pipeline that generates validation images.
        self.sampled_pipeline = validation_model.pipeline if validation_model else pipeline
        self.num_samples = stream.num_samples
        self.has_heldout = validation is not None

        self.family: Family = type(family_of(pipeline))(**cfg.family_settings)
        denoiser = self.family.model(pipeline)
        self.layers = select_layers(cfg.lora_layers or [ATTENTION], self.family, denoiser)
        self.models: dict[str, nn.Module] = {self.family.denoiser: denoiser}
        encoders: list[Any] = []  # the trained text encoders
        if cfg.train_text_encoder:
            for name in self.family.encoders:
                encoder = getattr(pipeline, name)
                encoders.append(encoder)
                self.models[name] = encoder
        self.adapted_models = nn.ModuleList(self.models.values())
        self.frozen = read_frozen_of_run(cfg, pipeline, self.models)
        self.start: dict[str, dict[str, Tensor]] = {}  # initial values of primaries, from a file
        source = cfg.lora_sources.get("init_from")
        if source is not None:
            self.start = read_start(source, pipeline, self.targets(), cfg.base_model)
        self.module = DreamBoothModule(
            self.family,
            denoiser,
            encoders,
            noise_schedule(cfg, self.family, pipeline),
            cfg.prior_loss_weight if cfg.with_prior_preservation else None,
        )
        if cfg.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            for encoder in encoders:
                encoder.activation_checkpointing_enable()
        if cfg.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()

        self.prompts: PromptCache | None = None  # None if the text encoders are trained
        self._source: Encoder | None = None  # encoder of an earlier run, to reuse its latents

    def data_summary(self) -> str:
        """Describe the numbers and sizes of the training images in a few words."""
        return self.stream.summary()

    def targets(self) -> list[Target]:
        """Return a target for each trained model: the denoiser and any trained text encoders."""
        cfg = self.cfg
        spec = AdapterSpec.from_options(cfg, target_modules=self.layers)
        encoder_spec = replace(spec, target_modules=TEXT_TARGETS)
        targets = []
        for name, model in self.models.items():
            if name == self.family.denoiser:
                model_spec, rate, weight_decay = spec, cfg.learning_rate, cfg.adam_weight_decay
            else:
                model_spec, rate = encoder_spec, text_encoder_rate(cfg)
                weight_decay = cfg.adam_weight_decay_text_encoder
            frozen, start = self.frozen[name], self.start.get(name)
            target = Target(name, model, model_spec, rate, weight_decay, frozen, start)
            targets.append(target)
        return targets

    def training_content(self) -> list[SampleContent]:
        """Return names and hashes of the training images and the class images."""
        samples = self.stream.images.sample_contents()
        if self.stream.classes is not None:
            for class_image in self.stream.classes.sample_contents():
                hashes = {"class image": class_image.hashes["picture"]}
                samples.append(SampleContent(f"class/{class_image.name}", hashes))
        return samples

    def heldout_content(self) -> list[SampleContent]:
        """Return names and hashes of the held-out images."""
        if self.validation is None:
            return []
        return self.validation.sample_contents()

    def with_config(self, cfg: DreamBoothConfig) -> DreamBooth:
        """Return a task with the same models, latents and prompts for another configuration."""
        stream = TrainingStream(cfg, self.stream.images, self.stream.classes)
        task = DreamBooth(cfg, self.pipeline, stream, self.validation, self.validation_model)
        task.prompts = self.prompts
        task._source = self.encoder
        task.to_device(self.device)
        return task

    def embed(self, device: torch.device) -> None:
        """Embed captions; for a flow model, embed all prompts, and then delete its encoders."""
        disk = disk_cache.prompt_cache(self.cfg, self.family, self.pipeline, device)
        self.prompts = PromptCache(self.pipeline, device, self.family, disk, self.read_encoders)
        self.prompts.add(self.stream.captions())
        if self.family.flow and self.validation is not None:
            self.prompts.add(fixed_texts(self.cfg, self.validation))
        if self.cfg.chooses_by_samples:
            self.prompts.add([""])
        if self.cfg.validation_prompts:
            # The negative prompt of an image is "" if none is given.
            negatives = [sample.negative_prompt for sample in self.cfg.samples]
            self.prompts.add([*self.cfg.validation_prompts, "", *negatives])
        if self.family.flow:
            self.prompts.release()

    def read_encoders(self) -> None:
        """Load the weights of deferred text encoders, which is needed if a prompt is not cached."""
        for name in self.family.encoders:
            read = self.pipeline.origin.loaders.pop(name, None)
            if read is not None:
                setattr(self.pipeline, name, read())

    def to_device(self, device: torch.device) -> None:
        """Move the models to a device, embed prompts, and set up the encoder and measurements."""
        self.device = device
        vae = self.pipeline.vae
        space = self.family.latent_space(vae)
        if not self.cfg.offload:
            vae.to(device)
        if self._source is None:
            disk = disk_cache.latent_cache(self.cfg, space, vae, device)
            cache = None
        else:
            disk = self._source.disk
            cache = self._source.cache
        self.encoder = Encoder(vae, space, device, self.stream.is_cached, disk, cache)
        if self.cfg.train_text_encoder:
            for encoder in self.module.text_encoders:
                encoder.to(device)
        elif self.prompts is None:
            self.embed(device)
        # Moved after the text encoders have finished: the device may be too small for both.
        self.module.denoiser.to(device)
        self.grid: GridLoss | None = None
        self.sampled: SampledDistance | None = None
        if self.validation is not None:
            self.grid = GridLoss(self, self.stream, self.validation)
            if self.cfg.chooses_by_samples:
                self.sampled = SampledDistance(self, self.validation)

    def condition(self, captions: Sequence[str]) -> dict[str, Any]:
        """Return the module's inputs for captions. "" gives the default negative prompt."""
        if self.cfg.train_text_encoder:
            # If the pipeline replaces the embedding of "" by zeros, as SDXL base does, so does the
            # module.
            zeros = self.pipeline.config.force_zeros_for_empty_prompt
            has_text = torch.tensor([bool(caption) or not zeros for caption in captions])
            return {"ids": tokenize(self.pipeline, captions), "has_text": has_text}
        assert self.prompts is not None
        return self.prompts.embed_captions(captions)

    def inputs(
        self,
        latents: Tensor,
        noise: Tensor,
        level_index: Tensor,
        is_instance: Tensor,
        samples: Sequence[TrainingSample],
        masks: Sequence[Tensor | None],
    ) -> dict[str, Any]:
        """Return the module's inputs for n images.

        Args:
            latents, noise: (n, c, h, w).
            level_index: indices of the noise levels, (n,).
            is_instance: True for an instance image, False for a class image, (n,).
            masks: masks of the latents' size, (1, h, w) each; None for an image without a mask.
        """
        time_ids = [sample.time_ids for sample in samples]  # (n, 6)
        inputs = {
            "latents": latents,
            "noise": noise,
            "level_index": level_index,
            "is_instance": is_instance,
            "time_ids": torch.tensor(time_ids, dtype=torch.float32),
            **self.condition([sample.caption for sample in samples]),
        }
        # Without masks the loss is a plain mean.
        if any(mask is not None for mask in masks):
            inputs["mask_weights"] = weight_map(masks, latents, self.cfg.unmasked_weight)
        return inputs

    def micro_batches(
        self, schedule: Sequence[tuple[int, tuple[int, ...]]], step_size: int
    ) -> Iterator[MicroBatch]:
        """Yield micro-batches in the schedule's order, with their noise and noise levels."""
        for (step, slots), samples in self.stream.batches(schedule, step_size):
            yield self._micro_batch(step, slots, samples)

    def _micro_batch(
        self, step: int, slots: tuple[int, ...], samples: Sequence[TrainingSample]
    ) -> MicroBatch:
        """Build a micro-batch: an instance sample for each slot, followed by any class samples."""
        latents = []  # this list and the next ones have one entry for each sample
        noise = []
        level_indices = []
        masks = []
        digests = []
        for sample, posterior in zip(samples, self.encoder(samples), strict=True):
            # The key depends on the run's seed, the step and the sample, not on how a batch is
            # split.
            random = generator(self.cfg.seed, "noise", step, sample.index, sample.slot, sample.kind)
            latent = self.encoder.space.encode(posterior.sample(random)[None])[0]  # (c, h, w)
            sample_noise = torch.randn(latent.shape, generator=random)
            level_index = self.module.noise_schedule.sample_level_index(random)
            if self.cfg.noise_offset:
                # Sampled last, so that noise and noise level are the same as without an offset.
                offset = torch.randn(len(latent), 1, 1, generator=random)
                sample_noise += self.cfg.noise_offset * offset
            latents.append(latent)
            noise.append(sample_noise)
            level_indices.append(level_index)
            masks.append(posterior.mask)
            digests.append(sample.digest(digest(sample_noise, level_index)))

        is_instance = [sample.kind == INSTANCE for sample in samples]
        inputs = self.inputs(
            torch.stack(latents),
            torch.stack(noise),
            torch.stack(level_indices),
            torch.tensor(is_instance),
            samples,
            masks,
        )
        held_weights: dict[str, float] = {}
        if self.cfg.prior_prediction_weight:
            inputs[PRIOR] = self.condition([str(sample.cfg.class_prompt) for sample in samples])
            held_weights[PRIOR] = self.cfg.prior_prediction_weight
        # Steps are counted from 1, as in the log. A resumed run uses the term in the same steps.
        if self.cfg.hold_unconditional and (step + 1) % self.cfg.hold_unconditional_every == 0:
            held_weights[UNCONDITIONAL] = self.cfg.hold_unconditional
        if held_weights:
            inputs[HELD_WEIGHTS] = {
                prompt: torch.full((len(samples),), float(weight))
                for prompt, weight in held_weights.items()
            }
        if self.cfg.guided_target > 1:
            # Class images and dropped captions keep the plain target: class images preserve the
            # base model's prior, and dropped captions train the unconditional prediction.
            is_guided = torch.tensor(
                [sample.kind == INSTANCE and sample.caption != "" for sample in samples]
            )
            if is_guided.any():
                inputs[GUIDANCE_SHARE] = (1 - 1 / self.cfg.guided_target) * is_guided.float()
        if UNCONDITIONAL in held_weights or GUIDANCE_SHARE in inputs:
            inputs[UNCONDITIONAL] = self.condition([""] * len(samples))
        noise_schedule = self.module.noise_schedule
        count = len(slots)
        return MicroBatch(
            slots=slots,
            names=tuple(sample.name for sample in samples[:count]),
            # For each slot, the digest of the instance sample, then that of the class sample.
            digests=tuple("".join(digests[slot::count]) for slot in range(count)),
            inputs=inputs,
            levels=tuple(map(float, noise_schedule.logged_level(inputs["level_index"]).tolist())),
        )

    def heldout_loss(self, evaluating: AbstractContextManager[Any]) -> dict[str, float]:
        """Return losses on held-out and training images (`GridLoss`); {} without held-out images.

        With ``--choose_by samples``, the distance of samples is included (`SampledDistance`).
        """
        if self.grid is None:
            return {}
        with evaluating:
            # An assistant is active in the loss, as in training, but not in generated images.
            with adapters.joined_by(self.adapted_models, ASSISTANT):
                values = self.grid()
            if self.sampled is not None:
                with self.sampling():
                    values |= self.sampled()
        return values

    def validate(
        self, step: int, folder: Path, evaluating: AbstractContextManager[Any]
    ) -> dict[str, float]:
        """Generate the validation images, write them into ``validation/step-N``, and return {}."""
        samples = self.cfg.samples
        if not samples:
            return {}
        images: list[Image] = []
        with evaluating, self.sampling():
            # Consecutive samples with the same size, guidance, steps and strength share a batch.
            for _, batch in itertools.groupby(samples, lambda sample: sample.batch_settings):
                images += self.sample_images(list(batch))
        shared_settings = self.cfg.sampler_settings
        with_settings = bool(self.cfg.validation_settings or shared_settings)
        folder = validation_folder(folder, step)
        write_images(folder, samples, images, with_settings, shared_settings)
        return {}

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Prepare `sample_images`: evaluation mode, sampling LoRA and validation model."""
        with ExitStack() as stack:
            stack.enter_context(inference(self.module))
            stack.enter_context(adapters.joined_by(self.adapted_models, SAMPLING))
            if self.validation_model is not None:
                stack.enter_context(self.validation_model.acting())
            yield

    def sample_images(self, samples: Sequence[ValidationSample]) -> list[Image]:
        """Generate the images of samples that share `ValidationSample.batch_settings`."""
        prompts = [sample.prompt for sample in samples]
        negatives = [sample.negative_prompt for sample in samples]
        embeddings = None  # trained text encoders must embed the prompts again
        if self.prompts is not None:
            embeddings = self.prompts.embed(prompts), self.prompts.embed_captions(negatives)
        shared = samples[0]
        lora_layers = [layer for _, layer in adapters.layers(self.adapted_models)]
        with adapters.scaled(lora_layers, shared.strength):
            return generate(
                self.sampled_pipeline,
                prompts,
                [sample.seed for sample in samples],
                size=(shared.height, shared.width),
                negatives=negatives,
                steps=shared.steps,
                guidance_scale=shared.guidance,
                guidance_from=shared.guidance_from,
                scheduler=self.cfg.sampling_scheduler,
                embeddings=embeddings,
                batch=self.cfg.sample_batch_size,
                memory_fix=self._memory_fix(len(samples)),
            )

    def _memory_fix(self, count: int) -> str:
        """Return advice for the user if the memory is too small for ``count`` images."""
        fixes = []
        if min(count, self.cfg.sample_batch_size) > 1:
            fixes.append(f"lower --sample_batch_size (now {self.cfg.sample_batch_size})")
        if not self.cfg.offload:
            fixes.append("add --offload")
        return ", ".join([*fixes, f"or {SMALLER_IMAGES}"]) if fixes else SMALLER_IMAGES
