"""ONNX: export once with slots, then pack adapters for them."""
