"""What to change where memory ran out."""

from __future__ import annotations

from loraport.training.base.frozen_base import QUANTIZED
from loraport.training.options import TrainOptions


def memory_savers(options: TrainOptions, *, processes: int = 1, sweep: bool = False) -> str:
    """Return what would need less memory and is not in use yet, the gentlest first.

    Args:
        options: Of the run.
        processes: How many share a batch; each needs a row of it.
        sweep: They are `loraport sweep`'s, which has fewer, and a list of ranks.
    """
    size, length, rank = options.batch_size, options.max_length, options.lora.rank
    savers = []
    fewer = next((count for count in range(size // 2, 0, -1) if size % count == 0), 0)
    if fewer >= processes:
        accumulate = options.loop.accumulate * (size // fewer)
        savers.append(f"--batch-size {fewer} --accumulate {accumulate} (as many rows a step)")
    if options.cuda_graphs:
        savers.append("--no-cuda-graphs")
    elif not options.gradient_checkpointing:
        savers.append("--gradient-checkpointing")
    elif options.checkpointed_layers is not None:
        savers.append("without --checkpointed-layers")
    sharded = options.loop.shard_base and processes > 1  # which quantized weights cannot be
    if options.base_dtype not in QUANTIZED and not (sweep or sharded):
        savers.append("--base-dtype nf4")
    if length > 2:
        savers.append(f"--max-length {max(2, length // 2)}")
    if sweep:
        return ", ".join([*savers, "lower ranks, or a smaller base"])
    savers.append(f"--rank {max(1, rank // 2)}" if rank > 1 else "")
    return ", ".join([*filter(None, savers), "or a smaller base (--dry-run says what each takes)"])
