"""samples/node: its own tests, every fault, and the same texts as in Python."""

import json

import pytest
from bundle_faults import FAULTS, MISMATCH, REFUSED, Fault, flip_byte, rehash
from tiny_llm import TEXTS

# The Node runner reads the .safetensors and model.required.onnx; these it never opens.
NOT_READ = {
    "adapter file is no adapter",
    "adapter files that differ",
    "model is no model",
}
# JSON.parse has words of its own.
OWN_WORDS = {"manifest nests deeply": "manifest.json"}


@pytest.fixture
def run(run_node):
    return run_node


@pytest.fixture
def sample(node_sample):
    return node_sample


def cli(run, *arguments):
    return run("src/cli.js", *arguments)


def test_the_samples_own_tests(run, sample, bundle):
    files = sorted(sample.glob("test/*.test.js"))
    done = run("--test", *files, LORAPORT_BUNDLE=str(bundle))
    assert done.returncode == 0, done.stdout[-6000:]
    assert "# skipped 0" in done.stdout
    assert "# fail 0" in done.stdout


def test_every_golden_case_passes(run, bundle):
    done = cli(run, "check", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    for case in ("base", "adapter-a", "adapter-b", "blend"):
        assert f"ok {case}:" in done.stdout
    reports = json.loads(cli(run, "check", bundle, "--json").stdout)
    assert [report["passed"] for report in reports] == [True] * 4


def test_a_bundle_without_adapters_passes(run, bare_bundle):
    done = cli(run, "check", bare_bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok base:")


def test_a_flipped_byte_in_any_file_is_refused(run, own_bundle):
    listed = json.loads((own_bundle / "manifest.json").read_text())["files"]
    for name in listed:
        flip_byte(own_bundle / name)
    done = cli(run, "check", own_bundle)
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert done.stderr.count("error:") == 1
    for name in listed:
        assert f"  - {name}: expected sha256 " in done.stderr
        flip_byte(own_bundle / name)
    flip_byte(own_bundle / "model.onnx.data")
    done = cli(run, "check", own_bundle)
    assert done.returncode == REFUSED
    assert done.stderr.count("expected sha256") == 1


def _required_model(bundle):
    path = bundle / "model.required.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    rehash(bundle, path.name)


CASES = {name: fault for name, fault in FAULTS.items() if name not in NOT_READ}
CASES["required model is no model"] = Fault(_required_model, "model.required.onnx")


@pytest.mark.parametrize("name", CASES)
def test_faults_are_answered_with_one_message(run, own_bundle, name):
    fault = CASES[name]
    fault.spoil(own_bundle)
    done = cli(run, "check", own_bundle)
    assert done.returncode == fault.code, done.stdout + done.stderr
    if fault.code == MISMATCH:
        assert fault.word in done.stdout
        assert done.stderr == ""
    else:
        assert done.stderr.count("error:") == 1
        assert "    at " not in done.stderr
        assert OWN_WORDS.get(name, fault.word) in done.stderr, done.stderr
        assert "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "usage"),
        (["check"], "usage"),
        (["colour", "B"], "usage"),
        (["check", "B", "--prompt", "x"], "--prompt"),
        (["check", "B", "--colour"], "--colour"),
        (["generate", "B"], "--prompt"),
        (["generate", "B", "--prompt", "x", "--adapter", "nobody"], "one of the bundle's (a, b)"),
        (["generate", "B", "--prompt", "x", "--adapter", "a=nan"], "finite number"),
        (["generate", "B", "--prompt", "x", "--adapter", "a", "--adapter", "a=2"], "twice"),
        (["generate", "B", "--prompt", "x", "--max-new-tokens", "0"], "maxNewTokens"),
        (["generate", "B", "--prompt", ""], "prompt"),
    ],
)
def test_wrong_usage_is_told(run, bundle, arguments, word):
    done = cli(run, *[bundle if argument == "B" else argument for argument in arguments])
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert done.stderr.count("error:") == 1
    assert word in done.stderr


TOKENIZE = """
import { openModel, openText } from './src/index.js';
const text = await openText(await openModel(process.argv[1]));
const prompts = JSON.parse(process.argv[2]);
const both = prompts.map((prompt) => [text.tokens(prompt), text.tokens(prompt, { chat: false })]);
process.stdout.write(JSON.stringify(both));
"""
PROMPTS = (*TEXTS, " leading\n\n\tspace  ", "<s>not a tag</s>", "can't won't I'LL", "1234567 3.14")


def test_tokens_are_those_of_python(run, bundle):
    from loraport.runtime import Runtime, TextGenerator

    done = run("--input-type=module", "-e", TOKENIZE, bundle, json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr
    python = TextGenerator(Runtime(bundle))
    expected = [[python.tokens(p), python.tokens(p, chat=False)] for p in PROMPTS]
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("selection", [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.75, "b": -0.5}])
def test_texts_are_those_of_python(run, bundle, selection):
    from loraport.runtime import Runtime, Sampling, TextGenerator

    prompt = "The harbour keeps its light on"
    flags = [f"--adapter={name}={strength}" for name, strength in selection.items()]
    done = cli(run, "generate", bundle, "--prompt", prompt, "--max-new-tokens", 20, *flags)
    assert done.returncode == 0, done.stderr
    python = TextGenerator(Runtime(bundle))
    text = python.generate(prompt, selection or None, Sampling(max_new_tokens=20))
    assert done.stdout == text + "\n"
    if selection:
        base = python.generate(prompt, None, Sampling(max_new_tokens=20))
        assert text != base


GENERATE = """
import { openModel, generate } from './src/index.js';
const model = await openModel(process.argv[1]);
for (const adapter of [null, 'a']) {
  const found = [];
  for await (const token of generate(model, [5, 60, 7], { adapter, maxNewTokens: 30 })) {
    found.push(token);
  }
  console.log(JSON.stringify(found));
}
"""


def test_texts_grow_to_where_other_factors_rotate_them(run, long_phi3):
    """As in Python, whose own control is that tokens beyond the border depend on it."""
    from loraport.runtime import Runtime, Sampling, generate

    bundle = long_phi3 / "bundle"
    done = run("--input-type=module", "-e", GENERATE, bundle)
    assert done.returncode == 0, done.stderr
    runtime = Runtime(bundle)
    for name, line in zip((None, "a"), done.stdout.splitlines(), strict=True):
        expected = list(generate(runtime, [5, 60, 7], name, Sampling(max_new_tokens=30)))
        assert json.loads(line) == expected
        assert len(expected) > runtime.manifest.long_rotations_after


def test_the_benchmark_prints_ratios(run, bundle):
    done = cli(run, "bench", bundle, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["adaptedPerBase"].keys() == {"a", "b", "a + b"}
    assert figures["adapterBytes"]["a"] == (bundle / "adapters/a.safetensors").stat().st_size
    assert "of opening the model again" in cli(run, "bench", bundle).stdout
