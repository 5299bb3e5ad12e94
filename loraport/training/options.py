"""Options of a training run: what is adapted, how the loop runs, what the text becomes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraport.errors import Problems
from loraport.option_checks import (
    check_at_least,
    check_count,
    check_parts,
    check_share,
    check_switches,
    check_text,
    is_finite,
    is_whole,
    shown,
)
from loraport.plain_options import store_plain

ALL_LINEAR = "all-linear"
_SEEDS = (-(2**63), 2**64 - 1)  # what torch takes


@dataclass(frozen=True)
class LoraOptions:
    """Which modules get LoRA layers, and what those look like.

    Attributes:
        rank: Rank where no pattern says otherwise.
        alpha: ``lora_alpha`` where no pattern says otherwise; ``None`` means twice ``rank``.
        use_rslora: Scale by ``alpha / sqrt(rank)`` rather than by ``alpha / rank``.
        dropout: Probability with which inputs of ``A`` are dropped while training.
        rank_pattern: Module name or regular expression → rank; the first match wins.
        alpha_pattern: Module name or regular expression → alpha; the first match wins.
        targets: ``"all-linear"`` (every linear layer but the output head), names that module
            paths end with, or one regular expression that whole paths match.
        exclude: Names or a regular expression of modules left alone.
        layers: Numbers of the layers adapted, as in ``"0-3,8"``; empty for all.
        use_dora: Train a magnitude for each output beside the low-rank direction: DoRA (Liu et
            al. 2024, arXiv:2402.09353).
        init: How ``A`` begins: drawn (``B`` is zero), or with ``B`` taken from the base's weight
            (``pissa``, ``olora``); the adapter then has twice the rank and is plain LoRA.
        seed: Seed of that distribution.
    """

    rank: int = 16
    alpha: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | str = ALL_LINEAR
    exclude: tuple[str, ...] | str = ()
    layers: str = ""
    use_dora: bool = False
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    seed: int = 0

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        check_count(problems, "rank", self.rank, 1)
        for pattern, rank in _pattern(problems, "rank_pattern", self.rank_pattern):
            check_count(problems, f"rank_pattern {pattern}", rank, 1)
        named = _pattern(problems, "alpha_pattern", self.alpha_pattern)
        alphas = {f"alpha_pattern {key}": value for key, value in named}
        if self.alpha is not None:
            alphas["alpha"] = self.alpha
        elif is_whole(self.rank):  # else twice the rank says nothing
            alphas["alpha"] = self.effective_alpha
        for name, alpha in alphas.items():
            if not is_finite(alpha) or alpha == 0:
                problems.add(name, "a finite number other than 0", shown(alpha))
            elif alpha < 0 and self.init == "pissa":
                problems.add(name, "a number above 0 for pissa, which takes its root", str(alpha))
        check_share(problems, "dropout", self.dropout)
        check_switches(problems, self, "use_rslora", "use_dora")
        for name in ("targets", "exclude"):
            _names(problems, name, getattr(self, name))
        check_text(problems, "layers", self.layers, 'numbers in a text, such as "0-3,8"')
        _seed(problems, self.seed)
        if self.init not in ("kaiming", "gaussian", "pissa", "olora"):
            problems.add("init", "kaiming, gaussian, pissa or olora", repr(self.init))
        problems.raise_if_any("LoRA options cannot be used")

    @property
    def effective_alpha(self) -> float:
        """Alpha with its default resolved."""
        return float(2 * self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class LoopOptions:
    """How the loop steps; the same for every kind of model.

    Attributes:
        learning_rate: Peak learning rate of AdamW.
        epochs: Passes over the data, unless ``steps`` is given.
        steps: Optimizer steps; ``None`` for as many as ``epochs`` take.
        accumulate: Batches per optimizer step.
        warmup: Share of the steps in which the learning rate rises linearly.
        weight_decay: AdamW's decoupled weight decay.
        clip: Largest norm of the gradient; 0 for no clipping.
        seed: Seed of everything random in the loop.
        device: ``"auto"`` (CUDA where there is one, else CPU) or a torch device.
        dtype: ``"auto"`` (bfloat16 autocast on CUDA hardware that has it, else float32),
            ``"float32"`` or ``"bfloat16"``.
        save_every: Steps between checkpoints; 0 for none.
        keep: Checkpoints kept.
        validate_every: Steps between validations; 0 for the end of each epoch.
        early_stopping: Stop after so many validations in a row without a new best, or after one
            that is not finite, and keep the best; 0 for never.
        lora_plus_ratio: How many times the learning rate of ``A`` that of ``B`` is: LoRA+
            (Hayou et al. 2024, arXiv:2402.12354). On embeddings, too: the paper's code and PEFT
            give both matrices of these 1e-6 at any ratio, without a reason, and they hardly move.
        shard_base: Spread the frozen base over the processes (FSDP2), instead of a copy in each.
        optimizer: AdamW with its state in float32 (``"adamw"``) or in 8 bits (``"adamw-8bit"``,
            and ``"paged-adamw-8bit"``, which moves to the host's memory where the GPU's is full;
            both bitsandbytes).
    """

    learning_rate: float = 1e-3
    epochs: int = 3
    steps: int | None = None
    accumulate: int = 1
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_every: int = 100
    keep: int = 2
    validate_every: int = 0
    early_stopping: int = 0
    lora_plus_ratio: float = 1.0
    shard_base: bool = False
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = "adamw"

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        if not (is_finite(self.learning_rate) and self.learning_rate > 0):
            problems.add("learning_rate", "a finite number above 0", shown(self.learning_rate))
        for name in ("epochs", "accumulate", "keep"):
            check_count(problems, name, getattr(self, name), 1)
        if self.steps is not None:
            check_count(problems, "steps", self.steps, 1)
        check_at_least(problems, "lora_plus_ratio", self.lora_plus_ratio, 1)
        for name in ("weight_decay", "clip"):
            check_at_least(problems, name, getattr(self, name), 0)
        for name in ("save_every", "validate_every", "early_stopping"):
            check_count(problems, name, getattr(self, name), 0)
        check_share(problems, "warmup", self.warmup)
        check_switches(problems, self, "shard_base")
        _seed(problems, self.seed)
        if self.dtype not in ("auto", "float32", "bfloat16"):
            problems.add("dtype", "auto, float32 or bfloat16", repr(self.dtype))
        if self.optimizer not in ("adamw", "adamw-8bit", "paged-adamw-8bit"):
            expected = "adamw, adamw-8bit or paged-adamw-8bit"
            problems.add("optimizer", expected, repr(self.optimizer))
        problems.raise_if_any("training options cannot be used")


@dataclass(frozen=True)
class TrainOptions:
    """Options of training a language model on text: of ``loraport train``.

    Attributes:
        lora: What is adapted.
        loop: How the loop steps.
        batch_size: Rows per batch.
        max_length: Tokens per row; longer rows are cut and counted.
        validation_share: Share of the rows held out, where no validation file is given.
        gradient_checkpointing: Compute activations again instead of keeping them.
        checkpointed_layers: Only those of so many layers, the first ones; ``None`` for all. The
            others keep theirs: more memory, less time.
        compile: Compile the model's layers (`torch.compile`): fewer and larger kernels, after a
            minute or so; losses equal but for the order of sums.
        cuda_graphs: On a GPU, record forward and backward pass once for each shape of batch, and
            pad batches to few lengths; ``None`` where that can be told to work and memory is left.
        liger_kernel: Let liger-kernel compute norms, rotations and gates on a GPU.
        packing: How rows lie in a batch: ``"auto"`` lays them end to end, their common beginning
            once, where that is less work than padding; ``"fill"`` packs as many as fit into
            sequences of ``max_length``, of which ``batch_size`` make a batch; ``"none"`` pads.
        base_dtype: What the frozen base is kept in: ``"auto"`` (as it is stored, bfloat16 or
            float32), ``"float32"``, ``"bfloat16"``, ``"nf4"`` or ``"int8"`` (bitsandbytes).
    """

    lora: LoraOptions = field(default_factory=LoraOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    batch_size: int = 4
    max_length: int = 1024
    validation_share: float = 0.1
    gradient_checkpointing: bool = False
    checkpointed_layers: int | None = None
    compile: bool = False
    cuda_graphs: bool | None = None
    liger_kernel: bool = False
    packing: Literal["auto", "fill", "none"] = "auto"
    base_dtype: Literal["auto", "float32", "bfloat16", "nf4", "int8"] = "auto"

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        check_parts(problems, self, lora=LoraOptions, loop=LoopOptions)
        check_count(problems, "batch_size", self.batch_size, 1)
        check_count(problems, "max_length", self.max_length, 2)
        check_share(problems, "validation_share", self.validation_share)
        check_switches(problems, self, "gradient_checkpointing", "compile", "liger_kernel")
        if self.cuda_graphs is not None:
            check_switches(problems, self, "cuda_graphs")
        if self.checkpointed_layers is not None:
            check_count(problems, "checkpointed_layers", self.checkpointed_layers, 1)
            if not self.gradient_checkpointing:
                problems.add("checkpointed_layers", "gradient checkpointing, too", "none")
        if self.packing not in ("auto", "fill", "none"):
            problems.add("packing", "auto, fill or none", repr(self.packing))
        if self.base_dtype not in ("auto", "float32", "bfloat16", "nf4", "int8"):
            expected = "auto, float32, bfloat16, nf4 or int8"
            problems.add("base_dtype", expected, repr(self.base_dtype))
        problems.raise_if_any("training options cannot be used")


def _seed(problems: Problems, seed: int) -> None:
    if not (is_whole(seed) and _SEEDS[0] <= seed <= _SEEDS[1]):
        problems.add("seed", f"a whole number from {_SEEDS[0]} to {_SEEDS[1]}", shown(seed))


def _pattern(problems: Problems, name: str, value: object) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    problems.add(name, 'a mapping, such as {"q_proj": 8}', repr(value))
    return []


def _names(problems: Problems, name: str, value: object) -> None:
    if not (isinstance(value, Collection) and all(isinstance(each, str) for each in value)):
        problems.add(name, "names, or one regular expression", repr(value))
