"""loraport: LoRA adapters from training to every place a model runs."""

__version__ = "0.1.0"
