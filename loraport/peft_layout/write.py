"""Write an adapter in PEFT's layout."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.adapter import Adapter, LoraModule, ModuleKind, require_adapter
from loraport.errors import LoraportError, Problems
from loraport.naming import Part, path_endings, peft_key, peft_parameter_key
from loraport.output import new_directory
from loraport.peft_layout.expert_keys import in_definition_order, inside_wrappers, wrapped
from loraport.peft_layout.read import CONFIG_FILE, FINGERPRINT_KEY, WEIGHTS_FILE
from loraport.safetensors_file import write_safetensors
from loraport.scaling import alpha_for

if TYPE_CHECKING:
    import torch

# What modules hold that PEFT can save. It saves all that is in a module, or nothing: a vector of
# one with other modules inside is loaded by its name alone, as biases are.
_OF_WHOLE_MODULES = frozenset({"weight", "bias", "running_mean", "running_var"})
_NO_MODULES = "dummy-target-modules"  # PEFT's word for none, which it refuses otherwise


def write_peft(adapter: Adapter, path: Path | str, *, force: bool = False) -> None:
    """Write an adapter directory that PEFT 0.21 and loraport load.

    Args:
        adapter: What to write; dtypes are kept.
        path: The new directory; appears whole or not at all.
        force: Replace an existing directory.

    Raises:
        LoraportError: If ``path`` exists, or PEFT's layout cannot hold the adapter.
    """
    require_adapter(adapter)
    config, tensors = peft_contents(adapter)
    with new_directory(Path(path), force=force) as partial:
        save_contents(partial, adapter, config, tensors)


def save_contents(
    directory: Path, adapter: Adapter, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    """Write the two files into an existing directory."""
    metadata = {"format": "pt"}
    if adapter.base_fingerprint is not None:
        metadata[FINGERPRINT_KEY] = adapter.base_fingerprint.to_json()
    write_safetensors(tensors, directory / WEIGHTS_FILE, metadata)
    # Sorted on the outside only: of the patterns the first that matches wins.
    config = dict(sorted(config.items()))
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def peft_contents(adapter: Adapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return ``adapter_config.json`` as an object, and the tensors by PEFT key.

    Raises:
        LoraportError: If PEFT's layout cannot hold the adapter.
    """
    import torch

    modules = _uniform_rslora(adapter.modules)
    use_dora = _all_or_none(modules, "magnitude", "DoRA")
    lora_bias = any(module.lora_B_bias is not None for module in modules.values())
    tensors: dict[str, torch.Tensor] = {}
    bare = {path for path, module in modules.items() if module.kind is ModuleKind.EXPERTS}
    wrappers = _wrappers(bare)
    depths = Counter(path.rpartition(".")[0] for path in bare)
    for path, module in modules.items():
        keyed = wrappers.get(path) or inside_wrappers(path, depths)
        for part, tensor in _parts(module).items():
            tensors[peft_key(keyed, part)] = tensor
        if lora_bias and module.lora_B_bias is None:
            tensors[peft_key(keyed, Part.LORA_B_BIAS)] = torch.zeros(
                module.lora_B.shape[0], dtype=module.lora_B.dtype
            )
    token_indices: dict[str, list[int]] = {}
    saved: list[str] = []
    biases = False
    for parameter, replacement in adapter.replacements.items():
        path, _, leaf = parameter.rpartition(".")
        if replacement.rows is not None:
            tensors[peft_key(inside_wrappers(path, depths), Part.TOKEN_ROWS)] = replacement.tensor
            token_indices[path] = list(replacement.rows)
            continue
        adapted = path in modules
        keyed = inside_wrappers(parameter, depths)
        tensors[peft_parameter_key(keyed, adapted=adapted)] = replacement.tensor
        if leaf == "bias" and f"{path}.weight" not in adapter.replacements:
            biases = True
        elif not adapted and path not in depths and leaf in _OF_WHOLE_MODULES:
            saved.append(path)
    for buffer, count in adapter.counters.items():
        tensors[peft_parameter_key(inside_wrappers(buffer, depths))] = count
    ranks = {path: float(module.rank) for path, module in modules.items()}
    alphas = {path: module.alpha for path, module in modules.items()}
    rank, rank_pattern = _patterned(ranks, 8)
    alpha, alpha_pattern = _patterned(alphas, 8)
    config = {
        "peft_type": "LORA",
        "task_type": adapter.training.get("task_type"),
        "base_model_name_or_path": adapter.base_model,
        "r": int(rank),
        "lora_alpha": _whole(alpha),
        "rank_pattern": {key: int(value) for key, value in rank_pattern.items()},
        "alpha_pattern": {key: _whole(value) for key, value in alpha_pattern.items()},
        "lora_dropout": adapter.training.get("lora_dropout", 0.0),
        "target_modules": _targets([path for path in modules if path not in bare])
        if modules
        else _NO_MODULES,
        "target_parameters": sorted(bare) or None,
        "modules_to_save": sorted(set(saved)) or None,
        "trainable_token_indices": _by_name(token_indices) or None,
        "ensure_weight_tying": bool(adapter.training.get("ensure_weight_tying")),
        "bias": "all" if biases else "none",
        "lora_bias": lora_bias,
        "use_dora": use_dora,
        "use_rslora": any(module.use_rslora for module in modules.values()),
        "fan_in_fan_out": any(module.fan_in_fan_out for module in modules.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return config, tensors


def _by_name(token_indices: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return trained rows by module, those of several modules of one name under that name.

    Where several names are given, PEFT takes tied ones for a single embedding.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for path in token_indices:
        names[path.rpartition(".")[2]].append(path)
    alike = {
        name: token_indices[paths[0]]
        for name, paths in names.items()
        if len(paths) > 1 and all(token_indices[p] == token_indices[paths[0]] for p in paths)
    }
    apart = {p: rows for p, rows in token_indices.items() if p.rpartition(".")[2] not in alike}
    return {**alike, **apart}


def _parts(module: LoraModule) -> dict[Part, torch.Tensor]:
    embedding = module.kind is ModuleKind.EMBEDDING
    magnitude = module.magnitude
    if magnitude is not None and module.kind is ModuleKind.CONV:
        magnitude = magnitude.reshape(1, -1, *[1] * (module.lora_A.dim() - 2))  # PEFT broadcasts it
    named = {
        Part.EMBEDDING_A if embedding else Part.LORA_A: module.lora_A,
        Part.EMBEDDING_B if embedding else Part.LORA_B: module.lora_B,
        Part.LORA_B_BIAS: module.lora_B_bias,
        Part.MAGNITUDE: magnitude,
    }
    return {part: tensor for part, tensor in named.items() if tensor is not None}


def _wrappers(parameters: Set[str]) -> dict[str, str]:
    """Return the path of each bare parameter's wrapper.

    Raises:
        LoraportError: If one module has several whose order is not known.
    """
    by_module: dict[str, list[str]] = defaultdict(list)
    for parameter in parameters:
        module, _, leaf = parameter.rpartition(".")
        by_module[module].append(leaf)
    paths = {}
    for module, leaves in by_module.items():
        ordered = in_definition_order(leaves)
        if ordered is None:
            raise LoraportError(f"{module}: the order of its parameters {leaves} is not known")
        for depth, leaf in enumerate(reversed(ordered)):
            paths[f"{module}.{leaf}"] = wrapped(module, depth)
    return paths


def _uniform_rslora(modules: Mapping[str, LoraModule]) -> dict[str, LoraModule]:
    """Return modules that agree on ``use_rslora``, as one flag rules them all in PEFT."""
    if len({module.use_rslora for module in modules.values()}) < 2:
        return dict(modules)
    return {
        path: replace(module, alpha=alpha_for(module.rank, module.scaling), use_rslora=False)
        for path, module in modules.items()
    }


def _all_or_none(modules: dict[str, LoraModule], attribute: str, variant: str) -> bool:
    having = [path for path, module in modules.items() if getattr(module, attribute) is not None]
    if having and len(having) < len(modules):
        problems = Problems()
        for path in sorted(modules.keys() - set(having)):
            problems.add(path, f"{variant} as on {having[0]}", "plain LoRA", "write two adapters")
        problems.raise_if_any(f"PEFT's layout cannot hold {variant} on some modules only")
    return bool(having)


def _patterned(values: dict[str, float], default: float) -> tuple[float, dict[str, float]]:
    """Return the commonest value, and PEFT patterns for the modules that differ from it.

    A pattern also matches every path that ends with it, so longer paths come first and
    modules that a shorter pattern would catch get one of their own.
    """
    if not values:
        return default, {}
    common = Counter(values.values()).most_common(1)[0][0]
    differing = {path for path, value in values.items() if value != common}
    caught = [path for path in values if not differing.isdisjoint(path_endings(path))]
    ordered = sorted(caught, key=lambda path: (-len(path), path))
    return common, {re.escape(path): values[path] for path in ordered}


def _targets(paths: list[str]) -> list[str] | str:
    """Return PEFT's ``target_modules`` that matches these modules and no others.

    A list entry also matches every module that ends with it, so names at the top level need
    a regular expression.
    """
    if any("." not in path for path in paths):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value
