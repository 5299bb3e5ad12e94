"""Steps of one text: tokens in, the logits of the next one out, the cache kept in between."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from loraport.errors import LoraportError, first_line
from loraport.runtime.capturing import CapturingSession
from loraport.runtime.decoder import (
    Decoder,
    cache_dtype,
    cache_names,
    first_step_inputs,
    token_inputs,
)
from loraport.runtime.model import Runtime, Selection
from loraport.runtime.resident import ResidentAdapter
from loraport.runtime.values import FLOATS, as_numpy, as_value

LOGITS = "logits"
_SMALLEST = 256  # tokens that a cache of captured steps has room for
_WORTHWHILE = 8  # capturing takes as long as a few steps
_BASE = ResidentAdapter({}, 0)  # who captured steps belong to where there is no adapter


class Steps(Protocol):
    """What one text is generated with, by one thread at a time."""

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """Return the logits ``[vocabulary]``, float32, of what comes after these tokens.

        Raises:
            LoraportError: If the model refuses them.
        """
        ...

    def forget(self) -> None:
        """Begin the text anew: nothing is in the cache."""
        ...


@contextmanager
def open_steps(
    runtime: Runtime, decoder: Decoder, selection: Selection, expected: int
) -> Iterator[Steps]:
    """Give what generates one text, in the fastest way that the bundle and its session have.

    Args:
        runtime: The bundle.
        decoder: What `read_decoder` says of it.
        selection: The adapters.
        expected: Tokens that the text may have, as far as that is known.
    """
    if not decoder.in_place:
        yield GrowingSteps(runtime, decoder, selection)
    elif isinstance(runtime.session, CapturingSession):
        steps = CapturedSteps(runtime, decoder, selection, expected)
        try:
            yield steps
        except Exception:  # what is in the cache may be no numbers
            raise
        except BaseException:
            steps.release()
            raise
        else:
            steps.release()
    else:
        yield InPlaceSteps(runtime, decoder, selection, expected)


class GrowingSteps:
    """Each step gives a whole cache, one token longer, to the next."""

    def __init__(self, runtime: Runtime, decoder: Decoder, selection: Selection) -> None:
        self._lane = runtime.lane(selection)
        self._names = _types(runtime.session.get_inputs())
        self._empty: dict[str, Any] = {
            name: value
            for name, value in first_step_inputs(runtime, decoder, [0]).items()
            if name not in token_inputs(self._names, [0], past=0)
        }
        self._presents = cache_names(decoder, self._names)
        self._cache, self._length = self._empty, 0

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Steps.run`."""
        given = token_inputs(self._names, token_ids, past=self._length)
        outputs = self._lane.run_on_device({**given, **self._cache})
        self._cache = {past: outputs[present] for past, present in self._presents}
        self._length += len(token_ids)
        return _last(outputs[LOGITS].numpy())

    def forget(self) -> None:
        """See `Steps.forget`."""
        self._cache, self._length = self._empty, 0


class Cache:
    """Keys and values with room for a whole text, written where they are read.

    Args:
        decoder: Its sizes.
        names: Graph input → type.
        capacity: Tokens that it has room for.
        device: Where it is.

    Raises:
        LoraportError: If there is no memory for it.
    """

    def __init__(
        self, decoder: Decoder, names: Mapping[str, str], capacity: int, device: str
    ) -> None:
        one, heads, _, width = decoder.cache_shape
        shape = (one, heads, capacity, width)
        self.capacity = capacity
        self._presents = cache_names(decoder, names)
        try:
            # Zeros, for a kernel may multiply what it masks.
            self._pasts = {
                past: as_value(np.zeros(shape, cache_dtype(past, names)), device)
                for past, _ in self._presents
            }
        except LoraportError:
            raise
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise LoraportError(
                f"a cache for {capacity} tokens: expected memory for it, got: {first_line(error)}; "
                "let the text be shorter"
            ) from error

    def bind(self, binding: Any) -> None:
        """Let a run read and write it."""
        for past, present in self._presents:
            value, _ = self._pasts[past]
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)


class InPlaceSteps:
    """A step writes its tokens' keys and values behind those of the tokens before."""

    def __init__(
        self, runtime: Runtime, decoder: Decoder, selection: Selection, expected: int
    ) -> None:
        self._session, self._device = runtime.session, runtime.provider
        self._names = _types(runtime.session.get_inputs())
        self._resident = runtime.load(selection) or _BASE
        self._length = 0
        self._cache = self._new_cache(decoder, expected)
        self._binding = self._bound()

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Steps.run`."""
        given = token_inputs(self._names, token_ids, past=self._length)
        kept = {name: as_value(array, "cpu") for name, array in given.items()}
        for name, (value, _) in kept.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output(LOGITS, "cpu")
        self._run(self._binding)
        self._length += len(token_ids)
        return _last(as_numpy(self._binding.get_outputs()[-1]))

    def forget(self) -> None:
        """See `Steps.forget`; what is in the cache is written over."""
        self._length = 0

    def _run(self, binding: Any, *number: int) -> None:
        try:
            self._session.run_with_iobinding(binding, *number)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            raise LoraportError(f"the model refuses a step: {first_line(error)}") from error

    def _bound(self) -> Any:
        """Return a binding of the adapters and the cache; the logits come last."""
        binding = self._session.io_binding()
        for name, value in self._resident.values.items():
            binding.bind_ortvalue_input(name, value)
        self._cache.bind(binding)
        return binding

    def _new_cache(self, decoder: Decoder, expected: int) -> Cache:
        return Cache(decoder, self._names, expected, self._device)


class CapturedCache(Cache):
    """A cache, and all else that a captured step of one token reads and writes.

    Attributes:
        captured: By adapter: what is bound, and the number of its runs. An adapter that nothing
            else keeps is forgotten with them.
    """

    def __init__(
        self, decoder: Decoder, names: Mapping[str, str], capacity: int, device: str, logits: Any
    ) -> None:
        super().__init__(decoder, names, capacity, device)
        given = token_inputs(names, [0], past=capacity - 1)
        self._arrays = {name: np.zeros_like(array) for name, array in given.items()}
        self._inputs = {name: as_value(array, device) for name, array in given.items()}
        self._logits = as_value(np.zeros((1, 1, decoder.vocabulary), logits), device)
        self.captured: weakref.WeakKeyDictionary[ResidentAdapter, tuple[Any, int]] = (
            weakref.WeakKeyDictionary()
        )

    def bind(self, binding: Any) -> None:
        """Let a run read and write it, the inputs of one token, and its logits."""
        super().bind(binding)
        for name, (value, _) in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(LOGITS, self._logits[0])

    def put(self, token: int, place: int) -> None:
        """Write the next step's inputs: one token, and how many are before it."""
        for name, array in self._arrays.items():
            if name == "attention_mask":
                array[:, : place + 1], array[:, place + 1 :] = 1, 0
            else:
                array[:] = place if name == "position_ids" else token
            self._inputs[name][0].update_inplace(array)

    def logits(self) -> np.ndarray:
        """Return what the last step wrote."""
        found: np.ndarray = self._logits[0].numpy()
        return found


class CapturedSteps(InPlaceSteps):
    """Steps in place, of which those of one token are captured once and repeated.

    The mask is as long as the cache: how many of it count is read on the device. What is captured
    stays with the cache, for the next text of the same adapter.
    """

    _cache: CapturedCache

    def __init__(
        self, runtime: Runtime, decoder: Decoder, selection: Selection, expected: int
    ) -> None:
        super().__init__(runtime, decoder, selection, expected)
        self._expected = expected

    def run(self, token_ids: Sequence[int]) -> np.ndarray:
        """See `Steps.run`."""
        cache = self._cache
        known = self._resident in cache.captured
        if len(token_ids) != 1 or not (known or self._expected - self._length >= _WORTHWHILE):
            return super().run(token_ids)
        if not known:
            cache.captured[self._resident] = self._bound(), self._session.new_number()
        binding, number = cache.captured[self._resident]
        cache.put(token_ids[0], self._length)
        self._run(binding, number)
        binding.synchronize_outputs()
        self._length += 1
        return _last(cache.logits())

    def release(self) -> None:
        """Leave the cache, with what was captured over it, to the next text."""
        self._session.spare[self._cache.capacity].append(self._cache)

    def _new_cache(self, decoder: Decoder, expected: int) -> CapturedCache:
        """Return one of few sizes, so that it fits other texts too."""
        capacity = max(_SMALLEST, 1 << (expected - 1).bit_length())
        capacity = min(capacity, decoder.context_length)
        try:
            found: CapturedCache = self._session.spare[capacity].pop()
        except IndexError:
            logits = FLOATS[_types(self._session.get_outputs())[LOGITS]]
            found = CapturedCache(decoder, self._names, capacity, self._device, logits)
        return found


def _last(logits: np.ndarray) -> np.ndarray:
    last: np.ndarray = logits[0, -1].astype(np.float32)
    return last


def _types(entries: Sequence[Any]) -> dict[str, str]:
    return {entry.name: entry.type for entry in entries}
