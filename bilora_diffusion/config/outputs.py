"""Options of what comes out: validation, the run folder, trackers and the hub."""

from dataclasses import dataclass, field

from .fields import option


@dataclass(frozen=True)
class ValidationOptions:
    """Images and losses that show how training goes."""

    _argument_group_name = "validation"

    validation_prompt: str | None = option(
        None, "Prompt to generate images for, during training and at its end."
    )
    validation_prompts: list[str] = field(
        default_factory=list,
        metadata={"help": "More such prompts, or one text file with a prompt on each line."},
    )
    num_validation_images: int = option(
        4,
        "Images for each prompt; 0 for none. The six prompts that linoyts/3d_icon and mini bring"
        " get 1 each by default.",
    )
    validation_epochs: int = option(25, "Generate them every so many epochs.")
    eval_on_start: bool = option(
        False, "Let the untrained model make them, too: the viewer's column of the base model."
    )
    validation_dataset: str | None = option(
        None,
        "Held-out images to measure the loss on, given like --dataset; none for none. Default for"
        " mini: mini-heldout.",
    )
    validation_loss_steps: int = option(
        0, "Measure that loss every so many steps; 0 measures it at the start and the end only."
    )


@dataclass(frozen=True)
class OutputOptions:
    """The run folder, trackers and the hub."""

    _argument_group_name = "output"

    output_dir: str = option("lora-dreambooth-model", "Folder of the run.")
    overwrite_output_dir: bool = option(False, "Replace the run that the folder holds.")
    checkpointing_steps: int = option(
        100, "Save a checkpoint every so many steps; Ctrl-C and SIGTERM save one, too."
    )
    checkpoints_total_limit: int = option(2, "Keep the newest so many checkpoints; 0 keeps all.")
    resume_from_checkpoint: str | None = option(
        None,
        "Continue a run: latest, auto (latest if there is one), or a checkpoint's name or folder.",
    )
    log_dynamics: bool = option(
        False,
        "Record how the adapters move, for python -m eval.dynamics (Figs. 2, A2, A4): the factors"
        " themselves, lora-sam's terms of Eq. 5, bilora's subspaces and ascent gain.",
    )
    dynamics_steps: int | None = option(
        None, "Record them every so many steps. Default: about 40 times in all."
    )
    logging_dir: str = option("logs", "Folder of the trackers' logs, within the run folder.")
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard (used by default where it is installed), wandb, comet_ml, another"
        " that accelerate knows, all, or none.",
    )
    push_to_hub: bool = option(False, "Upload the run folder to the hub at the end.")
    hub_token: str | None = option(None, "Token for the upload; it is never written down.")
    hub_model_id: str | None = option(None, "Repository to upload to. Default: the folder's name.")
    config: str | None = option(
        None, "YAML file of options by their names here; options on the command line win."
    )


@dataclass(frozen=True)
class ImageOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    output_kohya_format: bool = option(
        True,
        "Write the LoRA under kohya's keys too, for ComfyUI, A1111 and others, which read nothing"
        " else; the file is named after the run.",
    )


@dataclass(frozen=True)
class TextOutputOptions(OutputOptions):
    """The run folder, trackers and the hub."""

    output_dir: str = option("lora-text-model", "Folder of the run.")
    checkpointing_steps: int = option(
        100,
        "Save a checkpoint every so many steps; Ctrl-C and SIGTERM save one, too.",
        aliases=["--save_steps"],
    )
