"""Distill the miniature to four steps without guidance, as a LoRA file.

    python -m tools.mini.four_steps --output bilora_diffusion/mini/four_steps.safetensors

It takes a quarter of an hour on one core.

The file stands for SDXL-Lightning and its kin in tests and in docs/guide.md. The teacher is the
miniature with guidance, in 24 steps of Euler's method. The student is the same UNet with a LoRA:
each of its four predictions is regressed to the direction that leads to where the teacher is six
steps later, first from the teacher's own states, then from the student's (progressive distillation
with guidance, arXiv 2210.03142, in one round).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilora_diffusion import mini

SIDE = 64  # pixels
STEPS, SUBSTEPS = 4, 6
GUIDANCE = 4.0  # of the teacher
RANK, ALPHA = 8, 8
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
FORMS = ("a flat icon of a {label}", "a TOK icon of a {label}, in the style of TOK")
BATCH = 32


class Distillation:
    """The miniature as teacher and, with its LoRA, as student.

    A state is a batch of latents x in Euler's scale, x = x0 + sigma * noise.
    """

    def __init__(self) -> None:
        folder = str(mini.pipeline_dir())
        self.pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.unet = self.pipeline.unet.requires_grad_(False)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS))
        self.unet.add_adapter(config)
        # Sigmas of the teacher's steps; every sixth is one of the student's.
        scheduler = EulerDiscreteScheduler.from_config(
            self.pipeline.scheduler.config, timestep_spacing="trailing"
        )
        scheduler.set_timesteps(STEPS * SUBSTEPS)
        self.sigmas = scheduler.sigmas.tolist()
        self.timesteps = scheduler.timesteps.tolist()
        self.first_sigma = float(scheduler.init_noise_sigma)
        self.empty = self.embed([""])
        self.time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, (n, tokens, width), and their pooled ones, (n, width)."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False
        )
        return embeddings, pooled

    def predict(self, x: Tensor, step: int, prompts: tuple[Tensor, Tensor]) -> Tensor:
        """The UNet's prediction of the noise at a step of the teacher."""
        scaled = x / (self.sigmas[step] ** 2 + 1) ** 0.5
        embeddings, pooled = (part.expand(len(x), *part.shape[1:]) for part in prompts)
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(len(x), -1)}
        return self.unet(scaled, self.timesteps[step], embeddings, added_cond_kwargs=added).sample

    @torch.no_grad()
    def teach(self, x: Tensor, stage: int, prompts: tuple[Tensor, Tensor]) -> Tensor:
        """The state after the teacher's steps of a stage."""
        self.unet.disable_adapters()
        for step in range(stage * SUBSTEPS, (stage + 1) * SUBSTEPS):
            unconditional = self.predict(x, step, self.empty)
            noise = torch.lerp(unconditional, self.predict(x, step, prompts), GUIDANCE)
            x = x + (self.sigmas[step + 1] - self.sigmas[step]) * noise
        self.unet.enable_adapters()
        return x

    def student_step(self, x: Tensor, stage: int, prompts: tuple[Tensor, Tensor]) -> Tensor:
        """The state after the student's one step of a stage."""
        step = stage * SUBSTEPS
        change = self.sigmas[step + SUBSTEPS] - self.sigmas[step]
        return x + change * self.predict(x, step, prompts)

    def lessons(
        self, prompts: Sequence[str], generator: torch.Generator, by_student: bool
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """(stage, state, target, embedding, pooled embedding) of each prompt and stage.

        Args:
            by_student: whether the states are the student's, not the teacher's.
        """
        for first in range(0, len(prompts), BATCH):
            batch = prompts[first : first + BATCH]
            embedded = self.embed(batch)
            shape = (len(batch), 8, SIDE // 8, SIDE // 8)
            x = self.first_sigma * torch.randn(shape, generator=generator)
            for stage in range(STEPS):
                target = self.teach(x, stage, embedded)
                rows = zip(x, target, *embedded, strict=True)
                yield from ((stage, *row) for row in rows)
                with torch.no_grad():
                    x = self.student_step(x, stage, embedded) if by_student else target

    def train(self, lessons: Sequence[Any], steps: int, rate: float, seed: int) -> None:
        """Regress the student's states to their targets, with a rate that falls to 0."""
        parameters = [weight for weight in self.unet.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        by_stage = [[lesson for lesson in lessons if lesson[0] == s] for s in range(STEPS)]
        generator = torch.Generator().manual_seed(seed)
        for number in range(1, steps + 1):
            losses = []
            for stage, stage_lessons in enumerate(by_stage):
                chosen = torch.randint(len(stage_lessons), (BATCH // STEPS,), generator=generator)
                rows = [stage_lessons[index] for index in chosen.tolist()]
                x, target, embeddings, pooled = (
                    torch.stack([row[part] for row in rows]) for part in range(1, 5)
                )
                reached = self.student_step(x, stage, (embeddings, pooled))
                # In units of the next state's size, so that no stage outweighs the others.
                size = (self.sigmas[(stage + 1) * SUBSTEPS] ** 2 + 1) ** 0.5
                loss = ((reached - target) / size).square().mean()
                loss.backward()
                losses.append(loss.item())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if number % 25 == 0:
                print(number, " ".join(f"{loss:.4f}" for loss in losses), flush=True)

    def save(self, file: Path) -> None:
        """Write the LoRA in diffusers' format, with alpha in its metadata."""
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        folder = file.parent
        StableDiffusionXLPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, weight_name=file.name, safe_serialization=True
        )
        tensors = {key: value.half() for key, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def labels() -> list[str]:
    """Labels of all icons that the package has."""
    names = []
    for folder in (mini.train_dir(), mini.heldout_dir()):
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            names.append(json.loads(line)["label"])
    return names


def main() -> None:
    """Distill and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=448, help="in each of two rounds")
    parser.add_argument("--steps", type=int, default=400, help="in each of two rounds")
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    distillation = Distillation()
    prompts = [form.format(label=label) for form in FORMS for label in labels()]
    lessons: list[Any] = []
    for round_number, rate in enumerate((args.rate, args.rate / 2)):
        chosen = torch.randint(len(prompts), (args.prompts,), generator=generator).tolist()
        texts = [prompts[index] for index in chosen]
        by_student = round_number > 0
        lessons += distillation.lessons(texts, generator, by_student)
        print(f"round {round_number + 1}: {len(lessons)} states", flush=True)
        distillation.train(lessons, args.steps, rate, seed=round_number)
        distillation.save(args.output)


if __name__ == "__main__":
    main()
