"""Steps in place and captured steps, against steps that each give a whole cache to the next."""

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from tiny_llm import TEXTS, tokenizer

from loraport.errors import LoraportError
from loraport.runtime import Runtime, Sampling, generate
from loraport.runtime.capturing import NOT_CAPTURED, CapturingSession
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.steps import CapturedSteps, GrowingSteps, InPlaceSteps, open_steps

NEW = [7, 130, 12, 9, 301, 44, 8, 15, 16, 23, 42, 200]
GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture
def runtime(bundle):
    return Runtime(bundle, threads=1)


@pytest.fixture
def prompt():
    return tokenizer()(TEXTS[0])["input_ids"]


class Watched:
    """Runs like a session that captures, and holds what a repeated run would read and write."""

    def __init__(self, session):
        self._session = session
        self.runs = defaultdict(int)
        self.bound = {}

    def run_with_iobinding(self, binding, options):
        number = int(options.get_run_config_entry("gpu_graph_id"))
        self.runs[number] += 1
        if number != NOT_CAPTURED:
            places = [value.data_ptr() for value in binding.get_outputs()]
            assert self.bound.setdefault(number, (binding, places)) == (binding, places)
        self._session.run_with_iobinding(binding, options)

    def run(self, outputs, inputs, options):
        assert options.get_run_config_entry("gpu_graph_id") == str(NOT_CAPTURED)
        return self._session.run(outputs, inputs, options)

    def __getattr__(self, name):
        return getattr(self._session, name)


@pytest.fixture
def capturing(runtime):
    """A runtime as on CUDA, and what it runs."""
    watched = Watched(runtime.session)
    runtime.session = CapturingSession(watched)
    return runtime, watched


def logits(steps, prompt):
    return np.stack([steps.run(prompt), *(steps.run([token]) for token in NEW)])


def growing(runtime, prompt, selection):
    return logits(GrowingSteps(runtime, read_decoder(runtime.directory), selection), prompt)


@pytest.mark.parametrize("selection", [None, "a", {"a": 0.5, "b": -1.5}])
def test_logits_in_place_are_those_of_a_growing_cache(runtime, prompt, selection):
    decoder = read_decoder(runtime.directory)
    assert decoder.in_place
    steps = InPlaceSteps(runtime, decoder, selection, len(prompt) + len(NEW))
    expected = growing(runtime, prompt, selection)
    np.testing.assert_array_equal(logits(steps, prompt), expected)
    assert not np.allclose(expected, growing(runtime, prompt, "b"), atol=1e-3)


def test_the_way_is_chosen_by_the_bundle_and_the_session(runtime, own_bundle):
    decoder = read_decoder(runtime.directory)

    def chosen():
        with open_steps(runtime, read_decoder(own_bundle), None, 20) as steps:
            return type(steps)

    assert chosen() is InPlaceSteps
    runtime.session = CapturingSession(runtime.session)
    assert chosen() is CapturedSteps
    file = own_bundle / "genai_config.json"
    config = json.loads(file.read_text())
    for value in (False, None, "true"):
        config["search"]["past_present_share_buffer"] = value
        file.write_text(json.dumps(config))
        assert read_decoder(own_bundle) == replace(decoder, in_place=False)
    runtime.session = runtime.session._session
    assert chosen() is GrowingSteps


@pytest.mark.parametrize("selection", [None, "a", {"a": 0.5, "b": -1.5}])
def test_logits_of_captured_steps_are_the_same(runtime, prompt, selection):
    expected = growing(runtime, prompt, selection)
    other = growing(runtime, prompt, "b")
    watched = Watched(runtime.session)
    runtime.session = CapturingSession(watched)
    decoder = read_decoder(runtime.directory)
    steps = CapturedSteps(runtime, decoder, selection, len(prompt) + len(NEW))
    got = logits(steps, prompt)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert np.abs(expected - other).max() > 1e-3
    assert watched.runs == {NOT_CAPTURED: 1, 1: len(NEW)}


@pytest.mark.parametrize(("context", "expected", "capacity"), [(100, 80, 100), (300, 257, 300)])
def test_a_cache_is_never_longer_than_the_context(capturing, context, expected, capacity):
    """Rotations are stored for so many places: a mask that is longer is refused."""
    runtime, _ = capturing
    decoder = replace(read_decoder(runtime.directory), context_length=context)
    steps = CapturedSteps(runtime, decoder, None, expected)
    assert steps._cache.capacity == capacity


def test_texts_in_turn_share_what_was_captured(capturing, bundle, prompt):
    runtime, watched = capturing
    plain = Runtime(bundle, threads=1)
    expected = {name: list(generate(plain, prompt, name, GREEDY)) for name in (None, "a", "b")}
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    for _ in range(2):
        for name, tokens in expected.items():
            assert list(generate(runtime, prompt, name, GREEDY)) == tokens
    assert set(watched.runs) == {NOT_CAPTURED, 1, 2, 3}
    assert watched.runs[NOT_CAPTURED] == 6  # the prompts
    (spare,) = runtime.session.spare.values()
    assert len(spare) == 1


def test_texts_at_once_have_caches_of_their_own(capturing, bundle, prompt):
    runtime, _ = capturing
    plain = Runtime(bundle, threads=1)
    expected = [list(generate(plain, prompt, name, GREEDY)) for name in ("a", "b", "a")]
    streams = [generate(runtime, prompt, name, GREEDY) for name in ("a", "b", "a")]
    mixed = [[], [], []]
    for _ in range(GREEDY.max_new_tokens):
        for tokens, stream in zip(mixed, streams, strict=True):
            tokens += [token for token in [next(stream, None)] if token is not None]
    assert mixed == expected
    assert expected[0] != expected[1]


def test_a_text_that_is_left_early_gives_its_cache_back(capturing, prompt):
    runtime, watched = capturing
    for _ in range(2):
        stream = generate(runtime, prompt, "a", GREEDY)
        for _ in range(4):
            next(stream)
        stream.close()
    assert set(watched.runs) == {NOT_CAPTURED, 1}


def test_a_cache_of_what_is_no_number_is_not_used_again(capturing, prompt):
    runtime, _ = capturing
    with pytest.raises(LoraportError, match="expected finite numbers, got nan"):
        list(generate(runtime, prompt, {"a": 1e37}, GREEDY))
    assert not any(runtime.session.spare.values())
    list(generate(runtime, prompt, "a", GREEDY))
    assert any(runtime.session.spare.values())


def test_an_adapter_that_was_forgotten_is_captured_anew(capturing, prompt):
    runtime, watched = capturing
    expected = list(generate(runtime, prompt, "a", GREEDY))
    runtime.unload("a")
    assert list(generate(runtime, prompt, "a", GREEDY)) == expected
    assert set(watched.runs) == {NOT_CAPTURED, 1, 2}
    ((cache,),) = runtime.session.spare.values()
    assert len(cache.captured) == 1  # the other's memory is free


def test_few_steps_are_not_worth_capturing(capturing, prompt):
    runtime, watched = capturing
    few = Sampling(max_new_tokens=4)
    first = list(generate(runtime, prompt, "a", few))
    assert set(watched.runs) == {NOT_CAPTURED}
    whole = list(generate(runtime, prompt, "a", GREEDY))
    assert whole[:4] == first
    runs = watched.runs[1]
    assert list(generate(runtime, prompt, "a", few)) == first
    assert watched.runs[1] > runs  # it is there now


def test_beyond_the_most_graphs_runs_are_ordinary(capturing, prompt, monkeypatch):
    runtime, watched = capturing
    monkeypatch.setattr("loraport.runtime.capturing._MOST", 1)
    for name in ("a", "b"):
        list(generate(runtime, prompt, name, GREEDY))
    assert set(watched.runs) == {NOT_CAPTURED, 1}
    assert watched.runs[NOT_CAPTURED] > 2


def test_runs_of_lanes_are_not_captured_and_leave_nothing_on_the_device(capturing, bundle, prompt):
    runtime, watched = capturing
    inputs = first_step_inputs(runtime, read_decoder(bundle), prompt)
    got = runtime.run(inputs, "a", "logits")["logits"]
    expected = Runtime(bundle).run(inputs, "a", "logits")["logits"]
    np.testing.assert_array_equal(got, expected)
    base = runtime.session.run(["logits"], inputs)[0]
    assert np.abs(base - expected).max() > 1e-3
    assert set(watched.runs) == {NOT_CAPTURED}
    with pytest.raises(LoraportError, match="outputs on the device: expected a runtime without"):
        runtime.lane("a").run_on_device(inputs)


def test_no_memory_for_a_cache_is_told(runtime, prompt, monkeypatch):
    decoder = replace(read_decoder(runtime.directory), context_length=1 << 50)
    monkeypatch.setattr("loraport.runtime.generation.read_decoder", lambda _: decoder)
    with pytest.raises(LoraportError, match=r"a cache for \d+ tokens: expected memory for it, got"):
        list(generate(runtime, prompt, None, Sampling(max_new_tokens=1 << 49)))


def test_what_the_model_refuses_is_told(runtime):
    steps = InPlaceSteps(runtime, read_decoder(runtime.directory), None, 4)
    with pytest.raises(LoraportError, match="the model refuses a step: "):
        steps.run([5] * 8)


def test_cuda_graphs_are_for_cuda(bundle):
    with pytest.raises(LoraportError, match="CUDA graphs: expected provider cuda, got cpu"):
        Runtime(bundle, cuda_graphs=True)
