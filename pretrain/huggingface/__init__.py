"""Checkpoints as Hugging Face folders, out and in."""
