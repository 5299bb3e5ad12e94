"""Run a bundle with ONNX Runtime and swap its adapters."""
