"""LoRA files of diffusers', kohya's and PEFT's formats: written, read, verified and converted.

from bilora_diffusion.export import reader, writer
writer.save_diffusers(folder, {"unet": unet}, base_model="stabilityai/stable-diffusion-xl-base-1.0")
reader.verify(folder, {"unet": unet})

python -m bilora_diffusion.export runs/demo/pytorch_lora_weights.safetensors --to kohya
"""
