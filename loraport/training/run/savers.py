"""What to change where memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loraport.base.finding import resolve_base
from loraport.base.loading import model_without_weights
from loraport.errors import LoraportError
from loraport.training.base.frozen_base import QUANTIZED, checkpointable_layers
from loraport.training.data.text_data import TextData
from loraport.training.options import TrainOptions
from loraport.training.run.faults import MemoryRanOutError

# How `FREE_OPTIONS` are offered.
_FREE = (
    *("--gradient-checkpointing", "--checkpointed-layers", "without --checkpointed-layers"),
    "--shard-base",
)


@contextmanager
def savers_told(
    base: str,
    rows: TextData,
    options: TrainOptions,
    kept: Callable[[], object],
    *,
    processes: int = 1,
    sweep: bool = False,
) -> Iterator[None]:
    """Add to an error of memory that ran out what to change.

    Args:
        base: See `loraport.base.finding.resolve_base`.
        rows: Of the run.
        options: Of the run.
        kept: Gives what ``--resume`` goes on from by then; nothing true where there is nothing.
        processes: See `memory_savers`.
        sweep: See `memory_savers`.

    Raises:
        LoraportError: In the place of `MemoryRanOutError`.
    """
    try:
        yield
    except MemoryRanOutError as error:
        longest = max(len(row.tokens) for row in (*rows.train, *rows.validation))
        offers = _offers(
            options,
            longest=rows.length if options.packing == "fill" else longest,
            layers=_layers(base),
            processes=processes,
            sweep=sweep,
        )
        going_on = _going_on(offers) if kept() else ""
        raise LoraportError(f"{error}; to need less, try {', '.join(offers)}{going_on}") from None


def _going_on(offers: Sequence[str]) -> str:
    """Say which of what is offered a run that is resumed may have."""
    each = (one for offer in offers for one in offer.split(" or "))
    free = [one for one in each if one.startswith(_FREE)]
    return f"; --resume goes on with {' and '.join(free)}" if free else ""


def memory_savers(
    options: TrainOptions,
    *,
    longest: int | None = None,
    layers: int | None = None,
    processes: int = 1,
    sweep: bool = False,
) -> str:
    """Return what would need less memory and is not in use yet, the gentlest first.

    Args:
        options: Of the run.
        longest: Tokens of the longest row or packed sequence; as many as may be where ``None``.
        layers: How many layers can compute activations again; ``None`` where that is not known.
        processes: How many share a batch; each needs a row of it.
        sweep: They are `loraport sweep`'s, which has fewer, and a list of ranks.
    """
    return ", ".join(_offers(options, longest, layers, processes, sweep=sweep))


def _offers(
    options: TrainOptions,
    longest: int | None,
    layers: int | None,
    processes: int,
    *,
    sweep: bool,
) -> list[str]:
    size, length, rank = options.batch_size, longest or options.max_length, options.lora.rank
    savers = []
    fewer = next((count for count in range(size // 2, 0, -1) if size % count == 0), 0)
    if fewer >= processes:
        accumulate = options.loop.accumulate * (size // fewer)
        savers.append(f"--batch-size {fewer} --accumulate {accumulate} (as many rows a step)")
    some = options.checkpointed_layers
    if options.cuda_graphs:
        savers.append("--no-cuda-graphs")
    elif not options.gradient_checkpointing and layers != 0:
        savers.append("--gradient-checkpointing")
    elif some is not None and layers is None:
        savers.append("without --checkpointed-layers")
    elif some is not None and some < (layers or 0):
        savers.append(f"--checkpointed-layers {layers}")
    smaller_base = []
    sharded = options.loop.shard_base and processes > 1  # which quantized weights cannot be
    whole = options.compile or options.cuda_graphs or options.liger_kernel  # in every process
    if processes > 1 and not (sharded or whole or options.base_dtype in QUANTIZED):
        smaller_base.append("--shard-base")
    if options.base_dtype != "nf4" and not (sweep or sharded):
        smaller_base.append("--base-dtype nf4")
    if smaller_base:
        savers.append(" or ".join(smaller_base))
    if length > 2:
        savers.append(f"--max-length {max(2, length // 2)}")
    if sweep:
        return [*savers, "lower ranks", "or a smaller base"]
    savers.append(f"--rank {max(1, rank // 2)}" if rank > 1 else "")
    hint = "" if sharded else " (--dry-run says what each takes)"
    return [*filter(None, savers), f"or a smaller base{hint}"]


def _layers(base: str) -> int | None:
    """Return how many layers can compute activations again; ``None`` where that is not known."""
    model = model_without_weights(resolve_base(base))
    if model is None:
        return None
    if not model.supports_gradient_checkpointing:
        return 0
    return len(checkpointable_layers(model)) or None
