"""ONNX: export once with slots, then pack adapters for them.

What is named here is imported when it is first asked for: a part of it, such as the quantizers'
process, begins without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.onnx.exporting import ExportOptions, export_base, export_torch_module
    from converters.onnx.packing.adding import add_adapters
    from converters.onnx.packing.pack import PackedAdapter, pack
    from converters.onnx.slots.inserting import SlotOptions

__all__ = [
    "ExportOptions",
    "PackedAdapter",
    "SlotOptions",
    "add_adapters",
    "export_base",
    "export_torch_module",
    "pack",
]

_PLACES = {
    "ExportOptions": "exporting",
    "PackedAdapter": "packing.pack",
    "SlotOptions": "slots.inserting",
    "add_adapters": "packing.adding",
    "export_base": "exporting",
    "export_torch_module": "exporting",
    "pack": "packing.pack",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
