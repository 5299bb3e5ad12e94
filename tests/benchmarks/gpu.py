"""Everything that needs a GPU, in one go and one table: parity, latencies, training.

    python tests/benchmarks/gpu.py [--base smollm2] [--steps 50] [--json FILE]

Needs onnxruntime-gpu and onnxruntime-genai (and peft for its side of the training figures); says
so and ends well where there is no GPU. Peers run in the same process, interleaved, medians after
warming up. ``--device cpu`` tries the script itself. Exit code 1 if a section failed.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.exporters.genai_builder import PRECISIONS, build_with_genai
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.base_model import load_model, resolve_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.parity import verify_bundle
from loraport.runtime import Lane, Runtime
from loraport.runtime.generation import first_step_inputs, read_decoder
from loraport.runtime.session import open_session

RANK, ROWS, PROMPT = 16, 8, 64
QUANTIZED = ("int4", "int8")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where and on what everything is measured."""

    base: str
    device: str
    scratch: Path
    steps: int
    precisions: tuple[str, ...]

    def bundle(self, precision: str, *, per_row: bool = False) -> Path:
        """Return a bundle with adapters ``a0`` ... ``a7``, exported when first asked for."""
        out = self.scratch / f"{precision}{'-rows' if per_row else ''}"
        if not out.exists():
            slots = SlotOptions(per_row=per_row)
            options = ExportOptions(provider=self.device, precision=precision, slots=slots)
            export_base(self.base, out, options)
            runtime = Runtime(out, provider=self.device, check=False)
            add_adapters(out, adapters(runtime, ROWS if per_row else 2))
        return out


def adapters(runtime: Runtime, count: int) -> dict[str, Adapter]:
    """Return random adapters of rank 16 on every linear module that has a slot."""
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        modules = {}
        for path, (slot, member) in runtime.manifest.slots.modules().items():
            a = torch.randn(RANK, slot.in_features, generator=generator) / slot.in_features**0.5
            b = torch.randn(member.stop - member.start, RANK, generator=generator) * 0.02
            modules[path] = LoraModule(ModuleKind.LINEAR, a, b, alpha=RANK)
        made[f"a{number}"] = Adapter(modules)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=50, help="repetitions of each timing")
    parser.add_argument("--precisions", default="", help="some of those there are, with commas")
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    missing = why_not(arguments.device)
    if missing:
        print(f"nothing measured: {missing}")
        return
    rows, failed = [Row("machine", machine(arguments.device))], False
    chosen = [name for name in arguments.only.split(",") if name] or list(SECTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        precisions = tuple(arguments.precisions.split(",")) if arguments.precisions else ()
        place = Place(
            arguments.base,
            arguments.device,
            Path(scratch),
            arguments.steps,
            precisions or PRECISIONS[arguments.device],
        )
        for name in chosen:
            start = time.perf_counter()
            try:
                for row in SECTIONS[name](place):
                    rows.append(row)
                    failed |= row.figure.startswith("FAILED")
            except Exception as error:  # one section's failure must not hide the others' figures
                first = (str(error).strip() or repr(error)).splitlines()[0]
                rows.append(Row(name, f"FAILED: {type(error).__name__}: {first}"))
                failed = True
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:{width}}  {row.figure}{'  # ' + row.note if row.note else ''}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(1 if failed else 0)


def why_not(device: str) -> str:
    """Return why nothing can be measured here, or nothing."""
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime has no CUDA provider; install onnxruntime-gpu"
    return ""


def machine(device: str) -> str:
    """Name the device and the versions."""
    import onnxruntime

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return f"{name}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"


def parity(place: Place) -> Iterator[Row]:
    """The whole protocol against PyTorch on the same device, per precision."""
    for precision in place.precisions:
        bundle = place.bundle(precision)
        runtime = Runtime(bundle, provider=place.device, check=False)
        model = load_model(place.base)
        original = {name: value.detach().clone() for name, value in model.named_parameters()}
        if precision in QUANTIZED:
            load_graph_weights(bundle / MODEL_FILE, model)
        report = verify_bundle(
            bundle,
            model.to(place.device),
            adapters(runtime, 2),
            provider=place.device,
            original=original.__getitem__,
        )
        yield from verdict(f"parity {precision}", report)


def encoder(place: Place) -> Iterator[Row]:
    """A sentence encoder's shape in float32, exported by torch.onnx: GenAI has none for CUDA."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(place.base))
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    vocabulary = len(tokenizer)
    model = BertModel(BertConfig(vocab_size=vocabulary, num_hidden_layers=6, **sizes)).eval()
    directory, bundle = place.scratch / "encoder", place.scratch / "encoder-bundle"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    export_base(str(directory), bundle, ExportOptions(precision="fp32"))
    made = adapters(Runtime(bundle, provider=place.device, check=False), 2)
    add_adapters(bundle, made)
    report = verify_bundle(bundle, model.to(place.device), made, provider=place.device)
    yield from verdict("parity fp32, TF32 off, encoder", report)


def verdict(title: str, report: Any) -> Iterator[Row]:
    """Sum a verification up; each check that failed is a line."""
    passed = [check for check in report.checks if check.passed]
    far = max(
        (c.comparison.max_abs for c in passed if " = torch" in c.name and c.comparison), default=0
    )
    figure = f"{len(passed)} of {len(report.checks)} checks, outputs at most {far:.2g} apart"
    yield Row(title, figure, f"allowed {report.tolerance.max_abs:g}")
    for check in report.checks:
        if check.name.startswith("every node on"):
            yield Row(f"{title}: {check.name}", check.detail)
        if not check.passed:
            found = check.comparison.max_abs if check.comparison else ""
            yield Row(f"{title}: {check.name}", f"FAILED {check.detail} {found}")


def swaps(place: Place) -> Iterator[Row]:
    """Another resident adapter in the next run, against loading a session anew."""
    precision = place.precisions[0]
    bundle = place.bundle(precision)
    runtime = Runtime(bundle, provider=place.device, check=False)
    inputs = first_step_inputs(runtime, read_decoder(bundle), list(range(100, 104)))
    first, second = runtime.lane("a0"), runtime.lane("a1")

    def alternating(lanes: Sequence[Lane], inputs: Any = inputs) -> Callable[[], Any]:
        return lambda: [lane.run(inputs, ["logits"]) for lane in lanes]

    stay, swap = medians(place.steps, alternating([first, first]), alternating([first, second]))
    (reload,) = medians(3, lambda: open_session(bundle / MODEL_FILE, provider=place.device), warm=1)
    difference = max(swap - stay, 0.0) / 2
    yield Row(
        f"swap, {precision}",
        f"{1e3 * difference:.3f} ms beside {1e3 * reload:.0f} ms for loading the session",
        "two runs with two adapters less two with one, halved",
    )


def decode(place: Place) -> Iterator[Row]:
    """One token with and without slots, against the builder's own graph."""
    for precision in place.precisions:
        bundle = place.bundle(precision)
        runtime = Runtime(bundle, provider=place.device, check=False)
        plain = place.scratch / f"{precision}-plain"
        if precision in ("fp32", "fp16", "bf16", "int4") and not plain.exists():
            plain.mkdir()
            build_with_genai(
                resolve_base(place.base), plain, precision=precision, provider=place.device
            )
        lanes = {"idle": runtime.lane(None), "active": runtime.lane("a0")}
        if plain.exists():
            session = open_session(plain / MODEL_FILE, provider=place.device)
            lanes = {"plain": Lane(session, None, place.device), **lanes}
        times = medians(place.steps, *(decoding(runtime, lane) for lane in lanes.values()))
        named = dict(zip(lanes, times, strict=True))
        base = named.get("plain", named["idle"])
        figures = ", ".join(
            f"{name} {1e3 * t:.2f} ms ({t / base:.3f})" for name, t in named.items()
        )
        yield Row(f"decode, {precision}, rank {RANK}", figures)


def decoding(runtime: Runtime, lane: Lane) -> Callable[[], Any]:
    """Return what decodes one token after a prompt, from the same cache each time."""
    decoder = read_decoder(runtime.directory)
    first = dict(first_step_inputs(runtime, decoder, [5 + i % 200 for i in range(PROMPT)]))
    outputs = lane.run_on_device(first)
    inputs: dict[str, Any] = {
        "input_ids": np.array([[7]], np.int64),
        "attention_mask": np.ones((1, PROMPT + 1), np.int64),
        "position_ids": np.array([[PROMPT]], np.int64),
    }
    for layer in range(decoder.layers):
        for past, present in zip(decoder.past, decoder.present, strict=True):
            inputs[past % layer] = outputs[present % layer]
    inputs = {name: inputs[name] for name in first}
    return lambda: lane.run_on_device(inputs)["logits"].numpy()


def rows(place: Place) -> Iterator[Row]:
    """Eight rows with eight adapters against eight rows with one."""
    precision = place.precisions[0]
    bundle = place.bundle(precision, per_row=True)
    runtime = Runtime(bundle, provider=place.device, check=False)
    names = [f"a{number}" for number in range(ROWS)]
    one = first_step_inputs(runtime, read_decoder(bundle), [5 + i % 200 for i in range(PROMPT)])
    inputs = {name: np.repeat(np.asarray(value), ROWS, axis=0) for name, value in one.items()}
    several, single = runtime.rows(names), runtime.rows(names[:1])
    got = several.run(inputs, names, ["logits"])["logits"]
    alone = np.concatenate(
        [runtime.rows([name]).run(one, [name], ["logits"])["logits"] for name in names]
    )
    apart = float(np.abs(got.astype(np.float32) - alone.astype(np.float32)).max())
    with_one, with_eight = medians(
        place.steps,
        lambda: single.run(inputs, names[:1] * ROWS, ["logits"]),
        lambda: several.run(inputs, names, ["logits"]),
    )
    yield Row(
        f"{ROWS} rows with {ROWS} adapters, {precision}",
        f"{1e3 * with_eight:.2f} ms, with one {1e3 * with_one:.2f} ms: {with_eight / with_one:.3f}",
        f"logits at most {apart:.2g} from one row at a time",
    )


def medians(count: int, *actions: Callable[[], Any], warm: int = 5) -> list[float]:
    """Return the median seconds of actions, run in turns; each ends with a result on the host."""
    for _ in range(warm):
        for action in actions:
            action()
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(count):
        for times, action in zip(found, actions, strict=True):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


SECTIONS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "parity": parity,
    "encoder": encoder,
    "swaps": swaps,
    "decode": decode,
    "rows": rows,
}


if __name__ == "__main__":
    main()
