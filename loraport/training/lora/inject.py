"""Put LoRA layers into a model, take them out again, and read the adapter off them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraport.adapter import Adapter, LoraModule
from loraport.base.bitsandbytes_weights import dequantized_weight
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint, fingerprint
from loraport.option_checks import given_or_default
from loraport.scaling import RankAndAlpha
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.lora.targets import select_targets
from loraport.training.options import LoraOptions

_MARK = "_loraport_before"


@dataclass
class BeforeAttach:
    """What `detach` restores.

    Attributes:
        trainable: Names of the parameters that were trainable.
        replaced: Module path and name of a parameter or buffer → what stood there.
        loaded: What a loaded adapter has beside LoRA layers, which `adapter_of` writes as it was.
    """

    trainable: frozenset[str]
    replaced: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    loaded: Adapter = field(default_factory=lambda: Adapter({}))


def attach(model: nn.Module, options: LoraOptions | None = None) -> dict[str, LoraLayer]:
    """Freeze a model and put trainable LoRA layers beside the modules the options select.

    The model computes what it did before, since every ``B`` is zero. It is changed in place.

    Args:
        model: Any module; the base.
        options: What is adapted; defaults to rank 16 on all linear layers.

    Returns:
        Module path → LoRA layer.

    Raises:
        LoraportError: If the model already has LoRA layers or the selection fails.
    """
    options = given_or_default(options, LoraOptions)
    refuse_attached(model)
    layers = new_layers(model, options)
    freeze(model)
    insert(model, layers.values())
    return layers


def new_layers(model: nn.Module, options: LoraOptions) -> dict[str, LoraLayer]:
    """Return module path → a fresh LoRA layer for every module selected; the model stays as it is.

    Raises:
        LoraportError: If the selection fails.
    """
    targets = select_targets(model, options)
    ranks = RankAndAlpha(
        options.rank, options.effective_alpha, options.rank_pattern, options.alpha_pattern
    )
    generator = torch.Generator().manual_seed(options.seed)
    layers: dict[str, LoraLayer] = {}
    for path, layer_class in targets.items():
        layers[path] = layer_class(
            model.get_submodule(path),
            ranks.rank(path),
            ranks.alpha(path),
            use_rslora=options.use_rslora,
            dropout=options.dropout,
        )
        try:
            layers[path].reset(options.init, generator, use_dora=options.use_dora)
        except LoraportError as error:
            raise LoraportError(f"{path}: {error}") from None
    return layers


def refuse_attached(model: nn.Module) -> None:
    """Refuse a model that already has LoRA layers, and what is no model.

    Raises:
        LoraportError: If it has, or is none.
    """
    _require_module(model)
    if hasattr(model, _MARK):
        raise LoraportError(
            "the model: expected no LoRA layers, got some already; call detach(model) first"
        )


def freeze(model: nn.Module) -> BeforeAttach:
    """Freeze all parameters and remember what `detach` is to restore.

    Returns:
        The record; a caller that replaces parameters adds them to it.
    """
    named = list(model.named_parameters())
    before = BeforeAttach(frozenset(name for name, p in named if p.requires_grad))
    for _, parameter in named:
        parameter.requires_grad_(False)
    object.__setattr__(model, _MARK, before)
    return before


def insert(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Put layers in the place of the modules that are their ``base_layer``."""
    by_base = {id(layer.base_layer): layer for layer in layers}
    for parent in list(model.modules()):
        # Not named_children(): a module shared by several paths is replaced at each of them.
        for name, child in parent._modules.items():
            layer = by_base.get(id(child))
            if layer is None:
                continue
            parent._modules[name] = layer
            layer.train(parent.training)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # In evaluation mode torch computes such a layer from the weights of its
                # children without calling them, unless one of them has a hook.
                layer.register_forward_pre_hook(_do_nothing)


def detach(model: nn.Module) -> None:
    """Take all LoRA layers out: the very modules, parameters and flags from before come back.

    Raises:
        LoraportError: If the model has no LoRA layers.
    """
    before: BeforeAttach | None = getattr(model, _MARK, None)
    if before is None:
        raise LoraportError("the model: expected LoRA layers, got none; call attach(model) first")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LoraLayer):
                parent._modules[name] = child.base_layer
    for (path, name), parameter in before.replaced.items():
        setattr(model.get_submodule(path), name, parameter)
    unfreeze(model, before)


def unfreeze(model: nn.Module, before: BeforeAttach) -> None:
    """Undo `freeze`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before.trainable)
    object.__delattr__(model, _MARK)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return module path → LoRA layer, for all there are in a model.

    Raises:
        LoraportError: If it is no model.
    """
    _require_module(model)
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_of(
    model: nn.Module,
    *,
    base_model: Path | str | None = None,
    base_fingerprint: BaseFingerprint | None = None,
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Return the adapter that a model's LoRA layers hold, as copies on the CPU.

    What `load_into` fixed beside them (LoRA on parameters, replacements) is part of it, and may be
    all there is.

    Args:
        model: A model with LoRA layers, or with an adapter that was loaded into it.
        base_model: Name or path of the base, to be written down.
        base_fingerprint: The base's fingerprint where it is known; computed if not.
        training: Facts that do not change the maths, such as ``{"task_type": "CAUSAL_LM"}``.

    Raises:
        LoraportError: If there is no adapter, or its LoRA layers are not plain LoRA.
    """
    layers = lora_layers(model)
    before: BeforeAttach | None = getattr(model, _MARK, None)
    loaded = Adapter({}) if before is None else before.loaded
    if not (layers or loaded.modules or loaded.replacements):
        raise LoraportError("the model: expected LoRA layers, got none; call attach(model) first")
    for path, layer in layers.items():
        if layer.gain is not None or layer.extra_bias is not None:
            raise LoraportError(
                f"{path}: expected a layer that is trained here, got one loaded with a gain or "
                "bias of its own (DoRA, lora_bias); keep the adapter it was loaded from"
            )
    if base_fingerprint is None:
        base_fingerprint = fingerprint(layers, partial(_weight_of_base, model))
    trained = {path: lora_module(layer) for path, layer in layers.items()}
    return Adapter(
        modules={**trained, **loaded.modules},
        replacements=loaded.replacements,
        counters=loaded.counters,
        base_model=None if base_model is None else str(base_model),
        base_fingerprint=base_fingerprint,
        training=dict(training or {}),
    )


def _weight_of_base(model: nn.Module, path: str) -> torch.Tensor:
    """Return a module's weight, as it was before an adapter was loaded that stores it anew."""
    before: BeforeAttach | None = getattr(model, _MARK, None)
    replaced = None if before is None else before.replaced.get((path, "weight"))
    return dequantized_weight(model.get_submodule(path)) if replaced is None else replaced


def lora_module(layer: LoraLayer) -> LoraModule:
    """Return a LoRA layer's part of an adapter, as copies on the CPU.

    Where matrices are subtracted (PiSSA, OLoRA), the adapter has them beside those trained, and
    an alpha with which its scaling stays what it is.
    """
    a, b = (matrix.detach().cpu().clone() for matrix in layer.matrices())
    growth = len(a) / layer.rank
    return LoraModule(
        kind=layer.kind,
        lora_A=a,
        lora_B=b,
        alpha=layer.alpha * (math.sqrt(growth) if layer.use_rslora else growth),
        use_rslora=layer.use_rslora,
        fan_in_fan_out=layer.fan_in_fan_out,
        magnitude=None if layer.magnitude is None else layer.magnitude.detach().cpu().clone(),
    )


def _require_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise LoraportError(f"the model: expected a torch.nn.Module, got {type(model).__name__}")


def _do_nothing(*_: Any) -> None:
    """Serve as a hook whose presence is the point."""
