"""A constant of a graph: what is known of it at once, and its values when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that no input of the graph changes.

    Attributes:
        name: The initializer or node output it comes from; a part's, and what is put together of
            several, is its own.
        shape: Its shape.
        dtype: Its element type.
        array: Gives its values; of a large one as a view of the file.
        quantized: It is dequantized, so a rounding of what was exported.
        narrow: It is dequantized from numbers of 4 bits or fewer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    array: Callable[[], np.ndarray]
    quantized: bool = False
    narrow: bool = False


Look = Callable[[ir.Value | None], Constant | None]  # another constant that a rule needs
