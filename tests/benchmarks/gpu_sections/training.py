"""Training: losses against float64 on the CPU, step time beside PEFT, the memory of 7B in NF4."""

import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from random_llamas import config_of
from sweep import ALONE as EIGHT_RUNS
from sweep import TOGETHER
from sweep import measure as measure_sweep
from torch.nn import functional as F
from train import PEERS, RANK, TARGETS, Setting, Task, compare

from gpu_sections.place import Place, Row
from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach, train
from loraport.training.memory.dry_run import dry_run

# How far a step's loss may be from float64's: 24 bits of mantissa (TF32 off), or 8.
_BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}
# What `loraport train` does by itself on a GPU, and without recording.
OURS, LOOP = "loraport", "PEFT, plain loop"
UNRECORDED = f"{OURS} --no-cuda-graphs"


def losses(place: Place) -> Iterator[Row]:
    """A few steps of a tiny model, each against the same step in float64 on the CPU."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of("tiny"))
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))

    def told(model: LlamaForCausalLM, device: str, dtype: str) -> list[float]:
        attach(model, LoraOptions(rank=4))
        options = LoopOptions(steps=6, learning_rate=0.03, device=device, dtype=dtype)
        return [loss for _, loss in train(model, [tokens] * 6, next_token_loss, options).losses]

    expected = told(copy.deepcopy(model).double(), "cpu", "float32")
    for dtype, bound in _BOUNDS.items():
        got = told(copy.deepcopy(model), place.device, dtype)
        far = max(abs(mine - other) for mine, other in zip(got, expected, strict=True))
        learnt = expected[0] - expected[-1]
        figure = f"losses of 6 steps at most {far:.2g} from float64, which learns {learnt:.2g}"
        if not far <= bound < learnt / 2:
            figure = f"FAILED {figure}"
        yield Row(f"training {dtype}, against float64 on the CPU", figure, f"allowed {bound:g}")


def next_token_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, from all logits."""
    logits = model(input_ids=tokens).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def speed(place: Place) -> Iterator[Row]:
    """Step time and peak memory beside PEFT, bfloat16, the last of some epochs."""
    titles = peers()
    if LOOP not in titles:
        yield Row("training beside PEFT", "PEFT not measured: peft is not installed")
    narrow = {"device": place.device, "dtype": "bfloat16", "base_dtype": "bfloat16"}
    for base in (place.base,) if place.tiny else (place.base, "llama-1b"):
        sizes = {"steps": 4} if place.tiny else {"steps": 24, "epochs": 2, "longest": 1024}
        setting = Setting(base=base, **narrow, **sizes)
        # On a GPU the allocator counts each one's memory, and starting processes takes minutes.
        found = compare(setting, titles, apart=place.device == "cpu" and not place.tiny)
        if place.device == "cuda":
            found[UNRECORDED] = found.pop(OURS)
            # Every shape was there twice before what counts.
            recorded = replace(setting, graphs=1, epochs=4)
            found[OURS] = compare(recorded, (OURS,), apart=False)[OURS]
        what = f"training {Path(base).name}, bf16, rows of 32 to {setting.longest}"
        for title, (seconds, peak, reserved) in found.items():
            memory = f"peak {peak / 1e9:.2f} GB (reserved {reserved / 1e9:.2f})"
            figure = f"{1e3 * seconds:.1f} ms a step, {memory}"
            if not title.startswith(OURS):
                ours = [(name, found[name]) for name in (UNRECORDED, OURS) if name in found]
                figure += "".join(
                    f"; {name}: {own / seconds:.3f} of the time, {high / peak:.3f} of the memory"
                    for name, (own, high, _) in ours
                )
            yield Row(f"{what}, {title}", figure)


def sweep(place: Place) -> Iterator[Row]:
    """Eight candidates in one pass, beside eight runs; on a GPU both recorded."""
    shape = "tiny" if place.tiny else "smollm2-135m"
    sizes = {"steps": 1, "longest": 48} if place.tiny else {"steps": 12, "longest": 256}
    narrow = {"device": place.device, "dtype": "bfloat16", "base_dtype": "bfloat16"}
    setting = Task(base=shape, **narrow, **sizes)
    # Recorded is what comes for the second time.
    for epochs, graphs in ((4, True),) if place.device == "cuda" else ((1, False),):
        repeated = replace(setting, epochs=epochs, graphs=int(graphs))
        found = {t: measure_sweep(t, repeated, None) for t in (EIGHT_RUNS, TOGETHER)}
        apart = max(
            abs(one - other) / other
            for one, other in zip(
                *(found[t]["losses"] for t in (TOGETHER, EIGHT_RUNS)), strict=True
            )
        )
        runs, together = (found[title]["seconds"] for title in (EIGHT_RUNS, TOGETHER))
        peaks = (found[title]["peak"] / 1e9 for title in (TOGETHER, EIGHT_RUNS))
        steps = setting.steps * epochs
        yield Row(
            f"sweep of 8 {shape}, {steps} steps, {'recorded' if graphs else '--no-cuda-graphs'}",
            f"{together:.2f} s, eight runs {runs:.2f} s: {together / runs:.3f}",
            "losses at most {:.1g} apart; peaks {:.2f} GB and {:.2f} GB".format(apart, *peaks),
        )


def memory(place: Place) -> Iterator[Row]:
    """One long row through 7B in NF4, with checkpointing: the peak, and what was predicted."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield Row("training in NF4", "not measured: bitsandbytes is not installed")
        return
    shape, length = ("tiny", 64) if place.tiny else ("llama-7b", 2048)
    setting = Setting(
        base=shape,
        device=place.device,
        dtype="bfloat16",
        base_dtype="nf4",
        rows="long",
        longest=length,
        steps=3,
        warm=1,
        checkpointing=1,
    )
    predicted = predicted_peak(setting)
    found = compare(setting, (OURS,))
    if LOOP in peers():
        found |= compare(setting, (LOOP,), apart=not place.tiny)
    title = f"training {shape}, NF4, rank {RANK}, one row of {length}"
    seconds, peak, _ = found[OURS]
    fits = ", ".join(
        f"{'under' if peak < size else 'OVER'} {size / 1e9:g} GB" for size in (16e9, 10e9)
    )
    figure = f"peak {peak / 1e9:.2f} GB ({fits}), {seconds:.2f} s a step"
    yield Row(title, figure if peak < 16e9 else f"FAILED {figure}")
    yield Row(
        f"{title}, --dry-run",
        f"predicts {predicted / 1e9:.2f} GB, {predicted / peak:.3f} of the peak",
    )
    if LOOP in found:
        seconds, peer, _ = found[LOOP]
        figure = f"peak {peer / 1e9:.2f} GB, {seconds:.2f} s a step; loraport: {peak / peer:.3f}"
        yield Row(f"{title}, {LOOP}", f"{figure} of the memory")
    else:
        yield Row(f"{title}, {LOOP}", "not measured: peft is not installed")


def predicted_peak(setting: Setting) -> int:
    """Return what ``loraport train --dry-run`` says of the same run."""
    options = TrainOptions(
        lora=LoraOptions(rank=RANK, targets=tuple(TARGETS)),
        loop=LoopOptions(device=setting.device, dtype=setting.dtype),
        batch_size=setting.batch,
        max_length=setting.longest,
        gradient_checkpointing=bool(setting.checkpointing),
        base_dtype=setting.base_dtype,
    )
    config = config_of(setting.base)
    config.architectures = ["LlamaForCausalLM"]
    with tempfile.TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        return dry_run(str(Path(directory)), options).prediction.total


def peers() -> tuple[str, ...]:
    """Return who can be measured here."""
    there = importlib.util.find_spec("peft") is not None
    return tuple(title for title in PEERS if there or title == OURS)
