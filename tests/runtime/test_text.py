"""Text in and out: chat template, streaming whole characters, nothing lost at the end."""

import pytest
from tiny_llm import tokenizer

from loraport.errors import LoraportError
from loraport.runtime import Runtime, Sampling, TextGenerator, generate


@pytest.fixture(scope="module")
def generator(bundle):
    return TextGenerator(Runtime(bundle, threads=1))


def say(monkeypatch, text, cut=None):
    """Let the model generate the tokens of this text."""
    tokens = tokenizer()(text, add_special_tokens=False)["input_ids"][:cut]
    monkeypatch.setattr("loraport.runtime.text.generate", lambda *_: iter(tokens))
    return tokens


@pytest.mark.parametrize("text", ["plain text, two words", "東京 🚢⚓ São", "Ελλάδα", "🚢" * 5])
def test_pieces_are_whole_characters_and_make_the_text(generator, monkeypatch, text):
    tokens = say(monkeypatch, text)
    pieces = list(generator.stream("x"))
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert 1 < len(pieces) <= len(tokens)


def test_a_character_that_is_cut_short_is_shown_as_the_tokenizer_shows_it(generator, monkeypatch):
    tokens = say(monkeypatch, "ab 🏴", cut=-1)
    said = generator.generate("x")
    assert said == tokenizer().decode(tokens, skip_special_tokens=True)
    assert said.endswith("�")


def test_generated_text_is_the_decoded_tokens(generator, bundle):
    sampling = Sampling(max_new_tokens=24)
    for name in (None, "a", "b"):
        ids = generator.tokens("Ships")
        tokens = list(generate(Runtime(bundle, threads=1), ids, name, sampling))
        expected = tokenizer().decode(tokens, skip_special_tokens=True)
        assert generator.generate("Ships", name, sampling) == expected


def test_the_chat_template_wraps_the_prompt(generator):
    chat = tokenizer().decode(generator.tokens("Ahoy"))
    assert chat == "<s>user: Ahoy</s><s>assistant: "
    assert tokenizer().decode(generator.tokens("Ahoy", chat=False)) == "Ahoy"


def test_an_empty_prompt_is_refused(generator):
    with pytest.raises(LoraportError, match="prompt: expected some text, got none"):
        generator.generate("", chat=False)


def test_bytes_that_are_no_text_are_refused(generator):
    prompt = b"Ahoy \xff".decode("utf-8", "surrogateescape")  # as in sys.argv
    for chat in (True, False):
        with pytest.raises(LoraportError, match=r"prompt: expected text in UTF-8, got '\\udcff'"):
            generator.generate(prompt, chat=chat)


@pytest.mark.parametrize("prompt", [[{"role": "user", "content": "hi"}], b"hi", 3, None])
def test_what_is_no_text_is_refused(generator, prompt):
    with pytest.raises(LoraportError, match="prompt: expected a text, got ") as refused:
        generator.generate(prompt)
    assert str(refused.value).endswith(repr(prompt))


def test_a_strength_that_is_a_text_is_told_from_a_number(generator):
    with pytest.raises(LoraportError, match=r"'a': expected a finite number, got '0\.5'$"):
        generator.generate("hi", {"a": "0.5"})


def test_a_bundle_without_a_tokenizer_is_refused(own_bundle):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (own_bundle / file).unlink()
    with pytest.raises(LoraportError, match="tokenizer cannot be loaded"):
        TextGenerator(Runtime(own_bundle, check=False))
