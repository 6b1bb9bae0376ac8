"""Small random captioning models of transformers' classes, saved in folders.

For BLIP, see `tests.eval.clip_models.save_blip`.
"""

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.eval.clip_models import HEADS, SIZE, WIDTH, save_blip, shake
from tests.image.tiny.words import qwen_tokenizer

# Chat template for turns with images, with Qwen2.5-VL's special tokens
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_florence(folder: Path) -> Path:
    """Save a random Florence-2 with a small vocabulary of single characters."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
    # Characters in the byte-level form of BART's tokenizer, which writes a space as Ġ
    letters = "abcdefghijklmnopqrstuvwxyzADLWDithbe?.,Ġ"
    words += list(dict.fromkeys(letters))
    tokenizer = hf.BartTokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=64,
    )
    vision: dict[str, Any] = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, WIDTH],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "projection_dim": WIDTH,
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(words),
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": HEADS,
        "decoder_attention_heads": HEADS,
        "encoder_ffn_dim": 2 * WIDTH,
        "decoder_ffn_dim": 2 * WIDTH,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    torch.manual_seed(0)
    config = hf.Florence2Config(
        vision_config=vision, text_config=text, image_token_id=words.index("<image>")
    )
    model = hf.Florence2ForConditionalGeneration(config)
    shake(model, scale=0.3)
    model.save_pretrained(folder)
    # An image of 32 x 32 pixels becomes 4 x 4 positions and their mean.
    image_processor = hf.CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_seq_length=17
    )
    hf.Florence2Processor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def save_chat_model(folder: Path, *, has_template: bool = True) -> Path:
    """Save a random Qwen2.5-VL."""
    tokenizer = qwen_tokenizer()
    marks: Any = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.chat_template = None
    numbers = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": HEADS,
        "out_hidden_size": WIDTH,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    torch.manual_seed(0)
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=numbers["<|image_pad|>"],
        video_token_id=numbers["<|video_pad|>"],
        vision_start_token_id=numbers["<|vision_start|>"],
        vision_end_token_id=numbers["<|vision_end|>"],
    )
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    shake(model, scale=0.3)
    model.generation_config = hf.GenerationConfig(
        do_sample=True,  # as in the published checkpoints
        temperature=0.5,
        top_k=4,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    image_processor = hf.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    processor = hf.Qwen2_5_VLProcessor(
        image_processor,
        tokenizer,
        hf.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=CHAT if has_template else None,
    )
    processor.save_pretrained(folder)
    return folder


SAVE = {"blip": save_blip, "florence2": save_florence, "chat": save_chat_model}
