"""Generation against transformers' own generate on PEFT's model, token by token."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_llm import TEXTS, peft_model, tokenizer

from loraport.base.loading import load_model
from loraport.errors import LoraportError
from loraport.runtime import Runtime, Sampling, TextGenerator, generate
from loraport.runtime.decoder import read_decoder

NEW = 24
GREEDY = Sampling(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def runtime(bundle):
    return Runtime(bundle, threads=1)


@pytest.fixture(scope="module")
def prompts():
    return [tokenizer()(text)["input_ids"] for text in TEXTS]


def transformers_tokens(model, token_ids, stop=1):
    """What transformers generates: greedy, the stop token left out as ours leaves it out."""
    ids = torch.tensor([token_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=1,
    )[0].tolist()
    new = out[len(token_ids) :]
    stops = {stop} if isinstance(stop, int) else set(stop)
    return new[:-1] if new and new[-1] in stops else new


@pytest.mark.parametrize("name", [None, "a", "b"])
def test_greedy_tokens_are_those_of_transformers(runtime, tiny_base, adapters, prompts, name):
    model = peft_model(tiny_base, adapters[name]) if name else load_model(str(tiny_base))
    for token_ids in prompts:
        expected = transformers_tokens(model, token_ids)
        assert list(generate(runtime, token_ids, name, GREEDY)) == expected
        assert len(expected) > 3


def test_adapters_say_something_else(runtime, prompts):
    said = {tuple(generate(runtime, prompts[0], name, GREEDY)) for name in (None, "a", "b")}
    assert len(said) == 3


def test_several_stop_tokens(own_bundle, tiny_base, adapters, prompts):
    free = list(generate(Runtime(own_bundle), prompts[0], "a", GREEDY))
    # Two tokens that come up: whichever is first ends the text.
    late, early = free[9], free[5]
    config = json.loads((own_bundle / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [1, late, early]
    (own_bundle / "genai_config.json").write_text(json.dumps(config))
    runtime = Runtime(own_bundle, check=False)
    got = list(generate(runtime, prompts[0], "a", GREEDY))
    assert got == free[: min(free.index(late), free.index(early))]
    model = peft_model(tiny_base, adapters["a"])
    assert got == transformers_tokens(model, prompts[0], stop=[1, late, early])


class TestSampling:
    WARM = Sampling(max_new_tokens=16, temperature=1.5, top_p=0.9, seed=3)

    def test_a_seed_repeats(self, runtime, prompts):
        first, again = (list(generate(runtime, prompts[0], "a", self.WARM)) for _ in range(2))
        assert first == again

    def test_another_seed_says_something_else(self, runtime, prompts):
        said = {
            tuple(generate(runtime, prompts[0], "a", replace(self.WARM, seed=seed)))
            for seed in range(4)
        }
        assert len(said) == 4

    def test_every_token_is_in_the_nucleus(self, runtime, tiny_base, prompts):
        # The smallest set of tokens whose probability reaches top_p, from torch's own logits.
        model = load_model(str(tiny_base))
        ids = list(prompts[0])
        for token in generate(runtime, ids, None, replace(self.WARM, top_p=0.5)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            probabilities = torch.softmax(logits / self.WARM.temperature, -1)
            likelier = probabilities[probabilities > probabilities[token] + 1e-6].sum()
            assert likelier < 0.5
            ids.append(token)

    def test_a_tiny_nucleus_is_greedy(self, runtime, prompts):
        narrow = Sampling(max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=5)
        assert list(generate(runtime, prompts[0], "a", narrow)) == list(
            generate(runtime, prompts[0], "a", Sampling(max_new_tokens=8))
        )

    def test_the_coldest_temperature_is_greedy(self, runtime, prompts):
        # The logits' differences over it are more than a float64 holds.
        cold = Sampling(max_new_tokens=8, temperature=1e-310, seed=5)
        assert list(generate(runtime, prompts[0], "a", cold)) == list(
            generate(runtime, prompts[0], "a", Sampling(max_new_tokens=8))
        )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("temperature", value) for value in (-1.0, math.nan, math.inf)),
            *(("top_p", value) for value in (0.0, 1.1, math.nan)),
            *(("seed", value) for value in (-1, 1.5)),
            *(("max_new_tokens", value) for value in (-1, 2.5)),
        ],
    )
    def test_numbers_that_make_no_sense_are_refused_by_name(self, name, value):
        with pytest.raises(LoraportError, match=rf"  - {name}: expected .*, got {value}$"):
            Sampling(**{name: value})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(runtime, prompts, temperature):
    sampling = Sampling(max_new_tokens=2, temperature=temperature)
    assert len(list(generate(runtime, prompts[0], {"a": 10.0}, sampling))) == 2
    with pytest.raises(LoraportError, match="logits: expected finite numbers, got nan"):
        list(generate(runtime, prompts[0], {"a": 1e37}, sampling))


class TestLengths:
    def test_a_prompt_that_is_too_long_is_refused(self, runtime):
        limit = read_decoder(runtime.directory).context_length
        with pytest.raises(LoraportError, match=f"expected 1 to {limit - 1} tokens, got {limit}"):
            list(generate(runtime, [5] * limit))
        assert len(list(generate(runtime, [5] * (limit - 1)))) <= 1

    def test_an_empty_prompt_is_refused(self, runtime):
        with pytest.raises(LoraportError, match="prompt: expected 1 to 255 tokens, got 0"):
            list(generate(runtime, []))

    @pytest.mark.parametrize("token", [-1, 320])
    def test_tokens_that_do_not_exist_are_refused(self, runtime, token):
        with pytest.raises(LoraportError, match=f"expected tokens from 0 to 319, got {token}"):
            list(generate(runtime, [5, token, 7]))
        list(generate(runtime, [5, 319, 0], sampling=Sampling(max_new_tokens=1)))

    @pytest.mark.parametrize(
        "tokens", [[5.5, 7], "57", 5, np.array([[5, 7]]), torch.tensor([[5, 7]])]
    )
    def test_what_is_no_list_of_tokens_is_refused(self, runtime, tokens):
        with pytest.raises(
            LoraportError, match=r"prompt: expected tokens \[n\], whole numbers, got"
        ):
            list(generate(runtime, tokens))

    def test_the_path_of_a_bundle_is_no_runtime(self, tmp_path):
        for opened in (TextGenerator, lambda bundle: list(generate(bundle, [5]))):
            with pytest.raises(LoraportError, match=r"runtime: expected a Runtime, got .*; open"):
                opened(tmp_path)

    @pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
    def test_tokens_are_taken_from_arrays(self, runtime, prompts, kind):
        few = Sampling(max_new_tokens=2)
        wanted = list(generate(runtime, prompts[0], "a", few))
        assert list(generate(runtime, kind(prompts[0]), "a", few)) == wanted

    def test_the_text_ends_where_the_context_does(self, runtime):
        assert len(list(generate(runtime, [5] * 250, "a", Sampling(max_new_tokens=99)))) <= 6

    def test_max_new_tokens(self, runtime, prompts):
        assert len(list(generate(runtime, prompts[0], "a", Sampling(max_new_tokens=3)))) == 3


def test_a_bundle_that_is_no_decoder_is_refused(own_bundle):
    runtime = Runtime(own_bundle)
    (own_bundle / "genai_config.json").unlink()
    with pytest.raises(LoraportError, match=r"got no such file: .* no cache to generate with"):
        list(generate(runtime, [5]))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": 3}', '{"model": {"decoder": []}}'])
def test_a_damaged_generation_config_is_refused(own_bundle, text):
    (own_bundle / "genai_config.json").write_text(text)
    with pytest.raises(LoraportError, match="expected a decoder language model"):
        read_decoder(own_bundle)


def test_generating_with_several_adapters_in_turn_keeps_caches_apart(runtime, prompts):
    alone = {name: list(generate(runtime, prompts[1], name, GREEDY)) for name in "ab"}
    streams = {name: generate(runtime, prompts[1], name, GREEDY) for name in "ab"}
    mixed = {"a": [], "b": []}
    for _ in range(NEW):
        for name, stream in streams.items():
            mixed[name] += [token for token in [next(stream, None)] if token is not None]
    assert mixed == alone
    assert np.any(np.array(alone["a"][:4]) != np.array(alone["b"][:4]))
