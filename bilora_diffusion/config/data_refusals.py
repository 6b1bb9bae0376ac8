"""What does not go together of that which is learned from; a part of `refusals.REFUSED`."""

from __future__ import annotations

from .conditions import ABSENT, GIVEN, Refusal, above, refusal, same_as

_WITHOUT_THE_BASE = {
    "with_prior_preservation": (True, "both keep the class", "drop one of the two"),
    "train_text_encoder": (
        True,
        "what is kept is the prediction for the prompt as the untrained encoders read it",
        "drop one of the two",
    ),
    "init_lora_weights": (
        ("pissa", "lora-ga"),
        "this start is taken out of the base weights, so that they no longer predict what is kept",
        "use `--init_lora_weights default` or `gaussian`",
    ),
    "method": (
        ("full", "flat-lora"),
        "it moves the base weights, so that they no longer predict what is kept",
        "use `--method bilora`, `lora` or another that leaves them alone",
    ),
}

OF_DATA: tuple[Refusal, ...] = (
    refusal(
        "there are no images to learn from",
        "add `--dataset` with a hub id, a folder or mini, or `--instance_data_dir` with a folder",
        dataset_name=ABSENT,
        instance_data_dir=ABSENT,
    ),
    refusal(
        "images come from one place", "give only one", dataset_name=GIVEN, instance_data_dir=GIVEN
    ),
    refusal("`--image_column` is the same", "change one", caption_column=same_as("image_column")),
    refusal("masks come from one place", "give only one", mask_column=GIVEN, alpha_mask=True),
    refusal(
        "the class images lie there, or are made there",
        "add it, for example `--class_data_dir class_images`",
        with_prior_preservation=True,
        class_data_dir=ABSENT,
    ),
    refusal(
        "it stands for the class images",
        'add it, for example `--class_prompt "a dog"`',
        with_prior_preservation=True,
        class_prompt=ABSENT,
    ),
    refusal(
        "it says what is to be kept",
        'add it, for example `--class_prompt "a dog"`',
        prior_prediction_weight=above(0),
        class_prompt=ABSENT,
    ),
    *(
        refusal(reason, instead, **{"prior_prediction_weight": above(0), name: wanted})
        for name, (wanted, reason, instead) in _WITHOUT_THE_BASE.items()
    ),
    refusal(
        "there is no model to start from",
        "add it with a hub id or a folder, for example google-t5/t5-base or smollm2",
        model_name_or_path=ABSENT,
    ),
    refusal(
        "there is no text to learn from",
        "add `--task` with the name of a task, or `--train_file` with a file",
        task=ABSENT,
        train_file=ABSENT,
    ),
    refusal("rows come from one place", "give only one", task=GIVEN, train_file=GIVEN),
    *(
        refusal(
            "a task knows its own columns and held-out rows",
            "drop it, or give `--train_file`",
            **{name: GIVEN, "task": GIVEN},
        )
        for name in ("input_column", "target_column", "validation_file")
    ),
    refusal("`--target_column` is the same", "change one", input_column=same_as("target_column")),
    refusal(
        "only causal models take several rows in one",
        "drop it",
        packing=True,
        task_type=("seq2seq", "classification"),
    ),
    refusal("packed rows are all of one length", "drop it", group_by_length=True, packing=True),
)
