"""One session with one selection of adapters bound, run by one thread at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from loraport.bundle.slots import Control
from loraport.errors import LoraportError, Problems
from loraport.runtime.resident import ResidentAdapter
from loraport.runtime.values import as_numpy, as_value


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
        self._inputs = {entry.name for entry in session.get_inputs()}
        self._controls = {control.input: control for control in controls}
        self._given: dict[str, Any] = {}
        self._outputs = [entry.name for entry in session.get_outputs()]

    def run_on_device(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None = None
    ) -> dict[str, Any]:
        """Run once and leave the outputs on the session's device.

        Args:
            inputs: Every input of the model, as array or ``OrtValue``; controls of the bundle
                (``lora_strength``, ``adapter_ids``) where they are wanted.
            outputs: Names of the outputs wanted; all unless told.

        Returns:
            Output name → ``OrtValue``.

        Raises:
            LoraportError: If an input is missing, unknown or refused by the model.
        """
        return self._run(inputs, outputs, self._device)

    def run(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; see `run_on_device`. The outputs are arrays on the CPU.

        What is bfloat16 in the graph has the dtype ``ml_dtypes.bfloat16``.
        """
        values = self._run(inputs, outputs, "cpu")
        return {name: as_numpy(value) for name, value in values.items()}

    def _run(
        self, inputs: Mapping[str, Any], outputs: Iterable[str] | None, device: str
    ) -> dict[str, Any]:
        self._check_inputs(inputs)
        binding = self._binding
        names = list(outputs) if outputs is not None else self._outputs
        binding.clear_binding_outputs()
        controls = self._bind_controls(inputs)
        given = []  # lives until the run has ended
        try:
            for name, value in inputs.items():
                if name in controls:
                    continue
                if isinstance(value, np.ndarray):
                    value, array = as_value(value, "cpu")
                    given.append(array)
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises classes of its own without a common base
            first = str(error).strip().splitlines()[0]
            raise LoraportError(f"the model refuses these inputs: {first}") from error
        values = dict(zip(names, binding.get_outputs(), strict=True))
        # A resting lane keeps no outputs; the caller's values live on their own.
        binding.clear_binding_outputs()
        return values

    def _bind_controls(self, inputs: Mapping[str, Any]) -> set[str]:
        """Bind the controls among the inputs; return their names.

        What is bound stays bound: a control given in one run must not act in the next.
        """
        given = inputs.keys() & self._controls.keys()
        for name in self._given.keys() | given:
            control = self._controls[name]
            default = control.default()
            value = np.ascontiguousarray(inputs[name], default.dtype) if name in given else default
            # The binding takes arrays for required inputs only, and just points at values.
            bound = as_value(value, self._device)
            self._binding.bind_ortvalue_input(name, bound[0])
            self._given[name] = bound
        return given

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        if inputs.keys() - self._controls.keys() == self._inputs:
            return
        problems = Problems()
        for name in sorted(self._inputs - inputs.keys()):
            problems.add(name, "an array for this input", "none")
        for name in sorted(inputs.keys() - self._inputs - self._controls.keys()):
            problems.add(
                name, f"one of the inputs {', '.join(sorted(self._inputs)[:8])}", "another"
            )
        problems.raise_if_any("the model's inputs and those given differ")
