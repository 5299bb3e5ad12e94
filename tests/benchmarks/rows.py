"""Eight rows with eight different adapters beside eight rows with one, in one run.

    python tests/benchmarks/rows.py [--precision int4] [--rank 16] [--steps 40] [--profile]

A step of each variant in turn, medians compared: one token after a prompt of 64 (decode), and the
prompt itself (prefill). First every row is compared with a run of its own, and must differ from a
run with its neighbour's adapter. Adapters are random, rank R on all linear layers.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from decode import random_adapter  # the sibling benchmarks
from timing import medians

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.exporters.genai_builder import build_with_genai
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter
from loraport.base_model import resolve_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.parity.tolerances import tolerance_for
from loraport.runtime import Lane, Runtime
from loraport.runtime.generation import first_step_inputs, read_decoder
from loraport.runtime.rows import Rows
from loraport.runtime.session import open_session

ROWS, PROMPT = 8, 64
STRENGTH = 8
PROFILED_STEPS = 3
Inputs = Mapping[str, Any]


def rows_bundle(where: Path, precision: str, rank: int) -> list[str]:
    """Export a bundle with slots per row where there is none yet; return its adapters' names."""
    if not where.exists():
        slots = SlotOptions(per_row=True)
        export_base("smollm2", where, ExportOptions(precision=precision, slots=slots))
    return with_adapters(where, rank)


def with_adapters(bundle: Path, rank: int) -> list[str]:
    """Add as many random adapters as there are rows; return their names."""
    runtime = Runtime(bundle, check=False)
    names = [f"strong{rank}-{number}" for number in range(ROWS)]
    missing = {
        name: strong(random_adapter(runtime, rank, 1 + number))
        for number, name in enumerate(names)
        if name not in runtime.adapters
    }
    if missing:
        add_adapters(bundle, missing)
    return names


def strong(adapter: Adapter) -> Adapter:
    """Return an adapter whose effect stands out from rounding."""
    modules = {
        path: replace(one, alpha=STRENGTH * one.alpha) for path, one in adapter.modules.items()
    }
    return Adapter(modules)


def prompts(runtime: Runtime) -> dict[str, Any]:
    """Return the inputs of a run over another prompt in each row."""
    decoder = read_decoder(runtime.directory)
    random = np.random.default_rng(0)
    tokens = random.integers(100, 40_000, (ROWS, PROMPT))
    each = [first_step_inputs(runtime, decoder, list(map(int, row))) for row in tokens]
    return {name: np.concatenate([one[name] for one in each]) for name in each[0]}


def next_token(runtime: Runtime, prompt: Inputs, outputs: Inputs) -> dict[str, Any]:
    """Return the inputs that decode one token after a prompt, given the outputs for it."""
    decoder = read_decoder(runtime.directory)
    inputs: dict[str, Any] = {
        "input_ids": outputs["logits"][:, -1].argmax(-1)[:, None],
        "attention_mask": np.ones((ROWS, PROMPT + 1), np.int64),
        "position_ids": np.full((ROWS, 1), PROMPT, np.int64),
    }
    for layer in range(decoder.layers):
        for past, present in zip(decoder.past, decoder.present, strict=True):
            inputs[past % layer] = outputs[present % layer]
    return {name: inputs[name] for name in prompt}


def row(inputs: Inputs, number: int) -> dict[str, Any]:
    return {name: value[number : number + 1] for name, value in inputs.items()}


def verify(bundle: Path, names: Sequence[str], inputs: Inputs) -> str:
    """Compare each row with its own run, and with one that has the neighbour's adapter.

    Kernels of 4-bit products round activations to 8 bits, in another way for one row than for
    eight; here they are asked not to.
    """
    runtime = Runtime(bundle, check=False, float32_activations=True)
    rows = runtime.rows(names)
    got = rows.run(inputs, names, ["logits"])["logits"]
    own, other = [], []
    for number in range(ROWS):
        alone = row(inputs, number)
        neighbour = names[(number + 1) % ROWS]
        own.append(runtime.run(alone, names[number], ["logits"])["logits"])
        other.append(runtime.run(alone, neighbour, ["logits"])["logits"])
    differences = np.abs(got - np.concatenate(own)).reshape(ROWS, -1).max(1)
    effects = np.abs(got - np.concatenate(other)).reshape(ROWS, -1).max(1)
    bound = tolerance_for(runtime.manifest.precision, "cpu").max_abs
    if not (differences <= bound).all():
        raise SystemExit(f"rows differ from their own runs: {differences}, allowed {bound}")
    if not (effects > 10 * bound).all():
        raise SystemExit(f"rows are no other than with the neighbour's adapter: {effects}")
    return (
        f"logits at most {differences.max():.2g} from each row's own run, at least "
        f"{effects.min():.2g} from one with its neighbour's adapter"
    )


def variants(
    plain: Lane, ordinary: Runtime | None, runtime: Runtime, names: Sequence[str], inputs: Inputs
) -> dict[str, Callable[[], Any]]:
    """Return what is timed: title → a run that ends with logits in numpy's hands."""
    several, single = runtime.rows(names), runtime.rows(names[:1])
    alone = [(runtime.lane(name), row(inputs, number)) for number, name in enumerate(names)]
    made: dict[str, Callable[[], Any]] = {
        "graph without slots": lambda: logits(plain, inputs),
        "one adapter": lambda: logits(single, inputs, names[:1] * ROWS),
        "eight adapters": lambda: logits(several, inputs, names),
        "eight runs, one by one": lambda: [logits(lane, one) for lane, one in alone],
    }
    if ordinary is not None:
        lane = ordinary.lane(names[0])
        made["one adapter, slots not per row"] = lambda: logits(lane, inputs)
    return made


def logits(lane: Lane | Rows, inputs: Inputs, adapters: Sequence[str] = ()) -> Any:
    """Run once as generation does: the cache stays where it is, the logits are read."""
    if isinstance(lane, Rows):
        outputs = lane._lane.run_on_device(lane.with_ids(inputs, adapters))
    else:
        outputs = lane.run_on_device(inputs)
    return outputs["logits"].numpy()


def profile(bundle: Path, names: Sequence[str], inputs: Inputs, scratch: Path) -> None:
    """Print where the time of a step goes, by kind of node, with one adapter and with eight."""
    sessions, runs = [], []
    for number, chosen in enumerate((names[:1], names)):
        runtime = Runtime(bundle, check=False)
        runtime.session = open_session(bundle / MODEL_FILE, profile=scratch / str(number))
        sessions.append(runtime.session)
        runs.append((runtime.rows(chosen), list(chosen) * (ROWS // len(chosen))))
    for _ in range(PROFILED_STEPS):
        for rows, picked in runs:
            logits(rows, inputs, picked)
    one, eight = (node_kinds(Path(session.end_profiling())) for session in sessions)
    print(f"{'us/step, profiled':34} {'one':>9} {'eight':>9} {'nodes':>6}")
    for kind, (time, count) in sorted(eight.items(), key=lambda entry: -entry[1][0]):
        print(f"{kind:34} {one[kind][0]:9.0f} {time:9.0f} {count:6.0f}")
    totals = [sum(time for time, _ in each.values()) for each in (one, eight)]
    print(f"{'all':34} {totals[0]:9.0f} {totals[1]:9.0f}")


def node_kinds(file: Path) -> dict[str, tuple[float, float]]:
    """Return kind of node → microseconds and number of runs in a step, from a profile."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in json.loads(file.read_bytes()):
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        node = name.removesuffix("_kernel_time")
        slot = re.search(r"\.lora/.*?/?([A-Za-z_]+)(?:/[A-Za-z_]+Fusion)?$", node)
        part = f"slot {slot[1]}" if slot else "controls" if "lora_controls" in node else "base"
        times[f"{part}: {event['args']['op_name']}"].append(float(event["dur"]))
    return {
        kind: (sum(each) / PROFILED_STEPS, len(each) / PROFILED_STEPS)
        for kind, each in times.items()
    }


def report(title: str, times: Mapping[str, float]) -> None:
    reference = times["one adapter"]
    print(f"{title:34} {'ms':>9} {'ratio':>6}")
    for name, seconds in times.items():
        print(f"{name:34} {1e3 * seconds:9.2f} {seconds / reference:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="of decode; an eighth of prefill")
    parser.add_argument("--bundle", type=Path, help="with --per-row; exported here if not there")
    parser.add_argument("--ordinary", type=Path, help="the same without --per-row, to time too")
    parser.add_argument("--plain", type=Path, help="the builder's own graph; built here if none")
    parser.add_argument("--profile", action="store_true", help="tell where the time goes, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or Path(scratch) / "bundle"
        names = rows_bundle(bundle, arguments.precision, arguments.rank)
        if arguments.ordinary is not None:
            with_adapters(arguments.ordinary, arguments.rank)
        built = arguments.plain or Path(scratch) / "plain"
        if arguments.plain is None:
            built.mkdir()
            base = resolve_base("smollm2")
            build_with_genai(base, built, precision=arguments.precision, provider="cpu")
        plain = Lane(open_session(built / MODEL_FILE), None, "cpu")
        runtime = Runtime(bundle, check=False)
        ordinary = Runtime(arguments.ordinary, check=False) if arguments.ordinary else None
        prefill = prompts(runtime)
        decode = next_token(runtime, prefill, runtime.rows(names).run(prefill, names))
        print(f"SmolLM2-135M {arguments.precision}, {ROWS} rows, rank {arguments.rank}", flush=True)
        for title, inputs, steps in (
            (f"decode after {PROMPT} tokens", decode, arguments.steps),
            (f"prefill of {PROMPT} tokens", prefill, max(arguments.steps // 8, 3)),
        ):
            print(f"{title}: {verify(bundle, names, inputs)}")
            timed = variants(plain, ordinary, runtime, names, inputs)
            found = medians(steps, *timed.values(), warm=1)
            report(title, dict(zip(timed, found, strict=True)))
            if arguments.profile:
                profile(bundle, names, inputs, Path(scratch))


if __name__ == "__main__":
    main()
