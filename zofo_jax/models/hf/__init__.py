"""Hugging Face's files: configs, checkpoints, the hub, PEFT adapters."""
