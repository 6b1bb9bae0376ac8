"""Rules for running the pages' commands in tests, and replacements for some of their words."""

from dataclasses import dataclass

from bilora_diffusion import mini
from tests.docs.pages import IMAGE_SCRIPT, TEXT_SCRIPT

LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Rule:
    """How commands of one kind are run.

    Attributes:
        pattern: Regular expression that is searched in a command, after `STAND_INS` are replaced.
        flags: Words to append. `stand_ins.stand_ins` yields the values of names in braces.
        reason: Why such commands are not run; "" if they are run.
    """

    pattern: str
    flags: str = ""
    reason: str = ""


# Words of a page, and the words that replace them in the test
STAND_INS = (
    ("make demo", "python -m bilora_diffusion.demo --output_dir demo"),
    ("make demo-text", "python examples/2_text.py --output_dir demo-text"),
    (
        "make try PHOTOS=my_photos",
        f"python {IMAGE_SCRIPT} --config try --dataset my_photos --instance_prompt TOK"
        " --output_dir runs/try",
    ),
    ("bilora train", f"python {IMAGE_SCRIPT}"),
    ("-m bilora_diffusion train", IMAGE_SCRIPT),
    ("bilora caption", "python -m bilora_diffusion.caption"),
    ("bilora export", "python -m bilora_diffusion.export"),
    ("--dataset linoyts/3d_icon", "--dataset mini --validation_dataset none"),
    (
        "--config recipes/sdxl_3d_icon.yaml",
        "--config recipes/sdxl_3d_icon.yaml --pretrained_model_name_or_path mini"
        " --dataset mini --validation_dataset none",
    ),
    # A hundredth of the recipe's 500 steps, and of the step that a page names
    ("--config sdxl", "--config sdxl --max_train_steps 5 --checkpointing_steps 1"),
    ("--step 400", "--step 4"),
    ("--steps 80,120,280", "--steps 1,2"),
    ("--validation_loss_steps 50", "--validation_loss_steps 1"),
    ("--validation_split 0.1", "--validation_split 0.5"),
    ("--max_new_tokens 64", "--max_new_tokens 2"),
    ("--config flux2_klein", "--config flux2_klein --pretrained_model_name_or_path mini-flow"),
    ("black-forest-labs/FLUX.1-dev", "mini-flow"),
    (
        "--config recipes/t5_base/cola.yaml",
        "--model_name_or_path {t5} --train_file {t5_rows} --output_dir runs/t5_base_cola",
    ),
    ("--model_name_or_path meta-llama/Llama-3.1-8B", "--model_name_or_path {llama}"),
    ("--model smollm2", "--model {llama}"),
    ("--assistant_lora zimage_turbo_training_adapter_v2.safetensors", "--assistant_lora FILE"),
    ("--sampling_lora sdxl_lightning_8step_lora.safetensors", "--sampling_lora FILE"),
    ("FILE", f"runs/dog/{LORA}"),
    ("bilora_diffusion/mini/four_steps.safetensors", str(mini.four_steps_file())),
)

SHORT = (
    "--resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1"
    " --num_validation_images 1 --validation_num_inference_steps 1"
)
FEW_STEPS = f"--max_train_steps 2 {SHORT}"
LITTLE_MEASURED = "--max_eval_samples 2 --validation_loss_steps 2"
MINIATURE = "--pretrained_model_name_or_path mini"
FEW_IMAGES = "--max_prompts 2 --num_inference_steps 1 --seeds 0 --general_prompts none"
VIEWER = Rule("^python -m app.viewer")
RULES = (
    Rule("^(activate|python3 -m venv|pip|pre-commit)", reason="creates the tests' environment"),
    Rule("^make (test|test-all|lint)$", reason="runs the tests"),
    Rule("^make pictures", reason="takes half an hour"),
    Rule("^torchrun|--use_fsdp", reason="needs several devices: tests/scripts/test_fsdp.py"),
    Rule("--compile|-compiled", reason="compiles for a minute: tests/train/test_compiling.py"),
    Rule(
        "benchmarks/picture|eval/experiments/(pictures|guid|hold|flat|two|sdxl|flux2|peft)",
        reason="samples for hours: tests/scripts/test_scored_sweep.py",
    ),
    Rule("benchmarks.gpu_day", reason="needs a GPU: tests/scripts/test_gpu_day.py"),
    Rule("eval.clip_scores --guidance_from base$", reason="names an option, without runs"),
    VIEWER,
    Rule("^python -m bilora_diffusion.caption", "--model {captioner}"),
    Rule("^python -m bilora_diffusion.export"),
    Rule(f"{IMAGE_SCRIPT}.* --config mini", f"{FEW_STEPS} {LITTLE_MEASURED}"),
    Rule(f"{IMAGE_SCRIPT}.*(--dataset mini|mini-flow)", FEW_STEPS),
    Rule(f"{IMAGE_SCRIPT}.* --config sdxl", f"{MINIATURE} {SHORT}"),
    Rule(IMAGE_SCRIPT, f"{MINIATURE} {FEW_STEPS}"),
    # The first step of a warm-up has rate 0, so the scores of both steps could be equal.
    Rule(f"{TEXT_SCRIPT}.* --choose_by", "--max_train_steps 2 --max_length 48 --warmup_ratio 0"),
    Rule(TEXT_SCRIPT, "--max_train_steps 2 --max_length 48"),
    Rule("examples/5_sft.py", "--max_length 48 --per_device_train_batch_size 1"),
    Rule("bilora_diffusion.demo", f"--max_train_steps 2 {LITTLE_MEASURED} {SHORT}"),
    Rule(
        "examples/2_text.py",
        "--model_name_or_path {llama} --max_train_steps 2 --max_train_samples 8"
        " --train_batch_size 1 --max_eval_samples 2 --max_predictions 1"
        " --generation_max_new_tokens 8",
    ),
    Rule("eval.clip_scores .*runs/icons", f"{FEW_IMAGES} --scorer {{clip}} --captioner {{blip}}"),
    Rule("eval.clip_scores", FEW_IMAGES),
    Rule("eval.sweep", "--seeds 0"),
    Rule(
        "eval.landscape",
        "--directions 1 --points 3 --grid 0 --max_images 1 --levels 1 --ascent_steps 1",
    ),
    Rule("eval.(dynamics|generalization)"),
    Rule("eval.text_scores .*mtbench", "--mtbench_questions {questions} --judge_base_url {judge}"),
    Rule("eval.text_scores", "--limit 1 --max_new_tokens 2"),
    Rule("benchmarks/step_cost.py", "--steps 1"),
)
