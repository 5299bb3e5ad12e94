"""sd-scripts' (kohya's) safetensors file, which most diffusion tools load.

Per module ``lora_down`` (A), ``lora_up`` (B), a scalar ``alpha`` (missing: the rank) and DoRA's
``dora_scale`` ``[out, 1]``. The scaling is ``alpha / r`` for each module, so nothing is folded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.formats.assembly import FoundTensor, assemble, check_values
from converters.formats.base_facts import component_class, module_paths
from converters.formats.carried import CARRIED_KEY, Carried, carried_json, read_carried, restore
from converters.formats.features import Feature, cannot_hold
from converters.formats.format import AdapterFormat, FormatContext
from loraport.adapter import Adapter, LoraModule
from loraport.checkpoint import Checkpoint, read_header
from loraport.errors import LoraportError, Problems
from loraport.naming.kohya import (
    COMPONENTS,
    component_of,
    flattened,
    in_pipeline,
    kohya_key,
    kohya_names,
    parse_kohya_key,
    without_prefix,
)
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
    paths = _paths(found, carried, context, problems)
    modules = {}
    for kohya_name, module_path in paths.items():
        module = _module(module_path, dict(found[kohya_name]), problems)
        if module is not None:
            modules[module_path] = module
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
    several = component is None and any(path.startswith("text_encoder_2.") for path in paths)
    names = kohya_names(paths, component, several=several)
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
        found["magnitude"] = FoundTensor(magnitude.name, _as_peft_shapes_it(found, magnitude))
    return assemble(path, found, problems, alpha=None if alpha is None else float(alpha.tensor))


def _as_peft_shapes_it(found: Mapping[str, FoundTensor], magnitude: FoundTensor) -> torch.Tensor:
    """Return DoRA's magnitude ``[out]``, a convolution's ``[1, out, 1, ...]``."""
    lora_a = found.get("lora_A")
    flat = magnitude.tensor.flatten()
    if lora_a is None or lora_a.tensor.dim() <= 2:
        return flat
    return flat.reshape(1, -1, *[1] * (lora_a.tensor.dim() - 2))


def _paths(
    names: Mapping[str, object], carried: Carried, context: FormatContext, problems: Problems
) -> dict[str, str]:
    """Return sd-scripts' name → module path; with the component where the file has several."""
    components = {component_of(name) for name in names}
    known = _known_paths(components, carried, context)
    if not known and names:
        problems.add(
            f"the names of {len(names)} modules",
            "a list of modules, to tell dots from underscores",
            "none",
            _GIVE_BASE,
        )
        return {}
    paths = {}
    for name in names:
        component = component_of(name)
        candidates = known.get(component, {}).get(without_prefix(name), [])
        if len(candidates) != 1:
            got = f"several: {', '.join(candidates)}" if candidates else "none"
            problems.add(name, "one module of the base by this name", got, _GIVE_BASE)
            continue
        paths[name] = f"{component}.{candidates[0]}" if len(components) > 1 else candidates[0]
    return paths


def _known_paths(
    components: set[str | None], carried: Carried, context: FormatContext
) -> dict[str | None, dict[str, list[str]]]:
    """Return, for each component, flattened path → paths, from the base or from the file."""
    if context.base is not None:
        root = Path(context.base)
        known: dict[str | None, dict[str, list[str]]] = {}
        for component in components:
            inside = root / str(component)
            directory = inside if (root / "model_index.json").is_file() else None
            directory = directory or context.base_directory()
            if directory is not None and directory.is_dir():
                known[component] = flattened(module_paths(directory))
        return known
    paths = list(carried.modules)
    if len(components) < 2 or not in_pipeline(paths):
        return {component: flattened(paths) for component in components} if paths else {}
    return {
        component: flattened(
            path.removeprefix(f"{component}.") for path in paths if path.startswith(f"{component}.")
        )
        for component in components
    }


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
