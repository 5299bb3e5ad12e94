"""Eight rows with eight different adapters beside eight rows with one, in one run.

    python tests/benchmarks/rows.py [--precision int4] [--rank 16] [--rounds 5] [--profile]

One token after a prompt of 64 (decode), and the prompt itself (prefill). What has a session of its
own is measured in a process of its own; the processes take turns, round after round, and ratios are
taken within a round. With one adapter, with eight and one by one are runs of one session, in turns.
First every row is compared with a run of its own, and must differ from a run with its neighbour's
adapter. Adapters are random, rank R on all linear layers.
"""

import argparse
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from decode import random_adapter  # the sibling benchmarks
from timing import child, medians, print_ratios

from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.exporters.genai_builder import build_with_genai
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter
from loraport.base.finding import resolve_base
from loraport.bundle.manifest import MODEL_FILE
from loraport.parity.tolerances import tolerance_for
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.rows import Rows
from loraport.runtime.session import open_session

ROWS, PROMPT = 8, 64
STRENGTH = 8
PROFILED_STEPS = 3
DECODE, PREFILL = f"decode after {PROMPT} tokens", f"prefill of {PROMPT} tokens"
ONE, EIGHT, ALONE = "one adapter", "eight adapters", "eight runs, one by one"
PLAIN, ORDINARY = "graph without slots", "one adapter, slots not per row"
SESSIONS = (PLAIN, ORDINARY, ONE)
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


def measure(what: str, directory: Path, bundle: Path, names: Sequence[str], steps: int) -> Any:
    """Return phase → title → median seconds, of one session in this process.

    Args:
        what: One of `SESSIONS`.
        directory: Where its graph is.
        bundle: A bundle, for the names of the inputs.
        names: The adapters.
        steps: Of decode; an eighth of prefill.
    """
    runtime = Runtime(bundle if what == PLAIN else directory, check=False)
    if what == PLAIN:
        runtime.session = open_session(directory / MODEL_FILE)  # the other goes, with its threads
        lane = Lane(runtime.session, None, "cpu")
    else:
        lane = runtime.lane(names[0])
    prompt = prompts(runtime)
    decode = next_token(runtime, prompt, lane.run(prompt))
    found = {}
    for phase, inputs in ((DECODE, decode), (PREFILL, prompt)):
        timed = {what: partial(logits, lane, inputs)}
        if what == ONE:
            one, eight = runtime.rows(names[:1]), runtime.rows(names)
            alone = [(runtime.lane(name), row(inputs, i)) for i, name in enumerate(names)]
            timed = {
                ONE: partial(logits, one, inputs, names[:1] * ROWS),
                EIGHT: partial(logits, eight, inputs, names),
                ALONE: lambda alone=alone: [logits(lane, own) for lane, own in alone],
            }
        count = steps if phase == DECODE else max(steps // 8, 2)
        times = medians(count, *timed.values(), warm=2 if phase == DECODE else 0)
        found[phase] = dict(zip(timed, times, strict=True))
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "int4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24, help="of decode; an eighth of prefill")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", type=Path, help="with --per-row; exported here if not there")
    parser.add_argument("--ordinary", type=Path, help="the same without --per-row, to time too")
    parser.add_argument("--plain", type=Path, help="the builder's own graph; built here if none")
    parser.add_argument("--profile", action="store_true", help="tell where the time goes, too")
    parser.add_argument("--child", nargs=3, metavar=("SESSION", "DIRECTORY", "NAMES"))
    arguments = parser.parse_args()
    if arguments.child:
        what, directory, names = arguments.child
        own = (Path(directory), arguments.bundle, names.split(","), arguments.steps)
        print(json.dumps(measure(what, *own)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or Path(scratch) / "bundle"
        names = rows_bundle(bundle, arguments.precision, arguments.rank)
        places = {ONE: bundle}
        if arguments.ordinary is not None:
            places[ORDINARY] = arguments.ordinary
            with_adapters(arguments.ordinary, arguments.rank)
        places[PLAIN] = arguments.plain or Path(scratch) / "plain"
        if arguments.plain is None:
            places[PLAIN].mkdir()
            base = resolve_base("smollm2")
            build_with_genai(base, places[PLAIN], precision=arguments.precision, provider="cpu")
        runtime = Runtime(bundle, check=False)
        prompt = prompts(runtime)
        decode = next_token(runtime, prompt, runtime.rows(names).run(prompt, names))
        del runtime
        print(f"SmolLM2-135M {arguments.precision}, {ROWS} rows, rank {arguments.rank}", flush=True)
        for phase, inputs in ((DECODE, decode), (PREFILL, prompt)):
            print(f"{phase}: {verify(bundle, names, inputs)}", flush=True)
            if arguments.profile:
                profile(bundle, names, inputs, Path(scratch))
        rounds: dict[str, list[dict[str, float]]] = {DECODE: [], PREFILL: []}
        options = ("--bundle", str(bundle), "--steps", str(arguments.steps), "--child")
        for _ in range(arguments.rounds):
            found = [
                child(__file__, *options, what, str(place), ",".join(names))
                for what, place in places.items()
            ]
            for phase, each in rounds.items():
                each.append({title: t for one in found for title, t in one[phase].items()})
    for phase, each in rounds.items():
        print_ratios(phase, each, reference=ONE)


if __name__ == "__main__":
    main()
