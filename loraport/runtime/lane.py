"""One session with one selection of adapters bound, run by one thread at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from loraport.bundle.slots import BASE, Control
from loraport.errors import LoraportError, Problems, first_line
from loraport.runtime.capturing import CapturingSession
from loraport.runtime.resident import ResidentAdapter
from loraport.runtime.values import as_numpy, as_value, holds_numbers


class Lane:
    """A session with one selection of adapters bound, for use by one thread at a time.

    The slots are bound once, when the lane is made; a run binds only the model's own inputs.
    Made by `Runtime.lane`.
    """

    def __init__(
        self,
        session: Any,
        resident: ResidentAdapter | None,
        device: str,
        controls: Iterable[Control] = (),
    ) -> None:
        self._session = session
        self._resident = resident  # kept alive: the binding only points at its memory
        self._device = device
        self._binding = session.io_binding()
        for name, value in (resident.values if resident is not None else {}).items():
            self._binding.bind_ortvalue_input(name, value)
        self._types = {entry.name: entry.type for entry in session.get_inputs()}
        self._controls = {control.input: control for control in controls}
        self._given: dict[str, Any] = {}
        given = session.get_outputs()
        self._outputs = [entry.name for entry in given]
        self._sequences = {entry.name: entry.type for entry in given if "seq(" in entry.type}

    def run_on_device(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Run once and leave the outputs on the session's device.

        Args:
            inputs: Every input of the model, as array or ``OrtValue``; controls of the bundle
                (``lora_strength``, ``adapter_ids``) where they are wanted.
            outputs: Name or names of the outputs wanted; all unless told.

        Returns:
            Output name → ``OrtValue``.

        Raises:
            LoraportError: If an input is missing, unknown or refused by the model, it has no
                such output, or the session captures runs: a repeated run writes into memory that
                outputs on the device would be in.
        """
        if isinstance(self._session, CapturingSession):
            raise LoraportError(
                "outputs on the device: expected a runtime without CUDA graphs, which write into "
                "the same memory; open another one, or use run"
            )
        return self._run(inputs, outputs, self._device)

    def run(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; see `run_on_device`. The outputs are arrays on the CPU.

        What is bfloat16 in the graph has the dtype ``ml_dtypes.bfloat16``.

        Raises:
            LoraportError: As `run_on_device`, or if an output is a sequence: no array.
        """
        names = self._wanted(outputs)
        self._refuse_sequences(names)
        values = self._run(inputs, names, "cpu")
        return {name: as_numpy(value) for name, value in values.items()}

    def _run(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None, device: str
    ) -> dict[str, Any]:
        self._check_inputs(inputs)
        binding = self._binding
        names = self._wanted(outputs)
        binding.clear_binding_outputs()
        controls = self._bind_controls(inputs)
        given = []  # lives until the run has ended
        values = {name: value for name, value in inputs.items() if name not in controls}
        try:
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    values[name], array = as_value(value, "cpu")
                    given.append(array)
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            self._refuse_other_types(values)
            first = first_line(error)
            raise LoraportError(f"the model refuses these inputs: {first}") from error
        results = dict(zip(names, binding.get_outputs(), strict=True))
        # A resting lane keeps no outputs; the caller's values live on their own.
        binding.clear_binding_outputs()
        return results

    def _wanted(self, outputs: Iterable[str] | None) -> list[str]:
        if outputs is None:
            return self._outputs
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        problems = Problems()
        if not names:
            problems.add("outputs", "at least one name, or None for all", "none")
        for name in names:
            if name not in self._outputs:
                problems.add(
                    str(name), f"one of the outputs {', '.join(self._outputs[:8])}", "another"
                )
        problems.raise_if_any("the model's outputs and those wanted differ")
        return names

    def _refuse_sequences(self, names: Iterable[str]) -> None:
        problems = Problems()
        for name in names:
            if name in self._sequences:
                problems.add(name, "an output that is an array", self._sequences[name])
        problems.raise_if_any("name the outputs wanted, without these, or use run_on_device")

    def _bind_controls(self, inputs: Mapping[str, Any]) -> set[str]:
        """Bind the controls among the inputs; return their names.

        What is bound stays bound: a control given in one run must not act in the next.
        """
        given = inputs.keys() & self._controls.keys()
        for name in self._given.keys() | given:
            control = self._controls[name]
            value = _read_control(control, inputs[name]) if name in given else control.default()
            # The binding takes arrays for required inputs only, and just points at values.
            bound = as_value(value, self._device)
            self._binding.bind_ortvalue_input(name, bound[0])
            self._given[name] = bound
        return given

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        own = self._types.keys()
        if inputs.keys() - self._controls.keys() == own:
            return
        problems = Problems()
        for name in sorted(own - inputs.keys()):
            problems.add(name, "an array for this input", "none")
        for name in sorted(inputs.keys() - own - self._controls.keys()):
            problems.add(name, f"one of the inputs {', '.join(sorted(own)[:8])}", "another")
        problems.raise_if_any("the model's inputs and those given differ")

    def _refuse_other_types(self, values: Mapping[str, Any]) -> None:
        """Name the inputs that are no values of the model's types; a refused run does not."""
        problems = Problems()
        for name, value in values.items():
            if not holds_numbers(self._types[name]):
                problems.add(
                    name,
                    "an input of numbers",
                    f"{self._types[name]}, which cannot be bound; run the graph with "
                    "onnxruntime's InferenceSession.run, adapters with its LoraAdapter",
                )
                continue
            if isinstance(value, np.ndarray):  # it has no such type, or one before it has none
                try:
                    value, _ = as_value(value, "cpu")
                except Exception:  # as in a run
                    problems.add(name, self._types[name], f"an array of {value.dtype}")
                    continue
            if not hasattr(value, "data_type"):
                problems.add(name, "a numpy array or an OrtValue", type(value).__name__)
            elif value.data_type() != self._types[name]:
                problems.add(name, self._types[name], value.data_type())
        problems.raise_if_any("the model refuses these inputs")


def _read_control(control: Control, given: Any) -> np.ndarray:
    """Return what was given for a control as the array that the graph takes.

    Raises:
        LoraportError: If it is not ``[n]`` finite numbers, or not such as name lanes.
    """
    neutral = control.default()
    expected = (
        "finite numbers [n]" if control.dtype == "FLOAT" else f"whole numbers [n] from {BASE}"
    )
    try:
        array = np.atleast_1d(np.asarray(given.numpy() if hasattr(given, "numpy") else given))
        with np.errstate(invalid="ignore", over="ignore"):
            value = np.ascontiguousarray(array, neutral.dtype)
        good = array.ndim == 1 and bool(np.isfinite(value).all())
        if good and control.dtype != "FLOAT":
            good = np.array_equal(value, array) and bool((value >= BASE).all())
    except (TypeError, ValueError):
        good = False
    if not good:
        raise LoraportError(f"{control.input}: expected {expected}, got {given}")
    return value
