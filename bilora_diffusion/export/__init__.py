"""Write, read, compare and convert LoRA files in the formats of diffusers, kohya and PEFT.

from bilora_diffusion.export import writer
writer.save_diffusers(folder, {"unet": unet}, base_model="stabilityai/stable-diffusion-xl-base-1.0")

python -m bilora_diffusion.export runs/demo/pytorch_lora_weights.safetensors --to kohya
"""
