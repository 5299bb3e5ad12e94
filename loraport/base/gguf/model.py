"""A language model in a GGUF file, weight by weight, under transformers' names.

transformers knows how llama.cpp names, permutes and splits each architecture's weights, and loads
them all at once. Here its rules are asked what becomes of row numbers instead of rows: where
the answer is row numbers again, any stretch of a weight can be read and dequantized by itself.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.base.gguf.reader import bounded_reader
from loraport.base.gguf.settings import (
    FREQUENCY_FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    unread_settings,
)
from loraport.errors import LoraportError, Problems

if TYPE_CHECKING:
    import numpy as np

_STRETCH = 1 << 22  # elements dequantized together: 16 MiB
_SMALL = 1 << 16  # elements up to which a weight is loaded whole
# Tables of the rotation, which transformers computes from the configuration.
_TABLES = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)


@dataclass(frozen=True, eq=False)
class GgufWeight:
    """Where the values of one weight lie in the file.

    Attributes:
        name: Its name in transformers' model.
        shape: Its shape there.
        parts: Names of the file's tensors that it is made of.
        rows: For each of its rows, the number of the row in the file's tensors laid one under
            the other; ``None`` where it is made in another way.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    rows: np.ndarray | None

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.shape[-1] if self.shape else 1


class GgufModel:
    """A GGUF file seen as a transformers model.

    Args:
        file: The file.

    Raises:
        LoraportError: If it is damaged, transformers does not know its architecture, or weights
            of the model are missing; all of them at once.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with _damage(file):
            reader = bounded_reader(file)
            self._tensors = {str(tensor.name): tensor for tensor in reader.tensors}
            fields = {name: field.contents() for name, field in reader.fields.items()}
            tables = {
                name: tensor.data.astype("f8").tolist()
                for name, tensor in self._tensors.items()
                if name in _TABLES
            }
            architecture = str(fields["general.architecture"])
            _check_counts(architecture, fields, len(self._tensors))
            _check_known(architecture, fields)
            _check_types(self.file, self._tensors)
            settings = unread_settings(architecture, fields, tables)
            with _asked_once(reader):
                self.config, self._rules = _rules(file, architecture, settings)
            self.weights: Mapping[str, GgufWeight] = self._find_weights()
        self._check_complete()
        self._lock = threading.Lock()
        self._whole: tuple[str, np.ndarray] | None = None

    def read(self, weight: GgufWeight, start: int, count: int) -> np.ndarray:
        """Return ``count`` values from number ``start`` on, flat, float32.

        Raises:
            LoraportError: If they cannot be dequantized.
        """
        with _damage(self.file):
            if weight.rows is None:
                return self._load_whole(weight).reshape(-1)[start : start + count]
            columns = weight.columns
            first, last = start // columns, -(-(start + count) // columns)
            flat = self._read_rows(weight, weight.rows[first:last]).reshape(-1)
            return flat[start - first * columns : start - first * columns + count]

    def stretches(self, weight: GgufWeight) -> Iterator[np.ndarray]:
        """Yield a weight's values in order, a stretch at a time, flat, contiguous, float32."""
        import numpy as np

        total = math.prod(weight.shape)
        for start in range(0, total, _STRETCH):
            values = self.read(weight, start, min(_STRETCH, total - start))
            yield np.ascontiguousarray(values)

    def save_files(self, directory: Path, *, tokenizer: bool) -> None:
        """Write everything but the weights: configuration, generation settings, tokenizer.

        Args:
            directory: An existing directory.
            tokenizer: The tokenizer must be there; else it is left out where it cannot be read.

        Raises:
            LoraportError: If the tokenizer must be there and cannot be read.
        """
        from transformers import AutoTokenizer, GenerationConfig

        self.config.save_pretrained(directory)
        GenerationConfig.from_model_config(self.config).save_pretrained(directory)
        try:
            found = AutoTokenizer.from_pretrained(
                self.file.parent, gguf_file=self.file.name, trust_remote_code=False
            )
            found.save_pretrained(directory)
        # Whatever it trips over in a tokenizer that it does not know.
        except Exception as error:
            if tokenizer:
                raise LoraportError(
                    f"base {self.file}: its tokenizer cannot be read: {error}"
                ) from error

    def _find_weights(self) -> dict[str, GgufWeight]:
        found: dict[str, GgufWeight] = {}
        parts: dict[str, list[str]] = {}
        for name, tensor in self._tensors.items():
            target = self._rules.target(name)
            if target is not None:
                parts.setdefault(target, []).append(name)
            elif name not in _TABLES:
                raise LoraportError(
                    f"base {self.file}: {name} {[int(n) for n in reversed(tensor.shape)]} is "
                    "none of the model's weights that transformers knows; give the model that "
                    "the file was made of as the base"
                )
        for target, names in parts.items():
            found[target] = self._weight(target, tuple(names))
        return found

    def _weight(self, target: str, names: tuple[str, ...]) -> GgufWeight:
        import numpy as np

        shapes = [tuple(int(n) for n in reversed(self._tensors[name].shape)) for name in names]
        columns = {shape[-1] for shape in shapes}
        count = sum(int(np.prod(shape)) for shape in shapes)
        if count > _SMALL and len(columns) == 1 and all(len(shape) > 1 for shape in shapes):
            probes, begin = [], 0
            for shape in shapes:
                rows = int(np.prod(shape[:-1]))
                numbers = np.arange(begin, begin + rows, dtype=np.float64)
                probes.append(numbers.reshape(*shape[:-1], 1))
                begin += rows
            turned = self._rules.apply_to(target, names, probes)
            if turned is not None and _is_permutation(turned, begin):
                shape = (*turned.shape[:-1], columns.pop())
                return GgufWeight(target, shape, names, turned.reshape(-1).astype(np.int64))
        empty = [np.broadcast_to(np.float32(-1), shape) for shape in shapes]
        whole = self._rules.apply_to(target, names, empty)
        if whole is None:
            raise ValueError(f"transformers cannot tell what becomes of {', '.join(names)}")
        return GgufWeight(target, tuple(whole.shape), names, None)

    def _read_rows(self, weight: GgufWeight, rows: np.ndarray) -> np.ndarray:
        import numpy as np
        from gguf.quants import dequantize

        result = np.empty((len(rows), weight.columns), dtype=np.float32)
        begin = 0
        for name in weight.parts:
            tensor = self._tensors[name]
            data = tensor.data.reshape(-1, tensor.data.shape[-1])
            own = (rows >= begin) & (rows < begin + len(data))
            if own.any():
                result[own] = dequantize(data[rows[own] - begin], tensor.tensor_type)
            begin += len(data)
        return result

    def _load_whole(self, weight: GgufWeight) -> np.ndarray:
        """Return a whole weight; the last one is kept, as it is asked for in stretches."""
        from gguf.quants import dequantize

        with self._lock:
            if self._whole is None or self._whole[0] != weight.name:
                self._whole = None
                values = [
                    dequantize(self._tensors[name].data, self._tensors[name].tensor_type)
                    for name in weight.parts
                ]
                made = self._rules.apply_to(weight.name, weight.parts, values)
                assert made is not None
                self._whole = (weight.name, made)
            return self._whole[1]

    def _check_complete(self) -> None:
        problems = Problems()
        for name, shape in self._rules.expected.items():
            weight = self.weights.get(name)
            if weight is None:
                problems.add(name, "it in the file", "no tensor for it", "convert the file anew")
            elif weight.shape != shape:
                problems.add(name, f"{list(shape)}", f"{list(weight.shape)}")
        problems.raise_if_any(f"base {self.file} is not whole")


class _Rules:
    """transformers' rules for one file.

    Args:
        architecture: ``general.architecture``.
        parsed: What transformers makes of the file's fields.
        model: The model without weights.
    """

    def __init__(self, architecture: str, parsed: dict[str, Any], model: Any) -> None:
        from transformers import modeling_gguf_pytorch_utils as rules

        processor_class = rules.TENSOR_PROCESSORS.get(architecture, rules.TensorProcessor)
        self._processor = processor_class(config=parsed["config"])
        self._names: dict[str, str] = rules.get_gguf_hf_weights_map(model, self._processor)
        state = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self.expected = {
            name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied
        }
        self._state = state

    def target(self, name: str) -> str | None:
        """Return the weight that a tensor of the file belongs to."""
        found = self._names.get(name) or self._names.get(name.removesuffix(".weight"))
        if found is None and name == "output.weight" and "lm_head.weight" in self._state:
            return "lm_head.weight"
        return found

    def apply_to(
        self, target: str, names: tuple[str, ...], values: list[np.ndarray]
    ) -> np.ndarray | None:
        """Return what the rules make of tensors, or ``None`` where they break on them."""
        import numpy as np

        parsed: dict[str, Any] = {"tensors": {}}
        result = None
        for name, value in zip(names, values, strict=True):
            try:
                made = self._processor.process(
                    weights=value,
                    name=name,
                    tensor_key_mapping=self._names,
                    parsed_parameters=parsed,
                )
            except (ValueError, IndexError, KeyError, TypeError, RuntimeError):
                return None
            if made.name is not None:
                result = made.weights
        stored = parsed["tensors"].get(target)
        if stored is not None:
            result = stored.numpy()
        return None if result is None else np.asarray(result)


def _rules(file: Path, architecture: str, settings: Mapping[str, Any]) -> tuple[Any, _Rules]:
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    parsed = load_gguf_checkpoint(str(file), return_tensors=False)
    parsed["config"].update(settings)
    config = transformers.AutoConfig.for_model(**parsed["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    return config, _Rules(architecture, parsed, model)


@contextmanager
def _asked_once(reader: Any) -> Iterator[None]:
    """Give transformers the file's header as it is read here, and each map of names once.

    It reads the header again, and makes the map anew for every module of the model: a minute for
    a model of thirty layers.
    """
    import gguf

    header, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lambda _: reader, functools.cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = header, names


def _check_counts(architecture: str, fields: Mapping[str, Any], tensors: int) -> None:
    """Refuse a part of a file, and one with more layers than tensors, each of which takes time."""
    parts = int(fields.get("split.count", 1))
    if parts > 1:
        raise ValueError(
            f"it is one of {parts} parts of a model; join them with `llama-gguf-split --merge`"
        )
    layers = fields.get(f"{architecture}.block_count")
    if not isinstance(layers, int) or not 0 <= layers <= tensors:
        raise ValueError(f"block_count: expected at most its {tensors} tensors, got {layers}")


def _check_known(architecture: str, fields: Mapping[str, Any]) -> None:
    """Refuse Mixtral, whose architecture is Llama's in a file: transformers reads a plain Llama."""
    experts = int(fields.get(f"{architecture}.expert_count") or 0)
    if architecture == "llama" and experts:
        raise ValueError(
            f"it is a Llama with {experts} experts (Mixtral), of which transformers reads no GGUF "
            "file; give the model that the file was made of as the base"
        )


def _check_types(file: Path, tensors: Mapping[str, Any]) -> None:
    """Refuse every tensor whose values gguf does not give back, before any is read."""
    import gguf
    import numpy as np

    problems = Problems()
    tried: dict[Any, bool] = {}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type
        if kind not in tried:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            try:
                gguf.quants.dequantize(np.zeros(size, np.uint8), kind)
                tried[kind] = True
            except NotImplementedError:
                tried[kind] = False
        if not tried[kind]:
            problems.add(
                name,
                "a type that the gguf package dequantizes",
                kind.name,
                "use another file of the model, such as one in F16, Q8_0 or Q4_K",
            )
    problems.raise_if_any(f"base {file} cannot be read")


def _is_permutation(numbers: np.ndarray, count: int) -> bool:
    import numpy as np

    if numbers.ndim < 2 or numbers.shape[-1] != 1 or numbers.size != count:
        return False
    return bool((np.sort(numbers, axis=None) == np.arange(count)).all())


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """Turn whatever a reader trips over into one error: they trust their input."""
    try:
        yield
    except (LoraportError, MemoryError):
        raise
    except Exception as error:
        raise LoraportError(f"base {file}: cannot be loaded: {error}") from error
