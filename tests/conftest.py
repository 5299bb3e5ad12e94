"""What several test folders share: a tiny language model, its adapters, its bundle."""

import functools
import shutil
import signal

import pytest
import torch
from tiny_llm import ALL_LINEAR, SOME_RANKS, save_adapter, save_base

# Models this small only lose time to threads that wait for one another.
torch.set_num_threads(1)


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


@pytest.fixture
def one_thread(monkeypatch):
    """Verify tiny models on one thread: more would only wait for one another."""
    from loraport.runtime import Runtime

    one = functools.partial(Runtime, threads=1)
    monkeypatch.setattr("loraport.parity.verification.Runtime", one)


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
