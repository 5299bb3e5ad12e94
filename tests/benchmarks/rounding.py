"""How far PyTorch's own halves are from its float32 on SmolLM2, with random adapters and without.

    python tests/benchmarks/rounding.py [--floats float16,bfloat16] [--prompts 6] [--bundle DIR]
        [--moved 4]

What `loraport.parity.rounding` takes as its measure. The adapters are those of ``gpu.py``: rank 16
on all linear layers. With an int4 or int8 bundle the model has that graph's weights. ``--moved``
tells how well that is determined: how far float32 and the halves are from float32 when the
embeddings are moved by less than half a rounding, the largest of so many draws.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from gpu_sections.place import adapters
from torch import nn

from converters.onnx import ExportOptions, export_base
from converters.onnx.modules.graph_weights import load_graph_weights
from loraport.base.loading import load_model, load_tokenizer
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.parity.changes import changes_of
from loraport.parity.prompts import PROMPTS
from loraport.parity.reference import adapted
from loraport.parity.rounding import Rounding


def moved(
    model: nn.Module, other: nn.Module, ids: torch.Tensor, rounding: float, draws: int
) -> tuple[float, int]:
    """Return how far a model with moved embeddings is from one without, and at which token."""
    dtype = next(other.parameters()).dtype
    embeddings = model.get_input_embeddings()(ids)
    expected = model(inputs_embeds=embeddings).logits
    found = []
    for seed in range(draws):
        drawn = torch.rand(embeddings.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        near = embeddings * (1 + drawn * rounding)
        got = other(inputs_embeds=near.to(dtype)).logits
        far = (got.float() - expected).abs().amax(-1)[0]
        found.append((float(far.max()), int(far.argmax())))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--floats", default="float16,bfloat16")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--bundle", type=Path, help="of SmolLM2, instead of exporting in fp32")
    parser.add_argument("--moved", type=int, default=0, metavar="DRAWS")
    arguments = parser.parse_args()
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    original = {name: value.detach().clone() for name, value in model.named_parameters()}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or Path(scratch) / "bundle"
        if arguments.bundle is None:
            export_base("smollm2", bundle, ExportOptions())
        manifest = read_manifest(bundle)
        if manifest.precision in ("int4", "int8"):
            load_graph_weights(bundle / MODEL_FILE, model)
    made = adapters(manifest, 2)
    chosen = {
        "base": [],
        **{name: [(adapter, 1.0)] for name, adapter in made.items()},
        "blended": [(made["a0"], 0.75), (made["a1"], 0.5)],
    }
    prompts = [
        {name: row[name] for name in ("input_ids", "attention_mask")}
        for row in (tokenizer(t, return_tensors="np") for t in PROMPTS[: arguments.prompts])
    ]
    for floats in arguments.floats.split(","):
        rounding = Rounding(model, floats)
        for name, parts in chosen.items():
            own = rounding.measure(prompts, changes_of(parts, model, original.__getitem__))
            found = "no kernels" if own is None else f"{own.max_abs:.3f}, {own.relative:.4f}"
            print(f"{manifest.precision}, {floats}, {name}: max abs, relative {found}", flush=True)
        if not arguments.moved:
            continue
        dtype = getattr(torch, floats)
        halved, eps = copy.deepcopy(model).to(dtype), torch.finfo(dtype).eps
        for number, prompt in enumerate(prompts):
            ids = torch.from_numpy(prompt["input_ids"])
            said = []
            for parts in chosen.values():
                changes = changes_of(parts, model, original.__getitem__)
                with torch.no_grad(), adapted(model, changes), adapted(halved, changes):
                    for other in (model, halved):
                        far, token = moved(model, other, ids, eps, arguments.moved)
                        said.append(f"{far:.2f} at {token}")
            pairs = ", ".join(
                f"{name} {one}, {two}"
                for name, one, two in zip(chosen, said[::2], said[1::2], strict=True)
            )
            print(f"prompt {number}, moved, float32, {floats}: {pairs}", flush=True)


if __name__ == "__main__":
    main()
