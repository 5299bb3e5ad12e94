"""An adapter of a diffusion model as it was published, for a base in diffusers' layout."""

from __future__ import annotations

from dataclasses import replace

from converters.formats.format import FormatContext
from converters.formats.kohya_names import Target, modules_of_base
from loraport.adapter import Adapter, LoraModule
from loraport.errors import LoraportError, Problems
from loraport.naming.original_diffusion import flux_modules
from loraport.naming.original_wan import wan_name


def named_as_in_base(adapter: Adapter, context: FormatContext, source: str) -> Adapter:
    """Return an adapter with the names that the modules have in the base, where one is given.

    Modules that are fused in the original become several, each with its rows of B and all of A.
    Names that the base has itself, or that nobody knows, stay.

    Args:
        adapter: Its module paths may be those of the original model.
        context: Names the base, if anything does.
        source: The file, for messages.

    Raises:
        LoraportError: If the base cannot be read, a fused module has other rows than the base's
            parts have together, or two modules are one in the base.
    """
    if context.base is None:
        return adapter
    known = modules_of_base("unet", context)
    problems = Problems()
    modules: dict[str, LoraModule] = {}
    for path, module in adapter.modules.items():
        try:
            targets = known.targets(path.replace(".", "_"))
        except LoraportError:
            targets = [Target(path)]
        for target in [Target(path)] if path in known.rows else targets:
            if target.path in modules:
                problems.add(path, f"one module for {target.path}", "a second one")
            elif target.rows is not None and module.lora_B.shape[0] != target.total:
                got = str(list(module.lora_B.shape))
                problems.add(path, f"lora_B of {target.total} rows", got, "give its own --base")
            else:
                modules[target.path] = _part(module, target)
    problems.raise_if_any(f"adapter {source} cannot be read")
    return replace(adapter, modules=modules)


def original_model(module_path: str) -> str | None:
    """Return whose transformer a path is of, as its authors named it: Flux's or Wan's.

    >>> original_model("double_blocks.0.img_attn.qkv"), original_model("proj_out")
    ('Flux', None)
    """
    flat = module_path.replace(".", "_")
    if flux_modules(flat) is not None:
        return "Flux"
    return "Wan" if wan_name(flat) is not None else None


def _part(module: LoraModule, target: Target) -> LoraModule:
    if target.rows is None:
        return module
    rows = slice(target.first_row, target.first_row + target.rows)
    turned = target.rows // 2 if target.halves_swapped else 0
    b, magnitude, bias = (
        None if tensor is None else tensor[rows].roll(turned, 0)
        for tensor in (module.lora_B, module.magnitude, module.lora_B_bias)
    )
    assert b is not None
    return replace(module, lora_B=b, magnitude=magnitude, lora_B_bias=bias)
