"""Verify a bundle against the PyTorch model it was exported from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from loraport.adapter import Adapter, require_adapters
from loraport.base.attention_windows import attention_windows
from loraport.base.loading import load_tokenizer
from loraport.base.rotation_border import rotation_border
from loraport.bundle.golden import base_inputs
from loraport.bundle.manifest import MODEL_FILE
from loraport.parity.changes import Original
from loraport.parity.check import Check
from loraport.parity.prompts import PROMPTS
from loraport.parity.protocol import Protocol, Sample
from loraport.parity.tolerances import Tolerance, tolerance_for
from loraport.runtime import Runtime
from loraport.runtime.decoder import GENAI_CONFIG, first_step_inputs, read_decoder
from loraport.runtime.full_precision import rounds_activations

_BEYOND = 16  # tokens, of a text that is longer than others
_MOST_PRODUCTS = 10**12  # of one such run; some minutes on two cores


@dataclass(frozen=True)
class Verification:
    """The outcome of a verification.

    Attributes:
        checks: Every check, in order.
        tolerance: What was tolerated.
        samples: How many inputs were compared.
        provider: Execution provider.
    """

    checks: tuple[Check, ...]
    tolerance: Tolerance
    samples: int
    provider: str

    @property
    def passed(self) -> bool:
        """Tell whether every check passed; no checks prove nothing."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def calibrated(self) -> bool:
        """Tell whether parity fails by the graph's own calibrated quantization alone."""
        return not self.passed and all(check.passed or check.calibrated for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return the report as an object for ``--json``; a number that is none becomes null."""
        return {
            "passed": self.passed,
            "provider": self.provider,
            "samples": self.samples,
            "tolerance": asdict(self.tolerance),
            "checks": [_finite(asdict(check)) for check in self.checks],
        }


def _finite(value: Any) -> Any:
    """Return the value with ``None`` for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify_bundle(
    bundle: Path | str,
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    *,
    provider: str = "cpu",
    samples: list[Sample] | None = None,
    original: Original | None = None,
    progress: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Verification:
    """Run the parity protocol.

    Args:
        bundle: The bundle's directory.
        model: The base in float32; put into evaluation mode.
        adapters: Name in the bundle → the adapter it was packed from.
        provider: ``"cpu"`` or ``"cuda"``.
        samples: Inputs to compare on; prompts or golden inputs unless given.
        original: Gives the parameters that the adapters were made for, by path, where the model
            has a quantized graph's; the model's own unless given.
        progress: Told what is being done.

    Raises:
        LoraportError: If the bundle cannot be opened at all, or an adapter is not in it.
    """
    require_adapters(adapters)
    bundle = Path(bundle)
    runtime = Runtime(bundle, provider=provider, check=False, float32_activations=True)
    rounds = rounds_activations(bundle / MODEL_FILE)
    deployed = Runtime(bundle, provider=provider, check=False) if rounds else None
    for name in adapters:
        runtime.manifest.require_adapter(name)
    samples = samples or [*default_samples(runtime), *_longer_texts(runtime, model, progress)]
    tolerance = tolerance_for(runtime.manifest.precision, provider)
    protocol = Protocol(
        runtime,
        model.eval(),
        adapters,
        samples,
        tolerance,
        progress,
        deployed=deployed,
        original=original,
    )
    return Verification(tuple(protocol.run()), tolerance, len(samples), provider)


def default_samples(runtime: Runtime) -> list[Sample]:
    """Return what a bundle is compared on: prompts for text models, else its golden inputs."""
    bundle = runtime.directory
    if (bundle / GENAI_CONFIG).is_file():
        return _decoder_samples(runtime)
    golden = base_inputs(bundle, runtime.manifest)
    if "input_ids" not in golden or not (bundle / "tokenizer.json").is_file():
        return [Sample(golden, golden)]
    tokenizer = load_tokenizer(str(bundle))
    encoded = [tokenizer(text, return_tensors="np") for text in PROMPTS]
    found = [{name: np.asarray(row[name], np.int64) for name in golden} for row in encoded]
    return [Sample(inputs, inputs) for inputs in found]


def _longer_texts(
    runtime: Runtime, model: nn.Module, progress: Callable[[str], None]
) -> list[Sample]:
    """Return texts beyond what layers look back, and beyond what the same factors rotate."""
    config = getattr(model, "config", None)
    if config is None or not (runtime.directory / GENAI_CONFIG).is_file():
        return []
    borders = {
        "window": max(attention_windows(config)),
        "short rotations": rotation_border(config) or 0,
    }
    size = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for what, border in borders.items():
        length = min(border + _BEYOND, read_decoder(runtime.directory).context_length - 1)
        if not 0 < border < length:
            continue
        if length * size > _MOST_PRODUCTS:
            progress(f"not compared beyond the {what} of {border} tokens, which takes too long")
            continue
        tokenizer = load_tokenizer(str(runtime.directory))
        read = [int(token) for text in PROMPTS for token in tokenizer(text)["input_ids"]]
        found.append(_decoder_sample(runtime, list(islice(cycle(read), length))))
    return found


def _decoder_samples(runtime: Runtime) -> list[Sample]:
    tokenizer = load_tokenizer(str(runtime.directory))
    read = [[int(token) for token in tokenizer(text)["input_ids"]] for text in PROMPTS]
    return [_decoder_sample(runtime, token_ids) for token_ids in read]


def _decoder_sample(runtime: Runtime, token_ids: list[int]) -> Sample:
    inputs = first_step_inputs(runtime, read_decoder(runtime.directory), token_ids)
    ids = np.array([token_ids], np.int64)
    arguments = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return Sample(inputs, arguments, token_ids)
