"""diffusers' directory: PEFT's tensors under a pipeline component's name.

Keys read ``unet.<module path>.lora_A.weight``; the configuration stands in the metadata of the
safetensors file, each key with the component's name before it. Files without it (older ones)
have alpha equal to the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.formats.base_facts import component_class
from converters.formats.carried import CARRIED_KEY, carried_json, read_carried, restore
from converters.formats.features import Feature, cannot_hold
from converters.formats.format import AdapterFormat, FormatContext
from converters.formats.json_object import parse_json_object
from loraport.adapter import Adapter
from loraport.checkpoint import Checkpoint, read_header
from loraport.errors import LoraportError
from loraport.naming import PEFT_PREFIX, Part, parse_peft_key
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
    """Read the adapter of the one component that a directory or file of diffusers holds.

    Raises:
        LoraportError: All problems of the file at once.
    """
    file = _file(path)
    checkpoint = Checkpoint(file)
    components = {_component(name) for name in checkpoint}
    if len(components) != 1 or None in components:
        raise LoraportError(
            f"adapter {file}: expected keys of one component ({', '.join(_COMPONENTS)}), got "
            f"{', '.join(sorted(str(name) for name in components)) or 'none'}; save each alone"
        )
    component = str(components.pop())
    tensors = {_peft(name, component): checkpoint.load(name) for name in checkpoint}
    text = checkpoint.metadata.get(_CONFIG_KEY)
    config = _ranks_as_alphas(tensors) if text is None else _config(text, component, str(file))
    adapter = adapter_of_contents(parse_config(config, str(file)), tensors, None, file)
    return restore(adapter, read_carried(checkpoint.metadata.get(CARRIED_KEY), str(file)))


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
    config, tensors = peft_contents(adapter)
    component = _component_of_base(adapter, context)
    metadata = {
        "format": "pt",
        _CONFIG_KEY: json.dumps({f"{component}.{key}": value for key, value in config.items()}),
        CARRIED_KEY: carried_json(adapter),
    }
    renamed = {
        f"{component}.{key.removeprefix(PEFT_PREFIX)}": tensor.detach().cpu().contiguous()
        for key, tensor in tensors.items()
    }
    with new_directory(path, force=context.force) as partial:
        write_safetensors(renamed, partial / WEIGHTS_FILE, metadata)


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
    return "transformer" if "Transformer" in kind else "unet"


FORMAT = AdapterFormat(
    name="diffusers",
    summary=f"diffusers' directory ({WEIGHTS_FILE})",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
