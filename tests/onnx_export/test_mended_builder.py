"""GenAI's builder is mended where it is the version that is meant, and refused otherwise."""

import importlib.metadata
import types

import pytest

from converters.onnx.exporters import mended_builder


def test_another_version_is_refused_and_named(monkeypatch):
    """It ended with a name of Python's that was not there. Control: nothing to mend."""
    names = {"onnxruntime_genai": ["onnxruntime-genai"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: names)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.9")
    parts = ("gemma_builder", "layer_rotations", "output_heads", "scaled_rotations")
    for part in parts:
        monkeypatch.setattr(getattr(mended_builder, part), "mend", lambda _: None)
    mended_builder.mend(types.ModuleType("builders"))
    monkeypatch.setattr(mended_builder.output_heads, "mend", lambda builders: builders.Model)
    with pytest.raises(SystemExit, match=r"version 0\.18, got onnxruntime-genai 0\.9 .*'Model'"):
        mended_builder.mend(types.ModuleType("builders"))
