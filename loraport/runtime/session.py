"""ONNX Runtime sessions, by provider."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError, first_line
from loraport.runtime.capturing import CapturingSession
from loraport.runtime.full_precision import FUSED_FLOAT32, with_float32_activations

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# What goes wrong in a run is raised; printed as well it would only be said twice.
_NOTHING_BUT_FATAL = 4
# It rearranges float32 convolutions; in some graphs of float16 (a transposed value, cast and
# multiplied) it ends the process: microsoft/onnxruntime#28392.
_NOT_FOR_HALVES = ("NchwcTransformer",)
_DATA_DIRECTORY = "session.model_external_initializers_file_folder_path"


def open_session(
    model: Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    float32_activations: bool = False,
    defaults: Mapping[str, Any] | None = None,
    profile: Path | None = None,
    precision: str = "fp32",
    graph: bytes | None = None,
    cuda_graphs: bool = False,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    Args:
        model: The ``.onnx`` file.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: Threads inside operators; ONNX Runtime's choice unless told.
        float32_activations: Let quantized kernels compute in full precision, and CUDA's float32
            products too: no TF32.
        defaults: Graph input → ``OrtValue`` that takes the place of its default, and must live as
            long as the session.
        profile: Write a profile to a file that begins so, when ``end_profiling`` is called.
        precision: How the graph's weights are stored.
        graph: A graph over the model's data file, to be opened in place of the model's own.
        cuda_graphs: Let runs be captured and repeated: a `CapturingSession`.

    Raises:
        LoraportError: If the model cannot be opened or the provider is not to be had; a
            session never falls back to another provider unnoticed.
    """
    import onnxruntime

    if provider not in PROVIDERS:
        raise LoraportError(f"provider: expected one of {', '.join(PROVIDERS)}, got {provider!r}")
    if cuda_graphs and provider != "cuda":
        raise LoraportError(f"CUDA graphs: expected provider cuda, got {provider}")
    wanted = PROVIDERS[provider]
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        # Finds the CUDA and cuDNN libraries that PyTorch brings; prints what it does not find.
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    # The runtime warns of every overridable initializer; slots are overridable on purpose.
    options.log_severity_level = _NOTHING_BUT_FATAL
    # Patterns are kept per set of input shapes, which a decoder never repeats.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    settings = {"use_tf32": "0"} if provider == "cuda" and float32_activations else {}
    if cuda_graphs:
        settings["enable_cuda_graph"] = "1"
    source: str | bytes = str(model)
    try:
        for name, value in (defaults or {}).items():
            options.add_initializer(name, value)
        if float32_activations:
            options.add_session_config_entry(*FUSED_FLOAT32)
        if graph is None and float32_activations:
            graph = with_float32_activations(model)
        if graph is not None:
            source = graph
            options.add_session_config_entry(_DATA_DIRECTORY, str(model.parent))
        session = onnxruntime.InferenceSession(
            source,
            options,
            [wanted],
            [settings],
            disabled_optimizers=_NOT_FOR_HALVES if precision == "fp16" else (),
        )
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        first = first_line(error)
        raise LoraportError(f"{model}: ONNX Runtime cannot open it: {first}") from error
    if wanted not in session.get_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        raise LoraportError(
            f"provider {provider}: expected {wanted}, got {', '.join(session.get_providers())}; "
            f"available here: {available}"
        )
    return CapturingSession(session) if cuda_graphs else session
