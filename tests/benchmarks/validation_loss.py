"""The same training run in loraport and in PEFT, seed by seed: where the validation loss ends.

    python tests/benchmarks/validation_loss.py [--seeds 3] [--epochs 2] [--rank 16] [--lr 1e-3]
    python tests/benchmarks/validation_loss.py --base BASE --data ROWS --validation ROWS

Loraport's side is `loraport train` as it comes. PEFT's side shares no code with it: transformers'
tokenizer writes the chats and says where answers begin, rows are padded, logits are whole, and a
plain loop steps AdamW by transformers' cosine schedule. It runs twice for each seed:

- with the *same draws*: loraport's first matrices, and its rows in its order. What is left is
  arithmetic, so the losses should agree to some digits;
- with *its own*: PEFT's first matrices and a DataLoader's order, as somebody has it who moves from
  one tool to the other. These can agree no better than seeds do; the last line says how far the
  means are apart in standard errors of their difference.

Everything in float32 on the CPU: chats, rank 16 on all linear layers, 4 rows a batch and two
batches a step. For SmolLM2 it takes half an hour on two cores; fewer rows or epochs take less.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from train import TARGETS  # the sibling
from transformers import get_cosine_schedule_with_warmup

from loraport.base.loading import load_causal_lm, load_tokenizer
from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach
from loraport.training.data.batches import RowBatches
from loraport.training.data.tokens import read_rows
from loraport.training.lora.inject import detach
from loraport.training.text import train_language_model

DATA = Path(__file__).parents[2] / "samples" / "data"
IGNORED, LONGEST = -100, 512


def own_options(args, seed):
    return TrainOptions(
        lora=LoraOptions(rank=args.rank, targets=tuple(TARGETS), seed=seed),
        loop=LoopOptions(
            learning_rate=args.lr,
            epochs=args.epochs,
            accumulate=args.accumulate,
            weight_decay=args.weight_decay,
            seed=seed,
            device="cpu",
            dtype="float32",
            save_every=0,
        ),
        batch_size=args.batch_size,
        max_length=LONGEST,
        base_dtype="float32",
    )


def with_loraport(args, seed):
    """Return the validation losses of the base and of the adapter."""
    with tempfile.TemporaryDirectory() as scratch:
        summary = train_language_model(
            args.base,
            args.data,
            Path(scratch) / "adapter",
            own_options(args, seed),
            validation=args.validation,
        )
    return summary.base_validation_loss, summary.validation_loss


def chats(path, tokenizer):
    """Return each chat of one answer as tokens and labels, as transformers writes it."""
    made = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        texts = [
            tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
            for part, prompt in ((messages[:-1], True), (messages, False))
        ]
        # What a template writes after the end of a turn is never generated.
        whole = texts[1][: texts[1].rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]
        prompt, tokens = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (texts[0], whole)
        )
        assert tokens[: len(prompt)] == prompt
        made.append((tokens, [IGNORED] * len(prompt) + tokens[len(prompt) :]))
    return made


def padded(rows):
    longest = max(len(tokens) for tokens, _ in rows)
    made = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, labels in rows:
        more = longest - len(tokens)
        made["input_ids"].append([*tokens, *[0] * more])
        made["attention_mask"].append([1] * len(tokens) + [0] * more)
        made["labels"].append([*labels, *[IGNORED] * more])
    return {name: torch.tensor(values) for name, values in made.items()}


def sums(model, batch):
    """Return the summed loss of a batch, and of how many tokens."""
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    return model(**batch, use_cache=False).loss * count, int(count)


def mean_loss(model, rows):
    model.eval()
    with torch.no_grad():
        parts = [sums(model, padded(rows[at : at + 4])) for at in range(0, len(rows), 4)]
    total, counted = (sum(float(one) for one in column) for column in zip(*parts, strict=True))
    return total / counted


def with_peft(args, seed, epochs, held_out, start=None):
    """Return the validation losses of the base and of the adapter.

    Args:
        args: Rank, rates and batches.
        seed: PEFT's.
        epochs: For each epoch, its batches of rows.
        held_out: Rows to validate with.
        start: Module path → A at the start; PEFT's own where ``None``.
    """
    torch.manual_seed(seed)
    base = load_causal_lm(args.base, dtype=torch.float32, device="cpu")
    model = get_peft_model(
        base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS)
    )
    for path, matrix in (start or {}).items():
        layer = model.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data.copy_(matrix)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    group = {"params": parameters, "initial_lr": args.lr}
    optimizer = torch.optim.AdamW([group], lr=args.lr, weight_decay=args.weight_decay)
    steps = args.epochs * -(-len(epochs[0]) // args.accumulate)
    # Loraport's first step learns, and so does its last: the rates of steps 1 to n of n + 1.
    rising = round(0.05 * steps)
    rates = get_cosine_schedule_with_warmup(optimizer, rising, steps + 1, last_epoch=0)
    before = mean_loss(model, held_out)
    model.train()
    for batches in epochs:
        for at in range(0, len(batches), args.accumulate):
            parts = [padded(rows) for rows in batches[at : at + args.accumulate]]
            counted = sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts)
            for part in parts:
                (sums(model, part)[0] / counted).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
    return before, mean_loss(model, held_out)


def same_draws(args, seed, tokenizer):
    """Return loraport's rows in its order, epoch by epoch, and its first A of every layer."""
    rows = read_rows(args.data, tokenizer, LONGEST).rows
    batches = RowBatches(rows, args.batch_size, 0, seed, layout=lambda chosen, _: chosen)
    epochs = [
        [[(list(row.tokens), list(row.labels)) for row in batch] for batch in batches.epoch(number)]
        for number in range(args.epochs)
    ]
    model = load_causal_lm(args.base, dtype=torch.float32, device="cpu")
    layers = attach(model, own_options(args, seed).lora)
    start = {path: layer.lora_A.detach().clone() for path, layer in layers.items()}
    detach(model)
    return epochs, start


def own_draws(args, seed, tokenizer):
    """Return the rows in orders that a DataLoader draws."""
    loader = DataLoader(
        chats(args.data, tokenizer),
        args.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list,
    )
    return [list(loader) for _ in range(args.epochs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--data", type=Path, default=DATA / "captain.jsonl")
    parser.add_argument("--validation", type=Path, default=DATA / "captain.heldout.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.base)
    held_out = chats(args.validation, tokenizer)
    print(
        f"{'seed':>4} {'base':>10} {'loraport':>10} {'PEFT, same draws':>17} {'PEFT, its own':>14}"
    )
    found = []
    for seed in range(args.seeds):
        base, own = with_loraport(args, seed)
        epochs, start = same_draws(args, seed, tokenizer)
        their_base, same = with_peft(args, seed, epochs, held_out, start)
        _, theirs = with_peft(args, seed, own_draws(args, seed, tokenizer), held_out)
        print(f"{seed:4} {base:10.6f} {own:10.6f} {same:17.6f} {theirs:14.6f}", flush=True)
        found.append((abs(base - their_base) / base, own, same, theirs))
    bases, *ends = zip(*found, strict=True)
    means = [statistics.mean(column) for column in ends]
    print(f"{'mean':15} {means[0]:10.6f} {means[1]:17.6f} {means[2]:14.6f}")
    apart = max(abs(own - same) / own for own, same in zip(ends[0], ends[1], strict=True))
    print(f"relative: bases at most {max(bases):.1e} apart, the same draws at most {apart:.1e}")
    if args.seeds > 1:
        spreads = [statistics.stdev(column) for column in ends]
        print(f"{'between seeds':15} {spreads[0]:10.6f} {spreads[1]:17.6f} {spreads[2]:14.6f}")
        error = ((spreads[0] ** 2 + spreads[2] ** 2) / args.seeds) ** 0.5
        print(f"own draws: means {abs(means[0] - means[2]) / error:.2f} standard errors apart")


if __name__ == "__main__":
    main()
