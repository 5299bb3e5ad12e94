"""ONNX: export once with slots, then pack adapters for them."""

from converters.onnx.exporting import ExportOptions, export_base, export_torch_module
from converters.onnx.packing.adding import add_adapters
from converters.onnx.packing.pack import PackedAdapter, pack

__all__ = [
    "ExportOptions",
    "PackedAdapter",
    "add_adapters",
    "export_base",
    "export_torch_module",
    "pack",
]
