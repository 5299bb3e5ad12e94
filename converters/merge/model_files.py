"""The files beside the weights: configuration, tokenizer, generation settings, index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.merge.plan import MergePlan
from loraport.base.checkpoint import INDEX_SUFFIX

# Weights in other forms, which would be the unmerged ones.
_WEIGHT_SUFFIXES = (
    *(".safetensors", INDEX_SUFFIX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    *(".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data"),
)
_LARGEST = 256 << 20  # no configuration or tokenizer is larger


def write_model_files(plan: MergePlan, directory: Path) -> None:
    """Copy what belongs to the model, and write what changed.

    Args:
        plan: What is merged.
        directory: An existing directory.
    """
    for file in _model_files(plan.base.directory):
        shutil.copyfile(file, directory / file.name)
    if plan.config is not None:
        text = json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n"
        (directory / "config.json").write_text(text)
    _write_index(plan, directory)


def _model_files(directory: Path) -> Iterator[Path]:
    if not (directory / "config.json").is_file():
        return
    for file in sorted(directory.iterdir()):
        weights = file.name.endswith(_WEIGHT_SUFFIXES)
        if file.is_file() and not weights and file.stat().st_size <= _LARGEST:
            yield file


def _write_index(plan: MergePlan, directory: Path) -> None:
    first = next(iter(plan.shards))
    # diffusers' files have another name than transformers'.
    stem = "diffusion_pytorch_model" if first.startswith("diffusion_pytorch_model") else "model"
    if len(plan.shards) < 2 and first == f"{stem}.safetensors":
        return
    weight_map = {tensor.name: name for name, tensors in plan.shards.items() for tensor in tensors}
    index = {
        "metadata": {"total_size": plan.nbytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    text = json.dumps(index, indent=2) + "\n"
    (directory / f"{stem}{INDEX_SUFFIX}").write_text(text)
