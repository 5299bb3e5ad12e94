"""sd-scripts' (kohya's) names: ``lora_unet_down_blocks_0_..._to_q.lora_down.weight``.

Dots become underscores, so a name gives back its module path only with the list of modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

# Component of a diffusion pipeline → the prefixes sd-scripts gives its modules; it writes the
# first, except where a pipeline has a second text encoder.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
COMPONENTS = tuple(_PREFIXES)

_PARTS = {
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "alpha": "alpha",
    "dora_scale": "magnitude",
}


def kohya_names(
    module_paths: Iterable[str], component: str | None, *, several: bool = False
) -> dict[str, str]:
    """Return module path → sd-scripts' name of the module.

    Args:
        module_paths: Paths in the component, or in the pipeline (``unet.down_blocks...``) where
            ``component`` is ``None``.
        component: The pipeline's component that the paths belong to.
        several: The pipeline has a second text encoder, so the first is numbered too.

    >>> kohya_names(["text_encoder.text_model.encoder"], None)
    {'text_encoder.text_model.encoder': 'lora_te_text_model_encoder'}
    """
    names = {}
    for path in module_paths:
        head, _, rest = path.partition(".") if component is None else (component, "", path)
        prefix = _PREFIXES[head][-1 if several else 0]
        names[path] = f"{prefix}_{rest.replace('.', '_')}"
    return names


def component_of(kohya_name: str) -> str | None:
    """Return the component that a name belongs to.

    >>> component_of("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    'text_encoder'
    """
    for component, prefixes in _PREFIXES.items():
        if any(kohya_name.startswith(prefix + "_") for prefix in prefixes):
            return component
    return None


def in_pipeline(module_paths: Iterable[str]) -> bool:
    """Tell whether all paths start with a pipeline's component."""
    return all(path.partition(".")[0] in COMPONENTS for path in module_paths)


def flattened(module_paths: Iterable[str]) -> dict[str, list[str]]:
    """Return path with underscores for dots → the paths that look so; several are ambiguous."""
    by_flat: dict[str, list[str]] = defaultdict(list)
    for path in module_paths:
        by_flat[path.replace(".", "_")].append(path)
    return by_flat


def without_prefix(kohya_name: str) -> str:
    """Return a name without its component's prefix."""
    component = component_of(kohya_name)
    prefixes = _PREFIXES[component] if component else ()
    for prefix in prefixes:
        if kohya_name.startswith(prefix + "_"):
            return kohya_name.removeprefix(prefix + "_")
    return kohya_name


def kohya_key(kohya_name: str, field: str) -> str:
    """Return the tensor name of a module's ``lora_A``, ``lora_B``, ``alpha`` or ``magnitude``."""
    suffix = next(suffix for suffix, part in _PARTS.items() if part == field)
    return f"{kohya_name}.{suffix}"


def parse_kohya_key(key: str) -> tuple[str, str] | None:
    """Split a tensor name into sd-scripts' module name and the field.

    >>> parse_kohya_key("lora_unet_conv_in.lora_up.weight")
    ('lora_unet_conv_in', 'lora_B')
    """
    name, _, suffix = key.partition(".")
    part = _PARTS.get(suffix)
    return (name, part) if part and component_of(name) else None
