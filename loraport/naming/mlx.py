"""MLX's names: ``<module>.lora_a``, ``.lora_b``, ``.m``, and which modules a config names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping

# mlx-lm follows the PyTorch module paths except where its model class names its body otherwise.
_RENAMED_BODIES: Mapping[str, tuple[str, str]] = {"gpt2": ("transformer.", "model.")}

_FIELDS = {"lora_A": "lora_a", "lora_B": "lora_b", "magnitude": "m"}
_LAYER = re.compile(r"(?P<body>.*?)\.(?P<index>\d+)\.(?P<key>.+)")


def mlx_module(module_path: str, model_type: str | None) -> str:
    """Return the path a module has in mlx-lm's model.

    >>> mlx_module("transformer.h.0.attn.c_attn", "gpt2")
    'model.h.0.attn.c_attn'
    """
    torch_body, mlx_body = _RENAMED_BODIES.get(model_type or "", ("", ""))
    if torch_body and module_path.startswith(torch_body):
        return mlx_body + module_path.removeprefix(torch_body)
    return module_path


def torch_module(mlx_path: str, model_type: str | None) -> str:
    """Return the module path of a path in mlx-lm's model: the inverse of `mlx_module`."""
    torch_body, mlx_body = _RENAMED_BODIES.get(model_type or "", ("", ""))
    if mlx_body and mlx_path.startswith(mlx_body):
        return torch_body + mlx_path.removeprefix(mlx_body)
    return mlx_path


def mlx_key(mlx_path: str, field: str) -> str:
    """Return the tensor name of a module's ``lora_A``, ``lora_B`` or ``magnitude``."""
    return f"{mlx_path}.{_FIELDS[field]}"


def parse_mlx_key(name: str) -> tuple[str, str] | None:
    """Split a tensor name into the path in mlx-lm's model and the field.

    >>> parse_mlx_key("model.layers.0.mlp.up_proj.lora_a")
    ('model.layers.0.mlp.up_proj', 'lora_A')
    """
    path, _, leaf = name.rpartition(".")
    for field, stored in _FIELDS.items():
        if path and leaf == stored:
            return path, field
    return None


def mlx_targets(mlx_paths: Collection[str], layers: int | None) -> tuple[int, list[str]]:
    """Return ``num_layers`` and ``keys`` that make mlx-lm adapt these modules and no others.

    mlx-lm adapts modules ``keys`` in the last ``num_layers`` layers, where a key is a path
    inside a layer; a key may also be a path in the whole model. The first form is used where
    the last layers are adapted alike, the second for everything else.

    Args:
        mlx_paths: The adapted modules.
        layers: How many layers the model has; ``None`` takes the highest adapted one as last.

    >>> mlx_targets(["model.layers.2.q_proj", "model.layers.3.q_proj"], 4)
    (2, ['q_proj'])
    >>> mlx_targets(["model.layers.2.q_proj", "lm_head"], 4)
    (1, ['lm_head', 'model.layers.2.q_proj'])
    """
    by_layer: dict[int, set[str]] = defaultdict(set)
    outside: set[str] = set()
    for path in mlx_paths:
        match = _LAYER.fullmatch(path)
        if match is None:
            outside.add(path)
        else:
            by_layer[int(match["index"])].add(match["key"])
    if not by_layer:
        return 0, sorted(outside)
    last = max(by_layer) if layers is None else layers - 1
    alike = len({frozenset(keys) for keys in by_layer.values()}) == 1
    if alike and sorted(by_layer) == list(range(last - len(by_layer) + 1, last + 1)):
        return len(by_layer), sorted(next(iter(by_layer.values())) | outside)
    return len(by_layer), sorted(mlx_paths)
