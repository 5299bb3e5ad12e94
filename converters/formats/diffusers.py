"""diffusers' directory: PEFT's tensors under a pipeline component's name.

Keys read ``unet.<module path>.lora_A.weight``; the configuration stands in the metadata of the
safetensors file, each key with the component's name before it. Files without it (older ones)
have alpha equal to the rank.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.base_facts import component_class
from converters.formats.carried import CARRIED_KEY, carried_json, read_carried, restore
from converters.formats.features import Feature, cannot_hold
from converters.formats.format import AdapterFormat, FormatContext
from converters.formats.json_object import parse_json_object
from loraport.adapter import Adapter, LoraModule
from loraport.checkpoint import Checkpoint, read_header
from loraport.errors import LoraportError
from loraport.naming import PEFT_PREFIX, Part, parse_peft_key
from loraport.naming.original_diffusion import is_transformer_path
from loraport.output import new_directory
from loraport.peft_layout.config import parse_config
from loraport.peft_layout.read import adapter_of_contents
from loraport.peft_layout.write import peft_contents
from loraport.safetensors_file import write_safetensors

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
_CONFIG_KEY = "lora_adapter_metadata"
_COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")
_HOLDS = frozenset({Feature.CONV, Feature.DORA, Feature.LORA_BIAS, Feature.ZERO_SCALING})


def detect(path: Path) -> bool:
    """Tell whether ``path`` holds, or is, a safetensors file with keys like diffusers'."""
    file = _file(path)
    if not file.is_file():
        return False
    try:
        tensors, _ = read_header(file)
    except LoraportError:
        return path.is_dir()  # damaged: reading it says how
    return any(_component(name) and ".lora_A." in name for name in tensors)


def read(path: Path, context: FormatContext) -> Adapter:  # noqa: ARG001  one signature for all
    """Read a directory or file of diffusers.

    Where it is for several components of a pipeline, module paths begin with theirs.

    Raises:
        LoraportError: All problems of the file at once.
    """
    file = _file(path)
    checkpoint = Checkpoint(file)
    components = {_component(name) for name in checkpoint}
    if not components or None in components:
        foreign = [name for name in checkpoint if _component(name) is None]
        raise LoraportError(
            f"adapter {file}: expected keys of {', '.join(_COMPONENTS)}, got "
            f"{', '.join(foreign[:3]) or 'none'}"
        )
    text = checkpoint.metadata.get(_CONFIG_KEY)
    found = {}
    for component in sorted(map(str, components)):
        tensors = {
            _peft(name, component): checkpoint.load(name)
            for name in checkpoint
            if _component(name) == component
        }
        config = _ranks_as_alphas(tensors) if text is None else _config(text, component, str(file))
        settings = parse_config(config, str(file))
        found[component] = adapter_of_contents(settings, tensors, None, file)
    carried = read_carried(checkpoint.metadata.get(CARRIED_KEY), str(file))
    return restore(next(iter(found.values())) if len(found) == 1 else _joined(found), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write a directory that diffusers' ``load_lora_weights`` takes.

    Raises:
        LoraportError: If the format cannot hold the adapter, naming everything it cannot, or
            ``path`` exists.
    """
    problems = cannot_hold(adapter, _HOLDS, FORMAT.name)
    if not adapter.modules:
        problems.add("the adapter", "LoRA modules", "none")
    problems.raise_if_any(f"{FORMAT.name} cannot hold this adapter")
    settings: dict[str, Any] = {}
    renamed: dict[str, torch.Tensor] = {}
    for component, part in _by_component(adapter, context).items():
        config, tensors = peft_contents(part)
        settings |= {f"{component}.{key}": value for key, value in config.items()}
        renamed |= {
            f"{component}.{key.removeprefix(PEFT_PREFIX)}": tensor.detach().cpu().contiguous()
            for key, tensor in tensors.items()
        }
    metadata = {
        "format": "pt",
        _CONFIG_KEY: json.dumps(settings),
        CARRIED_KEY: carried_json(adapter),
    }
    with new_directory(path, force=context.force) as partial:
        write_safetensors(renamed, partial / WEIGHTS_FILE, metadata)


def _joined(found: Mapping[str, Adapter]) -> Adapter:
    modules = {
        f"{component}.{path}": module
        for component, adapter in found.items()
        for path, module in adapter.modules.items()
    }
    replacements = {
        f"{component}.{name}": replacement
        for component, adapter in found.items()
        for name, replacement in adapter.replacements.items()
    }
    return Adapter(modules, replacements)


def _by_component(adapter: Adapter, context: FormatContext) -> dict[str, Adapter]:
    """Return the part of each component, its paths without the component's name."""
    components = {_component(path) if "." in path else None for path in adapter.modules}
    if None in components or len(components) < 2:
        return {_component_of_base(adapter, context): adapter}
    parts: dict[str, dict[str, LoraModule]] = defaultdict(dict)
    for path, module in adapter.modules.items():
        component, _, rest = path.partition(".")
        parts[component][rest] = module
    return {component: replace(adapter, modules=modules) for component, modules in parts.items()}


def _file(path: Path) -> Path:
    return path / WEIGHTS_FILE if path.is_dir() else path


def _component(name: str) -> str | None:
    head = name.partition(".")[0]
    return head if head in _COMPONENTS else None


def _peft(name: str, component: str) -> str:
    return PEFT_PREFIX + name.removeprefix(f"{component}.")


def _config(text: str, component: str, source: str) -> dict[str, Any]:
    document = parse_json_object(text, f"{source}: key {_CONFIG_KEY!r}")
    prefix = f"{component}."
    return {
        key.removeprefix(prefix): value for key, value in document.items() if key.startswith(prefix)
    }


def _ranks_as_alphas(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the configuration that a file without one means: every alpha is its rank."""
    ranks: dict[str, int] = {}
    parts = set()
    for key, tensor in tensors.items():
        parsed = parse_peft_key(key)
        if parsed is None or parsed.part is None:
            continue
        parts.add(parsed.part)
        if parsed.part is Part.LORA_A and tensor.dim() > 1:
            ranks[re.escape(parsed.module_path)] = int(tensor.shape[0])
    pattern = dict(_longest_first(ranks.items()))
    return {
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_dora": Part.MAGNITUDE in parts,
        "lora_bias": Part.LORA_B_BIAS in parts,
    }


def _longest_first(ranks: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Order patterns so that none is caught by a shorter one that ends alike."""
    return sorted(ranks, key=lambda entry: -len(entry[0]))


def _component_of_base(adapter: Adapter, context: FormatContext) -> str:
    directory = context.base_directory(adapter.base_model)
    kind = component_class(directory) if directory is not None else ""
    if kind.startswith("CLIPText") or all(p.startswith("text_model.") for p in adapter.modules):
        return "text_encoder"
    transformer = "Transformer" in kind or any(map(is_transformer_path, adapter.modules))
    return "transformer" if transformer else "unet"


FORMAT = AdapterFormat(
    name="diffusers",
    summary=f"diffusers' directory ({WEIGHTS_FILE})",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
