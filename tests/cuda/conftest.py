"""Everything here needs an NVIDIA GPU, and ONNX Runtime with its CUDA provider."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what is in this folder, and skip it where there is no GPU."""
    reason = _missing()
    for item in items:
        if "/cuda/" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.cuda)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime without its CUDA provider: install onnxruntime-gpu"
    return ""
