"""Step time and peak memory of training, beside PEFT in a plain loop and in transformers' Trainer.

    python tests/benchmarks/train.py [--rows chat] [--device cuda --dtype bfloat16] [--rounds 3]

Every measurement is a process of its own; the three take turns, round after round. All train the
same rows, rank 16 on all linear layers of SmolLM2-135M, AdamW, gradients clipped. Time is the mean
of a process's steps after the first two, the median of the rounds. Memory is the largest resident
set (on a GPU: allocated memory) after the base was loaded.

Rows are 4 a step, each tool in its own batches, PEFT's shuffled and padded as a DataLoader does it:

- ``text``: 32 to 256 random tokens, all learned;
- ``chat``: the same 48 tokens (a system prompt), a question of 8 to 120 and an answer of 8 to 80
  tokens, of which the answer alone is learned.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from loraport.base_model import load_causal_lm
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.batches import IGNORED, Row, collate
from loraport.training.language_model import language_model_loss
from loraport.training.observer import Silent
from loraport.training.packing import make_batches

ROWS, LONGEST, RANK, RATE, WARM = 4, 256, 16, 1e-3, 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(kind, steps):
    numbers = np.random.default_rng(0)

    def tokens(shortest, longest):
        return numbers.integers(3, 40000, numbers.integers(shortest, longest)).tolist()

    system, made = tokens(48, 49), []
    for _ in range(ROWS * steps):
        if kind == "text":
            prompt, answer = [], tokens(32, LONGEST)
        else:
            prompt, answer = system + tokens(8, 121), tokens(8, 81)
        labels = [IGNORED] * len(prompt) + answer
        made.append(Row(tuple(prompt + answer), tuple(labels)))
    return made


def padded(arguments):
    """Batches of rows in a random order, padded to the longest."""
    found = rows(arguments.rows, arguments.steps)
    order = np.random.default_rng(1).permutation(len(found)).reshape(-1, ROWS)
    return [collate([found[index] for index in part], 0) for part in order]


class Clock(Silent):
    """Notes when steps end."""

    def __init__(self):
        self.times = []

    def stepped(self, **_):
        self.tick()

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def seconds(self):
        """Return the mean of the steps that count."""
        return (self.times[-1] - self.times[WARM - 1]) / (len(self.times) - WARM)


def loraport(model, arguments, clock):
    attach(model, LoraOptions(rank=RANK, targets=tuple(TARGETS)))
    data = make_batches(
        model, rows(arguments.rows, arguments.steps), ROWS, 0, 0, packing="auto", max_length=LONGEST
    )
    options = LoopOptions(
        learning_rate=RATE, steps=arguments.steps, device=arguments.device, dtype=arguments.dtype
    )
    train(model, data, language_model_loss, options, observer=clock)


def peft_model(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS)
    ).train()


def inputs(batch):
    mask = torch.ones_like(batch.tokens) if batch.mask is None else batch.mask
    return {"input_ids": batch.tokens, "attention_mask": mask, "labels": batch.labels}


def peft_loop(model, arguments, clock):
    model = peft_model(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    rounded = arguments.dtype == "bfloat16"
    for batch in padded(arguments):
        feeds = {name: tensor.to(arguments.device) for name, tensor in inputs(batch).items()}
        with torch.autocast(arguments.device, torch.bfloat16, enabled=rounded):
            loss = model(**feeds, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()  # every loop shows it
        clock.tick()


def peft_trainer(model, arguments, clock):
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.tick()

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=None)

    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=1,  # a batch of rows that are already side by side
            learning_rate=RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=arguments.device == "cpu",
            bf16=arguments.dtype == "bfloat16",
            dataloader_pin_memory=arguments.device != "cpu",
        )
        InOrder(
            model=peft_model(model),
            args=options,
            train_dataset=[inputs(batch) for batch in padded(arguments)],
            callbacks=[Ticks()],
        ).train()


PEERS = {"PEFT, plain loop": peft_loop, "PEFT, Trainer": peft_trainer, "loraport": loraport}


def measure(title, arguments):
    """Train in this process, and print what it took."""
    clock = Clock()
    model = load_causal_lm("smollm2", dtype=torch.float32, device=arguments.device)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest set so far is forgotten
    PEERS[title](model, arguments, clock)
    if arguments.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"seconds": clock.seconds(), "peak": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", default="text", choices=["text", "chat"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=list(PEERS))
    arguments = parser.parse_args()
    if arguments.child:
        measure(arguments.child, arguments)
        return
    found = {title: [] for title in PEERS}
    for _ in range(arguments.rounds):
        for title in PEERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--child", title]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise SystemExit(f"{title}: {child.stderr.strip().splitlines()[-1]}")
            found[title].append(json.loads(child.stdout.splitlines()[-1]))
    setting = f"{arguments.device}, {arguments.dtype}"
    print(f"SmolLM2-135M, {setting}, {ROWS} rows of {arguments.rows} a step")
    print(f"{'':18} {'ms/step':>8} {'peak MB':>8} {'time to ours':>13} {'memory to ours':>15}")
    medians = {
        title: (
            statistics.median(one["seconds"] for one in made),
            statistics.median(one["peak"] for one in made),
        )
        for title, made in found.items()
    }
    own_time, own_peak = medians["loraport"]
    for title, (step, peak) in medians.items():
        ratios = f"{own_time / step:13.3f} {own_peak / peak:15.3f}"
        print(f"{title:18} {1e3 * step:8.1f} {peak / 1e6:8.0f} {ratios}")


if __name__ == "__main__":
    main()
