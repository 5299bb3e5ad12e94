"""Time and peak memory of a sweep of eight candidates that train together, beside eight runs.

    python tests/benchmarks/sweep.py [--device cuda --dtype bfloat16] [--rounds 3]
    python tests/benchmarks/sweep.py --rows chat --steps 3 [--together 8]

Ranks 4 to 32 and two learning rates on all linear layers of SmolLM2-135M, AdamW, gradients clipped:
as `loraport sweep` trains them (on a GPU all in one pass, on a CPU as many as make it faster, or
``--together``), as `loraport sweep --halving 3` does (given up by their losses on rows a ninth as
many), one after the other as `loraport train` does it, and one after the other with PEFT in a plain
loop. All train one epoch of the same rows, 4 a step (see train.py; short ones of 32 to
47 tokens unless told otherwise), each tool in its own batches. Every measurement is a process of
its own that loads the base once; time counts from there until the last candidate is trained, memory
is the largest resident set (on a GPU: allocated memory) since then. "CPU s" is the time of all
cores, which says more than the clock where a machine has other things to do.

What the candidates learned is compared too: in the sweep they end at the losses they reach alone.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from train import TARGETS, Task, base_model, inputs, padded, rows  # the sibling

from loraport.sweep.groups import group_trials, most_together
from loraport.sweep.halving import shares, worse_half
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement
from loraport.training.kernels.cuda_graphs import RecordedPasses
from loraport.training.kernels.recorder import on_gpu
from loraport.training.kernels.row_attention import use_row_attention
from loraport.training.lora.inject import detach
from loraport.training.losses.language_model import language_model_loss

RANKS, RATES, HALVINGS = (4, 8, 16, 32), (3e-4, 1e-3), 3  # rates that are stable on any rows
TRIALS = [
    Trial(f"r{rank} {rate:g}", LoraOptions(rank=rank, targets=tuple(TARGETS)), rate)
    for rank, rate in product(RANKS, RATES)
]
_SAME = 1e-3  # of a loss: in float32 sums are in another order; bfloat16 rounds that away, too
_SAME_ROUNDED = 2e-2


def batches(model, setting):
    found = rows(setting, model.config.vocab_size)
    few = bool(setting.graphs)
    return make_batches(
        model,
        found,
        setting.batch,
        0,
        0,
        packing="auto",
        max_length=setting.longest,
        few_lengths=few,
    )


def loop(setting, rate):
    return LoopOptions(
        learning_rate=rate,
        steps=setting.steps * setting.epochs,
        device=setting.device,
        dtype=setting.dtype,
    )


def passes(model, setting, together, trials):
    """Divide the candidates as `loraport sweep` does."""
    made = rows(setting, model.config.vocab_size)
    tokens = setting.batch * sum(len(row.tokens) for row in made) / len(made)
    return group_trials(trials, together or most_together(setting.device, tokens))


def sweep(model, setting, together):
    """Return every candidate's last training loss."""
    return trained(model, setting, together, halving=0)


def halved(model, setting, together):
    """Return the last training loss of candidates that are left, and nothing for the others."""
    return trained(model, setting, together, HALVINGS)


def trained(model, setting, together, halving):
    options = loop(setting, RATES[0])  # each candidate has its own rate
    held_out = replace(setting, steps=max(1, setting.steps // 9)) if halving else None
    left, found = TRIALS, {}
    recorder = on_gpu(model) if setting.graphs else None
    for share in shares(halving):
        for group in passes(model, setting, together, left):
            found |= train_together(
                model,
                group,
                batches(model, setting),
                grouped_language_model_loss,
                options,
                validation=batches(model, held_out) if held_out else None,
                until=share,
                starts={trial.name: found[trial.name] for trial in group if trial.name in found},
                recorder=recorder,
            )
        given_up = worse_half(found.values(), share) if share < 1 else {}
        left = [trial for trial in left if trial.name not in given_up]
    names = {trial.name for trial in left}
    return [found[t.name].losses[-1][1] if t.name in names else None for t in TRIALS]


def one_by_one(model, setting, _):
    return [one_run(model, setting, trial) for trial in TRIALS]


def one_run(model, setting, trial):
    attach(model, trial.lora)
    options = loop(setting, trial.learning_rate)
    hidden = RecordedPasses(model, tentative=True) if setting.graphs else None
    with hidden.stream() if hidden else contextlib.nullcontext():
        loss = partial(language_model_loss, hidden=hidden)
        result = train(model, batches(model, setting), loss, options)
    detach(model)
    return result.losses[-1][1]


def peft_one_by_one(model, setting, _):
    return [peft_run(model, setting, trial) for trial in TRIALS]


def peft_run(model, setting, trial):
    from peft import LoraConfig, get_peft_model

    rank = trial.lora.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    adapted = get_peft_model(model, config).train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=0, fused=True)
    for batch in padded(model, setting, setting.epochs):
        feeds = {name: tensor.to(setting.device) for name, tensor in inputs(batch).items()}
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.dtype == "bfloat16"):
            loss = adapted(**feeds, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        last = loss.item()
    adapted.unload()
    return last


PEERS = {
    "PEFT, 8 runs": peft_one_by_one,
    "loraport, 8 runs": one_by_one,
    "loraport, sweep": sweep,
    "loraport, halved": halved,
}
ALONE, TOGETHER = "loraport, 8 runs", "loraport, sweep"
OURS = (TOGETHER, "loraport, halved")


def measure(title, setting, together):
    """Train in this process, and return what it took and what was learned."""
    model = base_model(setting)
    if setting.graphs:
        placement = choose_placement(setting.device, setting.dtype)
        use_row_attention(model, placement, setting.longest)
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest set so far is forgotten
    start, cpu = time.perf_counter(), time.process_time()
    losses = PEERS[title](model, setting, together)
    if setting.device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "losses": losses}


def measure_apart(title, setting, together):
    command = [sys.executable, __file__, *setting.flags(), "--child", title]
    command += [f"--together={together}"] if together else []
    # As the command line has it: threads that wait do not spin.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise SystemExit(f"{title}: {(child.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def require_same(found, setting):
    """Refuse figures of a sweep that learns something else; return how far apart it is."""
    one, few, other = (found[title][-1]["losses"] for title in (*OURS, ALONE))
    if few.count(None) != len(TRIALS) - 1 or None in one:
        raise SystemExit(f"after halving {few}: expected one candidate that is left")
    pairs = [*zip(one, other, strict=True), *zip(few, other, strict=True)]
    apart = max(abs(a - b) / b for a, b in pairs if a is not None)
    if not apart <= (_SAME if setting.dtype == "float32" else _SAME_ROUNDED):
        raise SystemExit(f"in the sweep {one}, alone {other}: expected the same losses")
    if not max(other) - min(other) > 10 * apart * max(other):
        raise SystemExit(f"the candidates' losses {other}: expected some that differ")
    return apart


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    Task.add_flags(parser, longest=48, steps=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--together", type=int, help="most candidates in one pass")
    parser.add_argument("--child", choices=list(PEERS))
    values = vars(parser.parse_args())
    rounds, child, most = (values.pop(name) for name in ("rounds", "child", "together"))
    setting = Task(**values)
    if child:
        print(json.dumps(measure(child, setting, most)))
        return
    found = {title: [] for title in PEERS}
    for _ in range(rounds):
        for title in PEERS:
            found[title].append(measure_apart(title, setting, most))
    apart = require_same(found, setting)
    print(
        f"{setting.base}, {setting.device}, {setting.dtype}, {len(TRIALS)} candidates, "
        f"{setting.steps} steps of {setting.batch} rows of {setting.rows}; last losses in the "
        f"sweep and alone at most {apart:.1e} apart"
    )
    ours = [f"{title.removeprefix('loraport, '):>20}" for title in OURS]
    print(f"{'':20} {'s':>7} {'CPU s':>7} {'peak MB':>8}   to it: time, CPU time, memory")
    print(f"{'':46}{' '.join(ours)}")
    medians = {
        title: [statistics.median(one[key] for one in made) for key in ("seconds", "cpu", "peak")]
        for title, made in found.items()
    }
    for title, figures in medians.items():
        seconds, cpu, peak = figures
        shown = [
            " ".join(f"{mine / its:6.3f}" for mine, its in zip(medians[each], figures, strict=True))
            for each in OURS
        ]
        print(f"{title:20} {seconds:7.1f} {cpu:7.1f} {peak / 1e6:8.0f}  {' '.join(shown)}")


if __name__ == "__main__":
    main()
