"""Bases on disk, and merging into them."""

import json
import warnings

import torch
from peft_cases import ConvNet, Made
from safetensors.torch import load_file, save_file


def save_base(base: torch.nn.Module, path, **options) -> None:
    """Save a base as its users have it: transformers' own layout, or bare safetensors."""
    if isinstance(base, ConvNet):
        path.mkdir()
        save_file(base.state_dict(), path / "model.safetensors")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.save_pretrained(path, **options)


def load_merged(made: Made, path) -> torch.nn.Module:
    """Load what was merged: every tensor used, none missing."""
    if isinstance(made.base, ConvNet):
        model = ConvNet()
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model.eval()
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()
