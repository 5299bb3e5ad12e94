"""diffusers' directory: PEFT's tensors under a pipeline component's name.

Keys read ``unet.<module path>.lora_A.weight``; the configuration stands in the metadata of the
safetensors file, each key with the component's name before it. Files without it (older ones)
may have a tensor ``alpha`` beside a module's matrices; else alpha equals the rank.
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
from converters.formats.original_names import named_as_in_base, original_model
from loraport.adapter import Adapter, LoraModule
from loraport.base.checkpoint import Checkpoint, read_header
from loraport.errors import LoraportError, Problems
from loraport.json_object import parse_json_object
from loraport.naming import PEFT_PREFIX, Part, parse_peft_key
from loraport.naming.diffusers import COMPONENTS, ORIGINAL_MODEL, parse_diffusers_key
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
    parsed = map(parse_diffusers_key, tensors)
    return any(found is not None and ".lora_A." in found[1] for found in parsed)


def read(path: Path, context: FormatContext) -> Adapter:
    """Read a directory or file of diffusers, or a file of the kind that ComfyUI reads.

    Where it is for several components of a pipeline, module paths begin with theirs. ComfyUI's
    names are those of the model as published; with its base in diffusers' layout they become its.

    Raises:
        LoraportError: All problems of the file at once.
    """
    file = _file(path)
    checkpoint = Checkpoint(file)
    text = checkpoint.metadata.get(_CONFIG_KEY)
    found = {}
    for component, (tensors, alphas) in sorted(_components(checkpoint, file, text).items()):
        config = (
            _config_of_tensors(tensors, alphas)
            if text is None
            else _config(text, component, str(file))
        )
        settings = parse_config(config, str(file))
        found[component] = adapter_of_contents(settings, tensors, None, file)
        if component == ORIGINAL_MODEL:
            found[component] = named_as_in_base(found[component], context, str(file))
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
    for module_path in adapter.modules:
        original = original_model(module_path)
        if original is not None:
            problems.add(
                module_path,
                "a module of diffusers' transformer",
                f"one of {original} as it was published",
                "give --base with the transformer in diffusers' layout",
            )
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


def _components(
    checkpoint: Checkpoint, file: Path, text: str | None
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Return each component's tensors by PEFT's key, and the alphas beside them by module path."""
    parsed = {name: parse_diffusers_key(name) for name in checkpoint}
    foreign = [name for name, found in parsed.items() if found is None]
    if foreign or not parsed:
        raise LoraportError(
            f"adapter {file}: expected keys of {', '.join((*COMPONENTS, ORIGINAL_MODEL))}, got "
            f"{', '.join(foreign[:3]) or 'none'}"
        )
    problems = Problems()
    tensors: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    alphas: dict[str, dict[str, float]] = defaultdict(dict)
    for name, found in parsed.items():
        assert found is not None
        component, rest = found
        path, _, leaf = rest.rpartition(".")
        key, tensor = PEFT_PREFIX + rest, checkpoint.load(name)
        if leaf == "alpha":
            if tensor.numel() != 1 or not tensor.isfinite().all() or not tensor.any():
                got = str(tensor.flatten()[:3].tolist())
                problems.add(name, "one finite number, not 0", got)
            elif text is not None:
                problems.add(name, "one place for alpha", f"{_CONFIG_KEY!r} in the metadata, too")
            else:
                alphas[component][path] = float(tensor)
            continue
        if key in tensors[component]:
            problems.add(name, "one tensor for this matrix", "a second one under another name")
        peft = parse_peft_key(key)
        if peft is None or (peft.part is None and leaf not in ("weight", "bias")):
            got = f"a tensor {list(tensor.shape)}"
            remedy = "other LyCORIS kinds must be merged with their own tools"
            problems.add(name, "lora_A, lora_B, alpha or a magnitude of a module", got, remedy)
        tensors[component][key] = tensor
    for component, found_alphas in alphas.items():
        modules = {
            parsed_key.module_path
            for key in tensors[component]
            if (parsed_key := parse_peft_key(key)) and parsed_key.part is Part.LORA_A
        }
        for path in sorted(found_alphas.keys() - modules):
            problems.add(f"{component}.{path}.alpha", "lora_A and lora_B beside it", "none")
        for path in sorted(modules - found_alphas.keys()):
            name = f"{component}.{path}.{Part.LORA_A.value}"
            problems.add(name, "an alpha beside it, as other modules have", "none", "add the rank")
    problems.raise_if_any(f"adapter {file} cannot be read")
    return {component: (found, alphas[component]) for component, found in tensors.items()}


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


def _component(path: str) -> str | None:
    head = path.partition(".")[0]
    return head if head in COMPONENTS else None


def _config(text: str, component: str, source: str) -> dict[str, Any]:
    document = parse_json_object(text, f"{source}: key {_CONFIG_KEY!r}")
    prefix = f"{component}."
    return {
        key.removeprefix(prefix): value for key, value in document.items() if key.startswith(prefix)
    }


def _config_of_tensors(
    tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Return the configuration that a file without one means: an alpha is its own or the rank."""
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    parts = set()
    for key, tensor in tensors.items():
        parsed = parse_peft_key(key)
        if parsed is None or parsed.part is None:
            continue
        parts.add(parsed.part)
        if parsed.part is Part.LORA_A and tensor.dim() > 1:
            pattern = re.escape(parsed.module_path)
            ranks[pattern] = int(tensor.shape[0])
            scales[pattern] = alphas.get(parsed.module_path, ranks[pattern])
    return {
        "rank_pattern": dict(_longest_first(ranks.items())),
        "alpha_pattern": dict(_longest_first(scales.items())),
        "use_dora": Part.MAGNITUDE in parts,
        "lora_bias": Part.LORA_B_BIAS in parts,
    }


def _longest_first(values: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Order patterns so that none is caught by a shorter one that ends alike."""
    return sorted(values, key=lambda entry: -len(entry[0]))


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
