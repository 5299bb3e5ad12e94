"""Parity: the same numbers from PyTorch and from ONNX Runtime."""
