"""sd-scripts' (kohya's) safetensors file, which most diffusion tools load.

Per module ``lora_down`` (A), ``lora_up`` (B), a scalar ``alpha`` (missing: the rank) and DoRA's
``dora_scale`` ``[out, 1]``. The scaling is ``alpha / r`` for each module, so nothing is folded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.formats.assembly import FoundTensor, assemble, check_values, shape_text
from converters.formats.base_facts import component_class
from converters.formats.carried import CARRIED_KEY, Carried, carried_json, read_carried, restore
from converters.formats.features import Feature, cannot_hold
from converters.formats.format import AdapterFormat, FormatContext
from converters.formats.kohya_names import Target, find_targets, known_modules
from loraport.adapter import Adapter, LoraModule
from loraport.base.checkpoint import Checkpoint, read_header
from loraport.counts import counted
from loraport.errors import LoraportError, Problems
from loraport.naming.kohya import (
    COMPONENTS,
    flattened,
    in_pipeline,
    kohya_key,
    kohya_names,
    parse_kohya_key,
    without_prefix,
)
from loraport.naming.original_diffusion import is_transformer_path
from loraport.naming.original_wan import published_wan_names
from loraport.output import new_file
from loraport.safetensors_file import write_safetensors
from loraport.scaling import alpha_for

if TYPE_CHECKING:
    import torch

_HOLDS = frozenset({Feature.CONV, Feature.DORA})
_GIVE_BASE = "give --base with the model (or the pipeline's directory) it was trained on"


def detect(path: Path) -> bool:
    """Tell whether ``path`` is a safetensors file with names like sd-scripts'."""
    if not path.is_file():
        return False
    try:
        tensors, _ = read_header(path)
    except LoraportError:
        return path.suffix == ".safetensors"  # damaged: reading it says how
    return any(parse_kohya_key(name) for name in tensors)


def read(path: Path, context: FormatContext) -> Adapter:
    """Read a file of sd-scripts.

    Raises:
        LoraportError: All problems of the file at once.
    """
    checkpoint = Checkpoint(path)
    carried = read_carried(checkpoint.metadata.get(CARRIED_KEY), str(path))
    problems = Problems()
    found: dict[str, dict[str, FoundTensor]] = defaultdict(dict)
    for name in checkpoint:
        tensor = checkpoint.load(name)
        check_values(name, tensor, problems)
        parsed = parse_kohya_key(name)
        if parsed is None:
            problems.add(
                name,
                "lora_down, lora_up, alpha or dora_scale of a lora_unet_ or lora_te_ module",
                f"a tensor {list(tensor.shape)}",
                "other LyCORIS kinds must be merged with their own tools",
            )
            continue
        found[parsed[0]][parsed[1]] = FoundTensor(name, tensor)
    modules: dict[str, LoraModule] = {}
    for kohya_name, target in _targets(list(found), carried, context, problems):
        if target.path in modules:
            problems.add(kohya_name, f"one module for {target.path}", "a second one")
            continue
        parts = _rows_of(found[kohya_name], target, problems)
        module = None if parts is None else _module(target.path, parts, problems)
        if module is not None:
            modules[target.path] = module
    if not found:
        problems.add(str(path), "adapter tensors", "none")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return restore(Adapter(modules), carried)


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write a file that sd-scripts and diffusers load.

    Raises:
        LoraportError: If the format cannot hold the adapter, naming everything it cannot, or
            ``path`` exists.
    """
    import torch

    problems = cannot_hold(adapter, _HOLDS, FORMAT.name)
    paths = list(adapter.modules)
    component = None if in_pipeline(paths) else _component(paths, adapter, context)
    for module_path in paths:
        if is_transformer_path(module_path):
            problems.add(
                module_path,
                "a module that sd-scripts has by itself",
                "one of a diffusion transformer, which it trains with other modules fused",
                "choose --to diffusers",
            )
    several = component is None and any(path.startswith("text_encoder_2.") for path in paths)
    names = kohya_names(paths, component, several=several)
    published = published_wan_names(without_prefix(name) for name in names.values())
    for module_path, name in names.items() if published else ():
        own = without_prefix(name)
        names[module_path] = name.removesuffix(own) + published[own]
    for group in flattened(names.values()).values():
        if len(group) > 1:
            clashing = [path for path in paths if names[path] in group]
            problems.add(", ".join(clashing), "names that differ in more than dots", group[0])
    tensors: dict[str, torch.Tensor] = {}
    for module_path, module in adapter.modules.items():
        name = names[module_path]
        alpha = torch.tensor(alpha_for(module.rank, module.scaling), dtype=torch.float32)
        fields = {"lora_A": module.lora_A, "lora_B": module.lora_B, "alpha": alpha}
        if module.magnitude is not None:
            trailing = [1] * (module.lora_B.dim() - 1)
            fields["magnitude"] = module.magnitude.reshape(-1, *trailing)
        for field, tensor in fields.items():
            tensors[kohya_key(name, field)] = tensor.detach().cpu().contiguous()
    if not adapter.modules:
        problems.add("the adapter", "LoRA modules", "none")
    problems.raise_if_any(f"{FORMAT.name} cannot hold this adapter")
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    metadata[CARRIED_KEY] = carried_json(adapter)
    with new_file(path, force=context.force) as partial:
        write_safetensors(tensors, partial, metadata)


def _module(path: str, found: dict[str, FoundTensor], problems: Problems) -> LoraModule | None:
    alpha = found.pop("alpha", None)
    if not found:
        problems.add(path, "lora_down and lora_up beside alpha", "no such tensors")
        return None
    if alpha is not None and (alpha.tensor.numel() != 1 or not alpha.tensor.any()):
        problems.add(alpha.name, "one number, not 0", f"{alpha.tensor.flatten()[:3].tolist()}")
        return None
    magnitude = found.get("magnitude")
    if magnitude is not None:
        shape = tuple(magnitude.tensor.shape)
        if shape[1:] != (1,) * (len(shape) - 1):
            problems.add(
                magnitude.name,
                "one magnitude per output, [out, 1]",
                str(list(shape)),
                "it normalises the other axis; merge it with its own tool",
            )
            return None
        found["magnitude"] = FoundTensor(magnitude.name, magnitude.tensor.flatten())
    return assemble(path, found, problems, alpha=None if alpha is None else float(alpha.tensor))


def _targets(
    names: list[str], carried: Carried, context: FormatContext, problems: Problems
) -> Iterator[tuple[str, Target]]:
    """Yield sd-scripts' names and the modules they stand for."""
    known = known_modules(names, list(carried.modules), context)
    if not known and names:
        problems.add(
            f"the names of {counted(len(names), 'module')}",
            "a list of modules, to tell dots from underscores",
            "none",
            _GIVE_BASE,
        )
        return
    for name in names:
        try:
            targets = find_targets(name, known)
        except LoraportError as error:
            problems.add(name, "one module of the base by this name", str(error), _GIVE_BASE)
            continue
        for target in targets:
            yield name, target


def _rows_of(
    found: Mapping[str, FoundTensor], target: Target, problems: Problems
) -> dict[str, FoundTensor] | None:
    """Return the tensors of one target: the rows of B that are its own, and all of A."""
    parts = dict(found)
    if target.rows is None:
        return parts
    for field in ("lora_B", "magnitude"):
        if field not in parts:
            continue
        name, tensor = parts[field].name, parts[field].tensor
        if tensor.dim() < 1 or tensor.shape[0] != target.total:
            problems.add(name, f"{target.total} rows", shape_text(tensor), _GIVE_BASE)
            return None
        own = tensor[target.first_row : target.first_row + target.rows]
        if target.halves_swapped:
            own = own.roll(target.rows // 2, 0)
        parts[field] = FoundTensor(name, own)
    return parts


def _component(paths: list[str], adapter: Adapter, context: FormatContext) -> str:
    directory = context.base_directory(adapter.base_model)
    kind = component_class(directory) if directory is not None else ""
    is_text = kind.startswith("CLIPText") or all(path.startswith("text_model.") for path in paths)
    return COMPONENTS[1] if is_text else COMPONENTS[0]


FORMAT = AdapterFormat(
    name="kohya",
    summary="sd-scripts' (kohya's) safetensors file",
    holds=_HOLDS,
    detect=detect,
    read=read,
    write=write,
)
