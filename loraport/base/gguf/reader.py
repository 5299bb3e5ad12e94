"""gguf's reader, kept from running past the end of a damaged file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any


def bounded_reader(file: Path) -> Any:
    """Return gguf's reader of a file, which stops at the file's end.

    Raises:
        ValueError: If a length in it goes beyond its end, two tensors lie in one place, or
            a tensor has a type that gguf does not know.
    """
    import gguf
    import numpy as np

    class BoundedReader(gguf.GGUFReader):  # type: ignore[misc]  # gguf is untyped
        """Refuses to read past the end, where gguf 0.19 goes on for as long as a count says."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)  # slicing a memmap takes many times as long

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            end = int(offset) + int(count) * np.dtype(dtype).itemsize
            if end > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data)}, its header asks for {end}")
            return super()._get(offset, dtype, count, *rest, **named)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            known = {int(kind) for kind in gguf.GGMLQuantizationType}
            for field in fields:
                name, number = bytes(field.parts[1]).decode(), int(field.parts[4][0])
                if number not in known:
                    raise ValueError(
                        f"{name}: expected a type that the installed gguf package knows, got "
                        f"number {number}; update gguf, or use another file of the model"
                    )
            super()._build_tensors(start_offs, fields)

    reader = BoundedReader(file)
    in_order = sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset))
    for tensor, following in itertools.pairwise(in_order):
        end, begin = int(tensor.data_offset + tensor.n_bytes), int(following.data_offset)
        if begin < end:
            raise ValueError(
                f"{tensor.name} ends at byte {end}, {following.name} begins at byte {begin}"
            )
    return reader
