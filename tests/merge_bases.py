"""Bases on disk, and merging into them."""

import json
import os
import subprocess
import sys
import textwrap
import warnings

import torch
from peft_cases import ConvNet, Made
from safetensors.torch import load_file, save_file

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
KEY = "base_model.model.fc.lora_{}.weight"


def write_adapter(path, tensors=None, config=None):
    path.mkdir()
    content = {**CONFIG, **(config or {})}
    (path / "adapter_config.json").write_text(json.dumps(content))
    if tensors is None:
        tensors = {KEY.format("A"): torch.ones(2, 6), KEY.format("B"): torch.ones(4, 2)}
    if isinstance(tensors, bytes):
        (path / "adapter_model.safetensors").write_bytes(tensors)
    else:
        save_file(tensors, path / "adapter_model.safetensors")


def save_base(base: torch.nn.Module, path, **options) -> None:
    """Save a base as its users have it: transformers' own layout, or bare safetensors."""
    if isinstance(base, ConvNet):
        path.mkdir()
        save_file(base.state_dict(), path / "model.safetensors")
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.save_pretrained(path, **options)


def load_merged(made: Made, path) -> torch.nn.Module:
    """Load what was merged: every tensor used, none missing."""
    if isinstance(made.base, ConvNet):
        model = type(made.base)()
        model.load_state_dict(load_file(path / "model.safetensors"))
        return model.eval()
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval()


def run_merge(tmp_path, *limits, base="base"):
    """Run a merge of ``base`` and ``adapter`` in a process of its own.

    Returns its exit code, messages and peak memory.
    """
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        {"; ".join(limits) or "pass"}
        from loraport.cli import main
        try:
            main(["merge", "{base}", "adapter", "-o", "out"])
        finally:
            # Not getrusage: its peak is that of the process this one was forked from.
            with open("/proc/self/status") as status:
                print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
        """
    )
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2", "LORAPORT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    return done.returncode, done.stderr, int(done.stdout.split()[-1]) * 1024
