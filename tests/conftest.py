"""What several test folders share: a tiny language model, its adapters, its bundle."""

import copy
import fcntl
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import onnxruntime
import pytest
import torch
from tiny_llm import ALL_LINEAR, LONG_PHI3, SOME_RANKS, save_adapter, save_base

import loraport.bundle

# Models this small only lose time to threads that wait for one another.
torch.set_num_threads(1)


# Some minutes each; what comes last has one worker to itself while the others wait.
_SLOWEST = (
    "real/test_smollm2.py",
    "test_gpu_script.py",
    "samples/test_real.py",
    "onnx_export/test_base_parameters.py",
    "sweep/test_spread.py",
    "onnx_import/test_quantized_import.py",
    "onnx_export/test_precisions.py",
    "sweep/test_halving.py",
    "sweep/test_sweep.py",
)


def pytest_configure(config):
    """Keep xdist from ordering files by their number of tests: the slowest have few."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begin with the slowest files."""
    places = {name: place for place, name in enumerate(_SLOWEST)}
    tests = Path(__file__).parent

    def place(item):
        name = item.path.relative_to(tests).as_posix() if tests in item.path.parents else ""
        return places.get(name, len(places))

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def session_threads():
    """Run ONNX Runtime's sessions on one thread unless a test says otherwise."""

    class OneThread(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            self.intra_op_num_threads = 1

    open_session = onnxruntime.InferenceSession.__init__

    def open_on_one_thread(session, model, sess_options=None, *more, **named):
        open_session(session, model, sess_options or OneThread(), *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", OneThread)
        patch.setattr(onnxruntime.InferenceSession, "__init__", open_on_one_thread)
        yield


@pytest.fixture(scope="session", autouse=True)
def manifests_as_described():
    """Hold every manifest that a test writes against its JSON Schema."""
    import jsonschema

    from loraport.bundle.manifest import Manifest

    described = Path(loraport.bundle.__file__).parent / "manifest.schema.json"
    validator = jsonschema.Draft202012Validator(json.loads(described.read_text("utf-8")))
    written = Manifest.to_json

    def to_json(manifest):
        text = written(manifest)
        validator.validate(json.loads(text))
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "to_json", to_json)
        yield


@pytest.fixture(scope="session", autouse=True)
def warm_modules():
    """Start what exports run apart with its imports done; `test_warm_modules.py` has the proof."""
    from warm_modules import warm_exports

    with warm_exports():
        yield


@pytest.fixture(scope="session", autouse=True)
def translated_operators():
    """Let torch's exporter translate its operators to ONNX once: half of a tiny model's export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    translated = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*arguments, **options):
        registry = copy.copy(translated(*arguments, **options))
        registry.functions = {name: [*each] for name, each in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Make something for all of pytest's processes: the first makes it, others wait for it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def made(name, make):
        directory, done = root / f"made-{name}", root / f"made-{name}.done"
        with (root / f"made-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                make(directory)
                done.touch()
        return directory

    return made


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A random Llama with a real tokenizer, in the Hugging Face layout."""
    return save_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def adapter_a(tiny_base, tmp_path_factory):
    """A PEFT adapter on every linear module: r = 4."""
    return save_adapter(tiny_base, ALL_LINEAR, tmp_path_factory.mktemp("tiny") / "a", seed=0)


@pytest.fixture(scope="session")
def adapter_b(tiny_base, tmp_path_factory):
    """A PEFT adapter on some modules: rsLoRA, ranks that differ."""
    return save_adapter(tiny_base, SOME_RANKS, tmp_path_factory.mktemp("tiny") / "b", seed=1)


@pytest.fixture(scope="session")
def adapters(adapter_a, adapter_b):
    """Both adapters' directories by name."""
    return {"a": adapter_a, "b": adapter_b}


@pytest.fixture(scope="session")
def bare_bundle(tiny_base, tmp_path_factory):
    """The base exported once, without adapters; not to be changed."""
    from converters.onnx import export_base

    out = tmp_path_factory.mktemp("tiny") / "bare"
    export_base(str(tiny_base), out)
    return out


@pytest.fixture(scope="session")
def bundle(bare_bundle, adapters, tmp_path_factory):
    """The exported base with both adapters; not to be changed."""
    from converters.formats.registry import read_adapter
    from converters.onnx import add_adapters
    from loraport.bundle.sources import record_adapter

    out = tmp_path_factory.mktemp("tiny") / "bundle"
    shutil.copytree(bare_bundle, out)
    add_adapters(out, {name: read_adapter(path) for name, path in adapters.items()})
    for name, path in adapters.items():
        record_adapter(out, name, str(path))
    return out


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A copy of the bundle, to be changed by one test."""
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def long_phi3(made_once):
    """A Phi-3 of two sets of rotations: its ``base``, its adapter ``a`` and the ``bundle``."""
    import transformers

    from converters.formats.registry import read_adapter
    from converters.onnx import add_adapters, export_base

    def make(directory):
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**copy.deepcopy(LONG_PHI3)))
        base = save_base(directory / "base", model)
        adapter = read_adapter(save_adapter(base, ALL_LINEAR, directory / "a"))
        bundle = directory / "bundle"
        export_base(str(base), bundle, finish=lambda made: add_adapters(made, {"a": adapter}))

    return made_once("long-phi3", make)


@pytest.fixture(scope="session")
def real_directory():
    """The real SmolLM2: bundles ``fp32`` and ``int4``, adapters ``a`` and ``b``; never changed."""
    from real_bundles import real_bundles

    return real_bundles()


@pytest.fixture(scope="session", params=["fp32", "int4"])
def real_bundle(request, real_directory):
    """Either bundle of the real SmolLM2, with two adapters and golden outputs."""
    return real_directory / request.param


@pytest.fixture
def interruptible():
    """Hear Ctrl-C, in child processes too, although background jobs are told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
