"""Merge a checkpoint larger than anything the process may hold, beside ``cp`` and PEFT.

    python tests/benchmarks/merge.py [--gigabytes 8] [--directory DIR]

Prints, from one run: throughput against ``cp`` of the same files, the time of the arithmetic
alone, peak memory against its bound, and how many elements of the merged bfloat16 and float16
weights equal the correctly rounded exact values, with PEFT's figure beside ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"up": (8192, 4096), "down": (4096, 8192), "gate": (8192, 4096)}
RANK = 16


def write_checkpoint(base: Path, adapter: Path, gigabytes: float) -> None:
    """Write layers of random bfloat16 weights in shards of 2 GB, half of them adapted."""
    base.mkdir(parents=True)
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    factors: dict[str, torch.Tensor] = {}
    total = layer = number = 0
    while total < gigabytes * 1e9:
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            shard[f"layers.{layer}.{name}.weight"] = weight
            total += weight.nbytes
        if sum(each.nbytes for each in shard.values()) > 2e9 or total >= gigabytes * 1e9:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, base / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
        if layer % 2 == 0:
            for name, (out, features) in SHAPES.items():
                prefix = f"base_model.model.layers.{layer}.{name}.lora_"
                a = torch.randn(RANK, features, generator=generator) * 0.05
                b = torch.randn(out, RANK, generator=generator) * 0.01
                factors |= {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
        layer += 1
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 24, "target_modules": list(SHAPES)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def drop_cache(directory: Path) -> None:
    """Ask the system to forget the files, so that each competitor reads them anew."""
    import os

    os.sync()
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(command: list[str], base: Path) -> float:
    """Return the seconds a command takes, the disk's buffers written out at the end."""
    drop_cache(base)
    start = time.perf_counter()
    subprocess.run([*command], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start


def arithmetic_seconds(gigabytes: float) -> float:
    """Return the time of the adapted half's arithmetic on both cores, nothing read or written."""
    from concurrent.futures import ThreadPoolExecutor

    from converters.merge.arithmetic import Change, merged_rows, prepare
    from converters.merge.rounding import round_once

    torch.set_num_threads(1)
    out, features = SHAPES["up"]
    weight = torch.randn(128, features).mul_(0.02).bfloat16()
    change = prepare(Change(1.0, torch.randn(out, RANK), torch.randn(RANK, features), 1.5))

    def block(_: int) -> None:
        round_once(merged_rows(weight.double(), 0, out, [change]), torch.bfloat16)

    count = int(gigabytes * 1e9 / 2 / weight.nbytes)
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        list(pool.map(block, range(count)))
    return time.perf_counter() - start


def processor_seconds(whose: int) -> float:
    """Return the processor time used so far by this process or its children."""
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def exactness() -> None:
    """Print how many elements are the rounded exact values, ours and PEFT's."""
    import numpy as np
    from peft import LoraConfig, get_peft_model

    from converters.merge.arithmetic import Change, merged_rows, prepare
    from converters.merge.rounding import round_once

    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2048, 3000, bias=False)).to(dtype)
        weight = model[0].weight.detach().clone()
        adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=RANK, lora_alpha=24))
        layer = adapted.base_model.model[0]
        with torch.no_grad():
            layer.lora_B.default.weight.normal_(0, 0.01)
        a, b = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()
        wide = np.longdouble
        exact = weight.double().numpy().astype(wide) + wide(1.5) * (
            b.double().numpy().astype(wide) @ a.double().numpy().astype(wide)
        )
        # The reference is rounded by way of an integer, not by the code under test.
        expected = torch.from_numpy(rounded(exact, dtype)).to(dtype)
        ours = round_once(
            merged_rows(weight.double(), 0, len(weight), [prepare(Change(1.0, b, a, 1.5))]), dtype
        )
        theirs = adapted.merge_and_unload()[0].weight
        for name, got in (("loraport", ours), ("PEFT", theirs)):
            share = (got == expected).double().mean().item()
            print(f"{dtype}: {name} {share:.7%} of {got.numel():,} elements correctly rounded")


def rounded(exact, dtype: torch.dtype):
    """Round long doubles to a dtype's grid, ties to even, as float64 that hold the result."""
    import numpy as np

    bits, smallest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    _, exponent = np.frexp(exact)
    unit = np.ldexp(np.longdouble(1), np.maximum(exponent - 1, smallest) - (bits - 1))
    return (np.rint(exact / unit) * unit).astype(np.float64)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    exactness()
    root = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        base, adapter = root / "base", root / "adapter"
        write_checkpoint(base, adapter, arguments.gigabytes)
        copied = timed(["cp", "-r", "--reflink=never", str(base), str(root / "copy")], base)
        shutil.rmtree(root / "copy")
        command = ["merge", str(base), str(adapter), "-o", str(root / "merged")]
        code = (
            "import sys; from loraport.cli import main\n"
            f"try: main({command!r})\n"
            "finally:\n"
            " peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')]\n"
            f" open({str(root / 'peak')!r}, 'w').write(peak[0].split()[1])"
        )
        before = processor_seconds(resource.RUSAGE_CHILDREN)
        merged = timed([sys.executable, "-c", code], base)
        merge_work = processor_seconds(resource.RUSAGE_CHILDREN) - before
        peak = int((root / "peak").read_text()) * 1024
        before = processor_seconds(resource.RUSAGE_SELF)
        arithmetic = arithmetic_seconds(arguments.gigabytes)
        arithmetic_work = processor_seconds(resource.RUSAGE_SELF) - before
        largest = max(out * features for out, features in SHAPES.values()) * 4
        bound = 2 * largest + 600e6
        print(f"cp {copied:.1f} s, merge {merged:.1f} s, its arithmetic alone {arithmetic:.1f} s")
        # Processor time does not depend on what else the machine does.
        print(f"processor time: merge {merge_work:.1f} s, arithmetic {arithmetic_work:.1f} s")
        limit = 1.5 * copied + arithmetic
        print(f"merge / (1.5 cp + arithmetic) = {merged / limit:.2f}")
        print(f"peak memory {peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB allowed")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
