"""The C++ sample: its programs as users build them, and greedy generation."""

import json
import shutil

import pytest
from native_programs import SAMPLES, genai_library, onnxruntime_library, run_without_python
from tiny_llm import TEXTS

from loraport.runtime import Runtime
from loraport.runtime.generation import Sampling, generate

PROMPT = [5, 60, 7, 200, 31]
SELECTIONS = [{}, {"a": 1.0}, {"b": 1.0}, {"a": 0.75, "b": 0.5}]


@pytest.fixture(scope="module")
def generate_program(sanitized_cpp_programs):
    return sanitized_cpp_programs / "loraport-generate"


def _adapters(selection):
    return [word for name, s in selection.items() for word in ("--adapter", f"{name}={s}")]


def _tokens(done):
    assert done.returncode == 0, done.stderr
    return [int(token) for token in done.stdout.strip().split(",") if token]


def test_the_check_as_users_build_it_passes(cpp_programs, bundle):
    done = run_without_python(cpp_programs / "loraport-check", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert "base again" in done.stdout


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_generation_gives_the_tokens_of_the_python_runtime(generate_program, bundle, selection):
    runtime = Runtime(bundle)
    expected = list(generate(runtime, PROMPT, selection or None, Sampling(max_new_tokens=24)))
    words = ["--tokens", ",".join(map(str, PROMPT)), "--max-new-tokens", 24]
    done = run_without_python(generate_program, bundle, *words, *_adapters(selection))
    assert _tokens(done) == expected
    if selection:
        assert expected != list(generate(runtime, PROMPT, None, Sampling(max_new_tokens=24)))


def test_texts_grow_to_where_other_factors_rotate_them(generate_program, long_phi3):
    """As in Python, whose own control is that tokens beyond the border depend on it."""
    bundle = long_phi3 / "bundle"
    runtime = Runtime(bundle)
    words = ["--tokens", ",".join(map(str, PROMPT)), "--max-new-tokens", 30]
    for selection in ({}, {"a": 1.0}):
        done = run_without_python(generate_program, bundle, *words, *_adapters(selection))
        sampling = Sampling(max_new_tokens=30)
        assert _tokens(done) == list(generate(runtime, PROMPT, selection or None, sampling))
        assert len(_tokens(done)) > runtime.manifest.long_rotations_after


def test_generation_ends_before_a_stop_token(generate_program, own_bundle):
    from bundle_faults import rehash

    words = ["--tokens", "5,60,7", "--max-new-tokens", 12]
    tokens = _tokens(run_without_python(generate_program, own_bundle, *words))
    stop = tokens[-1]
    config = own_bundle / "genai_config.json"
    document = json.loads(config.read_text())
    document["model"]["eos_token_id"] = [stop, 1]
    config.write_text(json.dumps(document))
    rehash(own_bundle, config.name)
    shorter = _tokens(run_without_python(generate_program, own_bundle, *words))
    assert shorter == tokens[: tokens.index(stop)]


def test_generation_ends_when_the_context_is_full(generate_program, own_bundle):
    from bundle_faults import rehash

    config = own_bundle / "genai_config.json"
    document = json.loads(config.read_text())
    document["model"]["context_length"] = 8
    config.write_text(json.dumps(document))
    rehash(own_bundle, config.name)
    done = run_without_python(generate_program, own_bundle, "--tokens", "5,60,7,9,11")
    assert len(_tokens(done)) == 3


def test_text_goes_in_and_comes_out(cpp_programs, bundle):
    from loraport.base.loading import load_tokenizer

    tokenizer = load_tokenizer(str(bundle))
    prompt = TEXTS[2] + ' "quoted"\n'
    runtime = Runtime(bundle)
    for raw in (True, False):
        message = [{"role": "user", "content": prompt}]
        text = (
            prompt
            if raw
            else tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = list(generate(runtime, ids, "a", Sampling(max_new_tokens=16)))
        words = ["--prompt", prompt, "--genai", genai_library(), "--max-new-tokens", 16]
        done = run_without_python(
            cpp_programs / "loraport-generate",
            bundle,
            *words,
            *_adapters({"a": 1}),
            *(["--raw"] if raw else []),
            ORT_LIB_PATH=str(onnxruntime_library()),
        )
        assert done.returncode == 0, done.stderr
        assert f"{len(expected)} tokens" in done.stderr
        complete = tokenizer.decode(expected, skip_special_tokens=True).split("�")[0]
        complete = complete.replace("\0", "")  # no character of a C string
        assert done.stdout.startswith(complete)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--tokens or --prompt"),
        (["--tokens", ""], "prompt"),
        (["--tokens", "1,x"], "--tokens"),
        (["--tokens", "99999"], "tokens from 0"),
        (["--tokens", "1", "--prompt", "hi"], "both"),
        (["--prompt", "hi"], "--genai"),
        (["--prompt", "hi", "--genai", "none.so"], "none.so"),
        (["--tokens", "1", "--adapter", "nobody"], "nobody"),
        (["--tokens", "1", "--adapter", "a=x"], "STRENGTH"),
        (["--tokens", "1", "--adapter", "a", "--adapter", "a"], "twice"),
        (["--tokens", "1", "--max-new-tokens", "-1"], "--max-new-tokens"),
    ],
)
def test_wrong_usage_is_told(generate_program, bundle, words, said):
    done = run_without_python(generate_program, bundle, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error:") == 1
    assert said in done.stderr


def test_a_bundle_that_is_no_decoder_is_told(generate_program, own_bundle):
    from bundle_faults import edit_manifest

    edit_manifest(own_bundle, lambda document: document["files"].pop("genai_config.json"))
    done = run_without_python(generate_program, own_bundle, "--tokens", "1")
    assert done.returncode == 2
    assert "decoder language model" in done.stderr


def test_the_header_swaps_from_a_product_of_its_own(tmp_path, bundle):
    """The README's example is a program that compiles and runs as it stands."""
    import re
    import subprocess

    from native_programs import onnxruntime_headers

    if shutil.which("c++") is None or shutil.which("npm") is None:
        pytest.skip("needs c++ and npm")
    readme = (SAMPLES / "cpp" / "README.md").read_text()
    example = re.search(r"```cpp\n(.*?)```", readme, re.DOTALL)
    assert example is not None
    (tmp_path / "product.cpp").write_text(example[1])
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DORT_API_MANUAL_INIT"]
    folders = ["-I", SAMPLES / "cpp" / "include", "-isystem", onnxruntime_headers()]
    command = ["c++", *flags, *folders, "product.cpp", "-ldl", "-o", "product"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = run_without_python(tmp_path / "product", bundle, "a", "b")
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["base", "a", "a and b", "base"]
    assert lines[0][1] == lines[3][1]
    assert len({ids for _, ids in lines}) == 3
