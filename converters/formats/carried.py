"""What a format has no words for, carried along as JSON in its free metadata.

Readers of the format ignore it; `restore` uses it to give back the adapter's own alpha, rank
and names. It never overrules the format: a scaling that the file itself contradicts is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.json_object import parse_json_object
from loraport.scaling import alpha_for, lora_scaling

CARRIED_KEY = "loraport"
_AGREES = 1e-6  # formats store scales as float32: half a unit in the last place is 6e-8


@dataclass(frozen=True)
class CarriedModule:
    """Facts about one module.

    Attributes:
        rank: Its own rank, where the format pads.
        alpha: ``lora_alpha``.
        use_rslora: Rank-stabilised scaling.
        fan_in_fan_out: The base weight is stored ``[in, out]``.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class Carried:
    """All that is carried.

    Attributes:
        modules: Module path → its facts.
        base_model: Name or path of the base.
        base_fingerprint: Content hashes of the base.
        training: Facts that do not change the maths.
        format_facts: What the one format needs to read its own file without the base.
    """

    modules: Mapping[str, CarriedModule] = field(default_factory=dict)
    base_model: str | None = None
    base_fingerprint: BaseFingerprint | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    format_facts: Mapping[str, Any] = field(default_factory=dict)


def carried_json(adapter: Adapter, format_facts: Mapping[str, Any] | None = None) -> str:
    """Return the text to store beside an adapter's tensors."""
    fingerprint = adapter.base_fingerprint
    return json.dumps(
        {
            "modules": {
                path: {
                    "rank": module.rank,
                    "alpha": module.alpha,
                    "use_rslora": module.use_rslora,
                    "fan_in_fan_out": module.fan_in_fan_out,
                }
                for path, module in adapter.modules.items()
            },
            "base_model": adapter.base_model,
            "base_fingerprint": None if fingerprint is None else fingerprint.to_json(),
            "training": dict(adapter.training),
            "format": dict(format_facts or {}),
        },
        default=str,
    )


def read_carried(text: str | None, source: str) -> Carried:
    """Read what `carried_json` wrote; nothing is carried where there is no text.

    Raises:
        LoraportError: If the text is something else.
    """
    if text is None:
        return Carried()
    document = parse_json_object(text, f"{source}: key {CARRIED_KEY!r}")
    try:
        fingerprint = document.get("base_fingerprint")
        base_model = document.get("base_model")
        return Carried(
            modules={
                str(path): _carried_module(entry) for path, entry in document["modules"].items()
            },
            base_model=None if base_model is None else str(base_model),
            base_fingerprint=None
            if fingerprint is None
            else BaseFingerprint.from_json(fingerprint),
            training=dict(document.get("training") or {}),
            format_facts=dict(document.get("format") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LoraportError(
            f"{source}: key {CARRIED_KEY!r}: expected what loraport writes there, got {error!r}; "
            "delete it and give --base instead"
        ) from error


def restore(adapter: Adapter, carried: Carried) -> Adapter:
    """Return the adapter with the carried facts wherever its file does not contradict them."""
    return replace(
        adapter,
        modules={
            path: _restored(module, carried.modules[path]) if path in carried.modules else module
            for path, module in adapter.modules.items()
        },
        base_model=adapter.base_model or carried.base_model,
        base_fingerprint=adapter.base_fingerprint or carried.base_fingerprint,
        training={**carried.training, **adapter.training},
    )


def _carried_module(entry: Mapping[str, Any]) -> CarriedModule:
    return CarriedModule(
        rank=int(entry["rank"]),
        alpha=float(entry["alpha"]),
        use_rslora=bool(entry["use_rslora"]),
        fan_in_fan_out=bool(entry["fan_in_fan_out"]),
    )


def _restored(module: LoraModule, known: CarriedModule) -> LoraModule:
    scaling = module.scaling
    if 0 < known.rank < module.rank and _only_padding_beyond(known.rank, module):
        module = replace(
            module,
            lora_A=module.lora_A[: known.rank].contiguous(),
            lora_B=module.lora_B[:, : known.rank].contiguous(),
            alpha=alpha_for(known.rank, scaling),
        )
    if module.kind is ModuleKind.LINEAR:
        module = replace(module, fan_in_fan_out=known.fan_in_fan_out)
    if known.rank != module.rank or not math.isfinite(known.alpha):
        return module
    claimed = lora_scaling(known.rank, known.alpha, use_rslora=known.use_rslora)
    if math.isclose(claimed, scaling, rel_tol=_AGREES):
        module = replace(module, alpha=known.alpha, use_rslora=known.use_rslora)
    return module


def _only_padding_beyond(rank: int, module: LoraModule) -> bool:
    return not module.lora_A[rank:].any() and not module.lora_B[:, rank:].any()
