"""Everything here needs an NVIDIA GPU; all but training ONNX Runtime with its CUDA provider."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what is in this folder, and skip it where there is no GPU."""
    for item in items:
        if "/cuda/" not in item.path.as_posix():
            continue
        item.add_marker(pytest.mark.cuda)
        reason = _missing(runtime=item.path.name != "test_training.py")
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing(*, runtime: bool) -> str:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    if not runtime:
        return ""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime without its CUDA provider: install onnxruntime-gpu"
    return ""
