"""LoRA files for diffusers and for readers of kohya's format, and the proof of what is inside them.

from bilora_diffusion.export import reader, writer
writer.save_diffusers(folder, {"unet": unet}, base_model="stabilityai/stable-diffusion-xl-base-1.0")
reader.verify(folder, {"unet": unet})

python -m bilora_diffusion.export runs/demo/pytorch_lora_weights.safetensors --to kohya
"""
