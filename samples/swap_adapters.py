"""Train two adapters, export the base once, swap them in the exported model, prove the numbers.

    python samples/swap_adapters.py

The same story as ``loraport demo``, in the calls you would make from your own code.
"""

from pathlib import Path

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_base
from loraport.base.loading import load_model
from loraport.parity import verify_bundle
from loraport.runtime import Runtime, Sampling, TextGenerator
from loraport.training import LoopOptions, LoraOptions, TrainOptions, train_language_model

BASE = "smollm2"  # or a model directory, a .gguf file, a hub name
DATA = Path(__file__).parent / "data"
OUT = Path("swap-adapters")
PROMPT = "Your rider took my pizza to Mill Road instead of Mill Lane and it arrived stone cold."


def main(steps: int = 60) -> None:
    options = TrainOptions(
        lora=LoraOptions(rank=8), loop=LoopOptions(learning_rate=2e-3, steps=steps)
    )
    for task in ("tickets", "captain"):
        summary = train_language_model(
            BASE,
            DATA / f"{task}.jsonl",
            OUT / task,
            options,
            validation=DATA / f"{task}.heldout.jsonl",
            force=True,
        )
        print(f"{task}: loss {summary.base_validation_loss:.3f} → {summary.validation_loss:.3f}")

    adapters = {task: read_adapter(OUT / task) for task in ("tickets", "captain")}
    export_base(BASE, OUT / "bundle", force=True)
    add_adapters(OUT / "bundle", adapters)

    model = TextGenerator(Runtime(OUT / "bundle"))
    for adapter in (None, "tickets", "captain", {"tickets": 0.4, "captain": 0.8}, None):
        text = model.generate(PROMPT, adapter, Sampling(max_new_tokens=48))
        print(f"{adapter}: {' '.join(text.split())}")

    report = verify_bundle(OUT / "bundle", load_model(BASE), adapters)
    for check in report.checks:
        print("ok    " if check.passed else "FAILED", check.name, check.detail)
    if not report.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
