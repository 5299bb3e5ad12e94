"""Keep the frozen base's linear layers in 4 or 8 bits (bitsandbytes)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from loraport.training.base.bitsandbytes_library import import_bitsandbytes
from loraport.training.losses.output_head import output_head

Quantization = Literal["nf4", "int8"]


def quantize_linears(
    model: nn.Module, kind: Quantization, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Quantize all linear layers but the output head, one after the other; the model stays so.

    What is left keeps its dtype. NF4 has blocks of 64 and quantized scales (Dettmers et al. 2023,
    QLoRA, arXiv:2305.14314), int8 has a scale a row and outliers apart (LLM.int8(),
    arXiv:2208.07339).

    Args:
        model: Any module, without LoRA layers.
        kind: ``"nf4"`` or ``"int8"``.
        device: Where the quantized weights go; products are in the dtype of their input.
        dtype: What NF4 weights are dequantized to for the backward pass: that of the products,
            so that none is made in float32 first; what they were before where ``None``.

    Raises:
        LoraportError: If bitsandbytes is not installed.
    """
    library = import_bitsandbytes(f"--base-dtype {kind}")
    kept = output_head(model)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.Linear and child is not kept:
                parent._modules[name] = _quantized(library, child, kind, device, dtype)


def _quantized(
    library: Any,
    linear: nn.Linear,
    kind: Quantization,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data
    layer: Any
    with torch.device("meta"):  # nothing is drawn that is replaced at once
        if kind == "nf4":
            layer = library.nn.Linear4bit(
                *sizes, compute_dtype=None, quant_type="nf4", compress_statistics=True
            )
        else:
            layer = library.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
    if kind == "nf4":
        layer.weight = library.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
    else:
        layer.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    # On some CPUs it would repack weights for inference, rounding them and for good.
    layer.support_avx512bf16_for_cpu = False
    layer.bias = linear.bias
    layer.train(linear.training)
    layer = layer.to(device)
    if kind == "nf4" and dtype is not None:
        layer.weight.quant_state.dtype = dtype
    return layer
