"""What to change where memory ran out."""

from __future__ import annotations

from loraport.training.base.frozen_base import QUANTIZED
from loraport.training.options import TrainOptions


def memory_savers(options: TrainOptions) -> str:
    """Return what would need less memory and is not in use yet, the gentlest first."""
    size, length = options.batch_size, options.max_length
    savers = []
    if size > 1:
        fewer = next(count for count in range(size // 2, 0, -1) if size % count == 0)
        accumulate = options.loop.accumulate * (size // fewer)
        savers.append(f"--batch-size {fewer} --accumulate {accumulate} (as many rows a step)")
    if options.cuda_graphs:
        savers.append("--no-cuda-graphs")
    elif not options.gradient_checkpointing:
        savers.append("--gradient-checkpointing")
    elif options.checkpointed_layers is not None:
        savers.append("without --checkpointed-layers")
    if options.base_dtype not in QUANTIZED:
        savers.append("--base-dtype nf4")
    if length > 2:
        savers.append(f"--max-length {max(2, length // 2)}")
    savers.append(f"--rank {max(1, options.lora.rank // 2)}" if options.lora.rank > 1 else "")
    return ", ".join([*filter(None, savers), "or a smaller base (--dry-run says what each takes)"])
