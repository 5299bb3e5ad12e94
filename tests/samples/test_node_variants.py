"""The Node runner with slots beyond LoRA on linear layers: the same outputs as in Python."""

import shutil
import subprocess

import pytest
import torch
from bundle_faults import MISMATCH, rehash
from npm_packages import installed_sample, node_without_python
from peft_cases import Case, bert, make_case

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base, export_torch_module
from converters.onnx.slots.inserting import SlotOptions


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Run the sample's check of a bundle."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    sample = installed_sample("node", tmp_path_factory.mktemp("node"))
    environment = node_without_python(tmp_path_factory.mktemp("path"))

    def run(bundle):
        command = ["node", "src/cli.js", "check", str(bundle)]
        return subprocess.run(
            command, cwd=sample, env=environment, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with every variant, a saved classifier and a blend."""
    directory = tmp_path_factory.mktemp("variants")
    torch.manual_seed(0)
    base = bert().eval()
    slots = SlotOptions(("lora", "gain", "bias", "embedding"), replace=("classifier",))
    ids = torch.tensor([[1, 5, 3, 9, 2], [4, 8, 7, 1, 5]])
    export_torch_module(base, {"input_ids": ids}, directory / "bundle", slots=slots)
    adapters = {
        "dora": {"target_modules": ["query", "word_embeddings"], "use_dora": True},
        "saved": {"target_modules": ["value"], "r": 3, "modules_to_save": ["classifier"]},
        "bias": {"target_modules": ["dense"], "r": 2, "lora_bias": True},
    }
    for seed, (name, options) in enumerate(adapters.items()):
        made = make_case(Case(bert, options), directory / name, seed, base=base)
        add_adapters(directory / "bundle", {name: read_adapter(made.path)})
    return directory / "bundle"


def test_every_golden_case_passes(check, encoder):
    done = check(encoder)
    assert (done.returncode, done.stderr) == (0, "")
    for case in ("base", "adapter-dora", "adapter-saved", "adapter-bias", "blend"):
        assert f"ok {case}:" in done.stdout


def test_base_values_that_are_others_fail(check, encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    own = shutil.copytree(encoder, tmp_path / "own")
    file = own / "base_values.safetensors"
    save_file({name: tensor + 0.5 for name, tensor in load_file(file).items()}, file)
    rehash(own, file.name)
    done = check(own)
    assert done.returncode == MISMATCH
    assert "ok base:" not in done.stdout


def test_controls_are_fed_their_defaults(check, tiny_base, adapters, tmp_path):
    slots = SlotOptions(strength=True, per_row=True)
    export_base(str(tiny_base), tmp_path / "bundle", ExportOptions(slots=slots))
    found = {name: read_adapter(path) for name, path in adapters.items()}
    add_adapters(tmp_path / "bundle", found)
    done = check(tmp_path / "bundle")
    assert (done.returncode, done.stderr) == (0, "")
