"""What two processes do for test_processes.py: run by torchrun, once for all its tests.

    torchrun --nproc-per-node 2 two_processes.py DIRECTORY SCENARIO...

Each scenario trains in DIRECTORY/NAME; the first process leaves the model's tensors and what
`train` returned there. Importable too, for the one process to compare with.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loraport.training import LoopOptions, LoraOptions, LossSum, attach, lora_layers, train
from loraport.training.data.batches import IGNORED, Row, RowBatches
from loraport.training.distributed.processes import joined, processes_now
from loraport.training.losses.language_model import language_model_loss

LOOP = LoopOptions(
    steps=6, accumulate=2, learning_rate=0.01, save_every=2, keep=99, validate_every=3, device="cpu"
)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    ).double()


def rows(count=13):
    """Rows of very different length, of which very different numbers of tokens count."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        length = 4 + 3 * (index % 7)
        tokens = torch.randint(0, 64, (length,), generator=generator).tolist()
        counted = 1 + (index * 5) % (length - 1)
        made.append(Row(tuple(tokens), (IGNORED,) * (length - counted) + tuple(tokens[-counted:])))
    return made


def mean_of_each(model, batch):
    """What averaging the processes' means comes to: every process's part weighs the same."""
    part = language_model_loss(model, batch)
    return LossSum(part.total / part.weight, 1.0)


def lm(work=None, *, loss=language_model_loss, lora=None, resume=False, **options):
    """A language model; 13 rows in batches of 5, so that the last leaves some without a row."""
    model = llama()
    attach(model, lora or LoraOptions(rank=3, seed=1))
    loop = replace(LOOP, **options)
    batches, held_out = RowBatches(rows(), 5, 0, seed=3), RowBatches(rows(3), 4, 0, None)
    result = train(model, batches, loss, loop, validation=held_out, work=work, resume=resume)
    return model, result


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):  # [batch, 1, 8, 8]
        return self.head(F.relu(self.conv(x)).amax(dim=(2, 3)))


def images(kind, **options):
    """Batches that nothing knows how to divide: a list, or a loader that draws its order."""
    torch.manual_seed(7)
    x, kinds = torch.randn(22, 1, 8, 8).double(), torch.arange(22) % 3
    model = ConvNet().double()
    attach(model, LoraOptions(rank=3, targets=("conv", "head"), dropout=0.0))
    if kind == "list":
        batches = [(x[a:b], kinds[a:b]) for a, b in ((0, 3), (3, 15), (15, 22))]
    else:
        batches = DataLoader(TensorDataset(x, kinds), batch_size=5, shuffle=True)

    def summed(model, batch):
        value = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return LossSum(value, len(batch[1]))

    loop = LoopOptions(steps=5, learning_rate=0.01, device="cpu", **options)
    return model, train(model, batches, summed, loop, validation=batches)


def failing(work):
    """The second process fails alone, in its third batch, while the first waits for it."""
    seen = []

    def loss(model, batch):
        seen.append(1)
        if processes_now().rank == 1 and len(seen) == 3:
            raise LoraportError("the second process has had enough")
        return F.cross_entropy(model(batch[0]), batch[1])

    model = ConvNet()
    attach(model, LoraOptions(rank=2, targets=("head",)))
    batch = (torch.randn(4, 1, 8, 8), torch.arange(4) % 3)
    train(model, [batch] * 2, loss, LoopOptions(steps=9, accumulate=2, device="cpu"), work=work)


DROPOUT = LoraOptions(rank=3, dropout=0.3)
SCENARIOS = {
    "plain": lambda work: lm(work),
    "sharded": lambda work: lm(work, shard_base=True),
    "mean of each": lambda work: lm(work, loss=mean_of_each),
    "resumed": lambda work: lm(work, resume=True),
    "resumed sharded": lambda work: lm(work, resume=True, shard_base=True),
    "dropout": lambda work: lm(work, lora=DROPOUT),
    "dropout resumed": lambda work: lm(work, lora=DROPOUT, resume=True),
    "list": lambda _: images("list", accumulate=3),
    "loader": lambda _: images("loader", accumulate=2),
}


def facts(model, result):
    """What is compared: every matrix trained, and what the run says of itself."""
    tensors = {
        f"{path}.{name}": getattr(layer, name).detach().clone()
        for path, layer in lora_layers(model).items()
        for name in ("lora_A", "lora_B")
    }
    return tensors, {
        "losses": result.losses,
        "validations": result.validations,
        "tokens": result.tokens,
    }


def main(directory, names):
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        for name in names:
            if name == "failing":
                failing(directory / name)
            model, result = SCENARIOS[name](directory / name)
            tensors, told = facts(model, result)
            # Of the blocks: what is outside them stays gathered after a forward pass.
            told["shards"] = sorted(
                {
                    type(parameter).__name__
                    for key, parameter in model.named_parameters()
                    if "lora_" not in key and ".layers." in key
                }
            )
            torch.save((tensors, told), directory / f"{name}.{processes.rank}.pt")


if __name__ == "__main__":
    from loraport.errors import LoraportError

    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except LoraportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
