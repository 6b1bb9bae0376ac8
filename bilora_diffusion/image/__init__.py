"""Image models: options, image sets, crops, latents, prompts, denoising, sampling, the script."""
