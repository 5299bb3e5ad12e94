"""Put an existing adapter into a PyTorch model, whatever its variant and origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement, require_adapter
from loraport.base.loading import fingerprint_model
from loraport.base.stored_tensors import stored_tensor
from loraport.errors import Problems
from loraport.parity.changes import ties_of_inputs
from loraport.training.lora.inject import BeforeAttach, freeze, insert, refuse_attached
from loraport.training.lora.layers import lora_layer_for
from loraport.training.lora.lora_layer import LoraLayer
from loraport.variants import lower


def load_into(model: nn.Module, adapter: Adapter) -> dict[str, LoraLayer]:
    """Make a model compute what it does with an adapter; `detach` undoes it.

    Plain LoRA layers are trainable afterwards, as after `attach`. What a variant adds to the
    canonical form (a gain, a bias) and whole-tensor replacements are fixed, and so is LoRA on
    parameters (PEFT's ``target_parameters``, fused experts above all), which is added to them:
    each is in memory twice until `detach`.

    Args:
        model: The base, in any dtype and on any device; changed in place.
        adapter: From any reader.

    Returns:
        Module path → LoRA layer.

    Raises:
        LoraportError: If the adapter does not fit the model or belongs to another base; all
            problems at once, and the model is left as it was.
    """
    require_adapter(adapter)
    refuse_attached(model)
    problems = Problems()
    layers: dict[str, LoraLayer] = {}
    bare: dict[str, LoraModule] = {}
    for path, module in adapter.modules.items():
        if module.kind is ModuleKind.EXPERTS:
            bare[path] = module
            _check_parameter(model, path, module, problems)
            continue
        layer = _layer(model, path, module, problems)
        if layer is not None:
            layers[path] = layer
    for parameter, replacement in adapter.replacements.items():
        _check_replacement(model, parameter, replacement, problems)
    problems.raise_if_any("the adapter does not fit the model")
    if adapter.base_fingerprint is not None:
        paths = [path for path in adapter.base_fingerprint.modules if path in layers]
        adapter.base_fingerprint.require_same_base(
            fingerprint_model(model, paths), "the adapter", "the model"
        )
    before = freeze(model)
    before.loaded = replace(adapter, modules=bare)
    ties = ties_of_inputs(model)
    for parameter, replacement in adapter.replacements.items():
        # PEFT lets trained tokens act wherever the input embedding's weight is used.
        others = () if replacement.rows is None else ties.get(parameter, ())
        _replace(model, (parameter, *others), replacement, before)
    # After the replacements, since a variant may look at the weight it refines.
    for path, layer in layers.items():
        _refine(layer, adapter.modules[path])
    for parameter, module in bare.items():
        adapted = Replacement(_adapted(model, parameter, module))
        _replace(model, (parameter,), adapted, before)
    insert(model, layers.values())
    return layers


def _layer(model: nn.Module, path: str, module: LoraModule, problems: Problems) -> LoraLayer | None:
    try:
        base = model.get_submodule(path)
    except AttributeError:
        remedy = "the adapter is for another architecture, or the path has a prefix too many"
        problems.add(path, "a module of the model", "no such module", remedy)
        return None
    layer_class = lora_layer_for(base)
    if isinstance(layer_class, str) or layer_class.kind is not module.kind:
        found = layer_class if isinstance(layer_class, str) else f"a {type(base).__name__}"
        problems.add(path, f"a module of kind {module.kind}", found)
        return None
    layer = layer_class(base, module.rank, module.alpha, use_rslora=module.use_rslora)
    for name in ("lora_A", "lora_B"):
        parameter, tensor = getattr(layer, name), getattr(module, name)
        if parameter.shape != tensor.shape:
            problems.add(f"{path} {name}", str(list(parameter.shape)), str(list(tensor.shape)))
            return None
        with torch.no_grad():
            parameter.copy_(tensor)
    return layer


def _check_parameter(model: nn.Module, name: str, module: LoraModule, problems: Problems) -> None:
    try:
        parameter = stored_tensor(model, name)
    except AttributeError:
        remedy = "the adapter is for another architecture, or the path has a prefix too many"
        problems.add(name, "a parameter of the model", "no such parameter", remedy)
        return
    if not parameter.is_floating_point():
        problems.add(name, "a parameter of floats", str(parameter.dtype), "load it unquantized")
        return
    without_numbers = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    expected = list(_parameter_update(model, name, module, without_numbers).shape)
    if list(parameter.shape) != expected:
        problems.add(name, str(expected), str(list(parameter.shape)))


def _parameter_update(
    model: nn.Module, name: str, module: LoraModule, parameter: torch.Tensor
) -> torch.Tensor:
    """Return what LoRA adds to a parameter, ``[out, in]``, or as much for each expert.

    Experts are ``[in, out]`` where their module says so (``is_transposed``), as PEFT has it.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    a = module.lora_A.to(parameter.device, dtype)  # [experts * r, in]
    b = module.lora_B.to(parameter.device, dtype)  # [out, r * experts]
    if module.experts == 1 and parameter.dim() == 2:
        return module.scaling * (b @ a)
    a = a.reshape(module.experts, module.rank, -1)
    b = b.reshape(len(b), module.rank, module.experts)
    turned = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
    return module.scaling * torch.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a)


def _adapted(model: nn.Module, name: str, module: LoraModule) -> torch.Tensor:
    parameter = stored_tensor(model, name).detach()
    return _parameter_update(model, name, module, parameter).add_(parameter)


def _refine(layer: LoraLayer, module: LoraModule) -> None:
    """Set what the canonical form has beyond low rank."""
    weight = layer.base_layer.weight
    assert isinstance(weight, torch.Tensor)
    update = lower(replace(module, fan_in_fan_out=layer.fan_in_fan_out), weight.detach().cpu())
    device, dtype = layer.lora_A.device, layer.lora_A.dtype
    if update.gain is not None:
        # The gain was computed from these very matrices: they are fixed with it.
        layer.gain = update.gain.to(device, dtype)
        layer.requires_grad_(False)
    if update.bias is not None:
        layer.extra_bias = update.bias.to(device, dtype)


def _check_replacement(
    model: nn.Module, name: str, replacement: Replacement, problems: Problems
) -> None:
    try:
        parameter = stored_tensor(model, name)
    except AttributeError:
        problems.add(name, "a parameter of the model", "no such parameter")
        return
    expected = tuple(parameter.shape)
    if replacement.rows is not None:
        expected = (len(replacement.rows), *expected[1:])
        if any(row >= parameter.shape[0] for row in replacement.rows):
            problems.add(name, f"rows below {parameter.shape[0]}", f"row {max(replacement.rows)}")
            return
    if tuple(replacement.tensor.shape) != expected:
        problems.add(name, str(list(expected)), str(list(replacement.tensor.shape)))


def _replace(
    model: nn.Module, holders: Sequence[str], replacement: Replacement, before: BeforeAttach
) -> None:
    """Put one new tensor in the place of the one that stands under several paths."""
    old = stored_tensor(model, holders[0])
    tensor = replacement.tensor.to(old.device, old.dtype)
    whole = tensor.clone() if replacement.rows is None else old.detach().clone()
    if replacement.rows is not None:
        whole[list(replacement.rows)] = tensor
    new = nn.Parameter(whole, requires_grad=False) if isinstance(old, nn.Parameter) else whole
    for holder in holders:
        path, _, leaf = holder.rpartition(".")
        before.replaced.setdefault((path, leaf), old)  # what came first, of several
        setattr(model.get_submodule(path), leaf, new)
