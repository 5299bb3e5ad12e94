"""Run a bundle with ONNX Runtime and swap its adapters."""

from loraport.runtime.generation import Sampling, generate
from loraport.runtime.lane import Lane
from loraport.runtime.model import Runtime, Selection
from loraport.runtime.text import TextGenerator

__all__ = ["Lane", "Runtime", "Sampling", "Selection", "TextGenerator", "generate"]
