"""CLIP scores of adapters: images from a prompt set, what a scorer makes of them, and a report."""
