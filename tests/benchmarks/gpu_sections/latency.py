"""Swaps, decoding and rows: how long one run takes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gpu_sections.place import PROMPT, RANK, ROWS, Place, Row, medians
from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.session import open_session
from loraport.runtime.steps import CapturedSteps, InPlaceSteps


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
        plain = place.plain(precision)
        lanes = {"idle": runtime.lane(None), "active": runtime.lane("a0")}
        if plain is not None:
            session = open_session(plain / MODEL_FILE, provider=place.device)
            lanes = {"plain": Lane(session, None, place.device), **lanes}
        growing = {name: decoding(runtime, lane) for name, lane in lanes.items()}
        yield in_turns(place, f"decode, {precision}, rank {RANK}", growing)
        del growing, lanes
        for title in ("in place", "captured") if place.device == "cuda" else ("in place",):
            found = in_place(place, bundle, plain, cuda_graphs=title == "captured")
            yield in_turns(place, f"decode, {precision}, rank {RANK}, {title}", found)


def in_turns(place: Place, title: str, actions: dict[str, Callable[[], Any]]) -> Row:
    """Return medians, and their ratios to the graph without slots."""
    times = dict(zip(actions, medians(place.steps, *actions.values()), strict=True))
    base = times.get("plain", times["idle"])
    figures = ", ".join(f"{name} {1e3 * t:.2f} ms ({t / base:.3f})" for name, t in times.items())
    return Row(title, figures)


def in_place(
    place: Place, bundle: Path, plain: Path | None, *, cuda_graphs: bool
) -> dict[str, Callable[[], Any]]:
    """Return what decodes one token after another with a cache that is written in place."""
    expected = PROMPT + 2 * place.steps + 64

    def steps(runtime: Any, name: str | None) -> Callable[[], Any]:
        kind = CapturedSteps if cuda_graphs else InPlaceSteps
        made = kind(runtime, read_decoder(bundle), name, expected)
        made.run([5 + i % 200 for i in range(PROMPT)])
        return lambda: made.run([7])

    runtime = Runtime(bundle, provider=place.device, check=False, cuda_graphs=cuda_graphs)
    found = {"idle": steps(runtime, None), "active": steps(runtime, "a0")}
    if plain is not None:
        session = open_session(plain / MODEL_FILE, provider=place.device, cuda_graphs=cuda_graphs)
        bare = SimpleNamespace(session=session, provider=place.device, load=lambda _: None)
        found = {"plain": steps(bare, None), **found}
    return found


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
