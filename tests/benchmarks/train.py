"""Step time and peak memory of training, beside PEFT in a plain loop and in transformers' Trainer.

    python tests/benchmarks/train.py [--rows chat] [--device cuda --dtype bfloat16] [--rounds 3]
    python tests/benchmarks/train.py --base llama-1b ...      (random weights: see random_llamas.py)
    python tests/benchmarks/train.py --base narrow --longest 40 --steps 60    (the host's time)

Every measurement is a process of its own; the three take turns, round after round. All train the
same rows, rank 16 on all linear layers, AdamW, gradients clipped, on the same frozen base. Time is
the mean of a process's steps after the first two (of the last epoch, with several), the median of
the rounds. Memory is the largest resident set (on a GPU: allocated memory) after the base was
loaded.

Rows are 4 a step, each tool in its own batches, PEFT's shuffled and padded as a DataLoader does it:

- ``text``: 32 to 256 random tokens (``--longest``), all learned;
- ``chat``: the same 48 tokens (a system prompt), a question of 8 to 120 and an answer of 8 to 80
  tokens, of which the answer alone is learned;
- ``long``: one row a step, of ``--longest`` tokens, all learned.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from random_llamas import SHAPES, random_llama

from loraport.base.loading import load_causal_lm
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.base.frozen_base import checkpoint_activations
from loraport.training.data.batches import IGNORED, Row, collate
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement
from loraport.training.kernels.compiled import compiled_layers
from loraport.training.kernels.cuda_graphs import RecordedPasses
from loraport.training.kernels.liger_kernels import liger_kernels
from loraport.training.kernels.row_attention import use_row_attention
from loraport.training.losses.language_model import language_model_loss
from loraport.training.run.observer import Silent

ROWS, RANK, RATE = 4, 16, 1e-3
FIGURES = ("seconds", "peak", "reserved")
_LONGEST_CHILD = 600  # seconds
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHOICES = {
    "device": ["cpu", "cuda"],
    "dtype": ["float32", "bfloat16"],
    "base_dtype": ["float32", "bfloat16", "nf4"],
    "rows": ["text", "chat", "long"],
}


@dataclass(frozen=True)
class Task:
    """What is trained, and on what."""

    base: str = "smollm2"
    device: str = "cpu"
    dtype: str = "float32"
    base_dtype: str = "float32"
    rows: str = "text"
    longest: int = 256
    steps: int = 12
    epochs: int = 1  # of so many steps each
    graphs: int = 0  # loraport records its passes

    @property
    def batch(self):
        return 1 if self.rows == "long" else ROWS

    def flags(self):
        return [f"--{key.replace('_', '-')}={value}" for key, value in asdict(self).items()]

    @classmethod
    def add_flags(cls, parser, **defaults):
        for field in fields(cls):
            flag = f"--{field.name.replace('_', '-')}"
            default, chosen = defaults.get(field.name, field.default), CHOICES.get(field.name)
            parser.add_argument(flag, default=default, type=field.type, choices=chosen)


@dataclass(frozen=True)
class Setting(Task):
    """What else the three tools of this benchmark are told; of several epochs the last counts."""

    warm: int = 2
    checkpointing: int = 0
    more: int = 0  # tokens in every row
    compile: int = 0  # of loraport's alone, as what follows
    liger: int = 0

    @property
    def all_steps(self):
        return self.steps * self.epochs

    @property
    def uncounted(self):
        return self.warm if self.epochs == 1 else self.all_steps - self.steps


def rows(setting, vocabulary, more=0):
    numbers = np.random.default_rng(0)
    highest = min(40000, vocabulary)

    def tokens(shortest, longest):
        count = numbers.integers(shortest, longest) + more
        return numbers.integers(3, highest, count).tolist()

    system, made = tokens(48, 49), []
    for _ in range(setting.batch * setting.steps):
        if setting.rows == "chat":
            prompt, answer = system + tokens(8, 121), tokens(8, 81)
        else:
            shortest = setting.longest if setting.rows == "long" else 32
            prompt, answer = [], tokens(shortest, setting.longest + (setting.rows == "long"))
        labels = [IGNORED] * len(prompt) + answer
        made.append(Row(tuple(prompt + answer), tuple(labels)))
    return made


def padded(model, setting, epochs=1, more=0):
    """Batches of rows in a random order each epoch, padded to the longest."""
    found, numbers = rows(setting, model.config.vocab_size, more), np.random.default_rng(1)
    orders = [numbers.permutation(len(found)) for _ in range(epochs)]
    parts = np.concatenate(orders).reshape(-1, setting.batch)
    return [collate([found[index] for index in part], 0) for part in parts]


class Clock(Silent):
    """Notes when steps end; a GPU is waited for only where that counts."""

    def __init__(self, setting):
        self.setting, self.times = setting, []

    def stepped(self, **_):
        self.tick()

    def tick(self):
        counts = len(self.times) + 1 in (self.setting.uncounted, self.setting.all_steps)
        if counts and self.setting.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self):
        """Return the mean of the steps that count."""
        warm = self.setting.uncounted
        return (self.times[-1] - self.times[warm - 1]) / (len(self.times) - warm)


def loraport(model, setting, clock):
    device = torch.device(setting.device)
    with liger_kernels(model, device) if setting.liger else contextlib.nullcontext():
        loraport_with(model, setting, clock)


def loraport_with(model, setting, clock):
    if setting.graphs:
        placement = choose_placement(setting.device, setting.dtype)
        use_row_attention(model, placement, setting.longest + setting.more)
    attach(model, LoraOptions(rank=RANK, targets=tuple(TARGETS)))
    if setting.checkpointing:
        checkpoint_activations(model)
    found = rows(setting, model.config.vocab_size, setting.more)
    longest = setting.longest + setting.more
    data = make_batches(
        model,
        found,
        setting.batch,
        0,
        0,
        packing="auto",
        max_length=longest,
        few_lengths=bool(setting.graphs),
    )
    hidden = RecordedPasses(model) if setting.graphs else None
    options = LoopOptions(
        learning_rate=RATE, steps=setting.all_steps, device=setting.device, dtype=setting.dtype
    )
    compiled = compiled_layers(model) if setting.compile else contextlib.nullcontext()
    with compiled, hidden.stream() if hidden else contextlib.nullcontext():
        train(model, data, partial(language_model_loss, hidden=hidden), options, observer=clock)


def peft_model(model, setting):
    from peft import LoraConfig, get_peft_model

    model.is_loaded_in_4bit = setting.base_dtype == "nf4"  # as transformers marks it
    if setting.checkpointing:
        checkpoint_activations(model)
    return get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    ).train()


def inputs(batch):
    mask = torch.ones_like(batch.tokens) if batch.mask is None else batch.mask
    return {"input_ids": batch.tokens, "attention_mask": mask, "labels": batch.labels}


def peft_loop(model, setting, clock):
    batches = padded(model, setting, setting.epochs, setting.more)
    model = peft_model(model, setting)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    rounded = setting.dtype == "bfloat16"
    for batch in batches:
        feeds = {name: tensor.to(setting.device) for name, tensor in inputs(batch).items()}
        with torch.autocast(setting.device, torch.bfloat16, enabled=rounded):
            loss = model(**feeds, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()  # every loop shows it
        clock.tick()


def peft_trainer(model, setting, clock):
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=None)

    batches = padded(model, setting, setting.epochs, setting.more)
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            scratch,
            max_steps=setting.all_steps,
            per_device_train_batch_size=1,  # a batch of rows that are already side by side
            learning_rate=RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=setting.device == "cpu",
            bf16=setting.dtype == "bfloat16",
            dataloader_pin_memory=setting.device != "cpu",
        )
        InOrder(
            model=peft_model(model, setting),
            args=options,
            train_dataset=[inputs(batch) for batch in batches],
            callbacks=[Ticks()],
        ).train()


PEERS = {"PEFT, plain loop": peft_loop, "PEFT, Trainer": peft_trainer, "loraport": loraport}


def base_model(setting):
    if setting.base in SHAPES:
        return random_llama(setting.base, setting.device, setting.base_dtype)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting.base_dtype]
    return load_causal_lm(setting.base, dtype=dtype, device=setting.device)


def measure(title, setting):
    """Train in this process, and return what it took."""
    clock = Clock(setting)
    if setting.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # of what was measured before in this process
    model = base_model(setting)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest set so far is forgotten
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer has something to say
        PEERS[title](model, setting, clock)
    if setting.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        reserved = peak
    return {"seconds": clock.seconds(), "peak": peak, "reserved": reserved}


def measure_apart(title, setting):
    """Train in a process of its own, so that one's memory is not another's."""
    command = [sys.executable, __file__, *setting.flags(), "--child", title]
    child = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_CHILD)
    if child.returncode:
        raise RuntimeError(f"{title}: {(child.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def compare(setting, titles=tuple(PEERS), rounds=1, apart=True):
    """Measure peers in turns; return title → median seconds a step, peak and reserved bytes.

    Args:
        setting: What they train.
        titles: Which peers.
        rounds: How often.
        apart: Each in a process of its own; otherwise memory means little on a CPU, and each has
            rows of a few tokens more than the one before: what a GPU's libraries have planned for
            the shapes of one must not serve the next.

    Raises:
        RuntimeError: If one of them fails, with its last line.
    """
    found = {title: [] for title in titles}
    for _ in range(rounds):
        for place, title in enumerate(titles):
            its_own = setting if apart else replace(setting, more=place)
            found[title].append((measure_apart if apart else measure)(title, its_own))
    return {
        title: tuple(statistics.median(one[key] for one in made) for key in FIGURES)
        for title, made in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    Setting.add_flags(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=list(PEERS))
    values = vars(parser.parse_args())
    rounds, child = values.pop("rounds"), values.pop("child")
    setting = Setting(**values)
    if child:
        print(json.dumps(measure(child, setting)))
        return
    try:
        medians = compare(setting, rounds=rounds)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    kind = f"{setting.device}, {setting.dtype}, base in {setting.base_dtype}"
    print(f"{setting.base}, {kind}, {setting.batch} rows of {setting.rows} a step")
    print(f"{'':18} {'ms/step':>8} {'peak MB':>8} {'time to ours':>13} {'memory to ours':>15}")
    own_time, own_peak, _ = medians["loraport"]
    for title, (step, peak, _) in medians.items():
        ratios = f"{own_time / step:13.3f} {own_peak / peak:15.3f}"
        print(f"{title:18} {1e3 * step:8.1f} {peak / 1e6:8.0f} {ratios}")


if __name__ == "__main__":
    main()
