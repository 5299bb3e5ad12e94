"""Train LoRA adapters on any torch module."""
