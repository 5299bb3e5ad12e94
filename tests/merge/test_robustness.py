"""Kills, full disks, damaged inputs, memory: an error or a whole output."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from command_line import command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merge_bases import KEY, run_merge, save_base, write_adapter
from peft_cases import Case, llama, make_case
from safetensors.torch import load_file, save, save_file

from converters.merge import MergeOptions, make_plan, merge, writer
from loraport.cli import cli
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft, write_peft
from loraport.variants import lower


def write_base(path, rows=4, columns=6, layers=1, dtype=torch.float32):
    path.mkdir()
    names = ["fc"] if layers == 1 else [f"layers.{n}.fc" for n in range(layers)]
    tensors = {f"{name}.weight": torch.ones(rows, columns, dtype=dtype) for name in names}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def test_paths_may_be_texts_and_the_base_a_path(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    given = MergeOptions(
        base=tmp_path / "base",
        adapters=((str(tmp_path / "adapter"), 1.0),),
        output=str(tmp_path / "out"),
        initial_adapter=None,
    )
    usual = MergeOptions(
        base=str(tmp_path / "base"),
        adapters=((tmp_path / "adapter", 1.0),),
        output=tmp_path / "out",
    )
    assert given == usual
    merge(given, make_plan(given), lambda _: None)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["fc.weight"], torch.full((4, 6), 1.0 + 2 * 2.0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_asked_to_end_leaves_nothing_half_written(number, tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    written = []

    def asked_to_end(plan, partial, progress, threads):
        (partial / "half").write_bytes(bytes(9))
        written.extend(tmp_path.glob(".out.partial-*/half"))
        signal.raise_signal(number)
        writer.write_shards(plan, partial, progress, threads)

    monkeypatch.setattr("converters.merge.write_shards", asked_to_end)
    line = ("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    before = signal.signal(number, signal.SIG_DFL)
    try:
        code, said = command(*line)
        assert (code, len(written)) == (128 + number, 1)
        assert said.endswith(f"stopped by {number.name}")
        assert {entry.name for entry in tmp_path.iterdir()} == {"base", "adapter"}
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # the control: as nohup starts a process
        assert command(*line)[0] == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert (tmp_path / "out" / "model.safetensors").is_file()


A, B = torch.ones(2, 6), torch.ones(4, 2)
HOSTILE = {
    "A without B": ({KEY.format("A"): A}, {}, "partner of the other matrix"),
    "B without A": ({KEY.format("B"): B}, {}, "partner of the other matrix"),
    "wrong rank": ({KEY.format("A"): A, KEY.format("B"): B}, {"r": 3}, "expected 3 rows"),
    "B of another rank": (
        {KEY.format("A"): A, KEY.format("B"): torch.ones(4, 3)},
        {},
        "2 columns, the rank of A",
    ),
    "rank 0": (None, {"r": 0}, "at least 1"),
    "no rank": (None, {"r": "x"}, "expected a number"),
    "NaN": ({KEY.format("A"): A * torch.nan, KEY.format("B"): B}, {}, "NaN or infinity"),
    "infinite alpha": (None, {"lora_alpha": float("inf")}, "lora_alpha: expected a number"),
    "NaN alpha": (None, {"lora_alpha": float("nan")}, "lora_alpha: expected a number"),
    "unknown key that changes the maths": (None, {"use_qlora_x": True}, "use_qlora_x: expected"),
    "layer replication": (None, {"layer_replication": [[0, 1]]}, "layer_replication"),
    "aLoRA": (None, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "another method": (None, {"peft_type": "IA3"}, "only LoRA adapters"),
    "integers": ({KEY.format("A"): A.int(), KEY.format("B"): B}, {}, "floating-point"),
    "unknown tensor": (
        {KEY.format("A"): A, KEY.format("B"): B, "base_model.model.fc.lora_Q": B.clone()},
        {},
        "lora_Q: expected a key of PEFT",
    ),
    "path in a name": (
        {"base_model.model...fc.lora_A.weight": A, "base_model.model...fc.lora_B.weight": B},
        {},
        "expected a key of PEFT",
    ),
    "no tensors": ({}, {}, "adapter tensors"),
    "does not fit the base": (
        {KEY.format("A"): torch.ones(2, 7), KEY.format("B"): B},
        {},
        r"expected \[4, 7\]",
    ),
    "DoRA without its magnitude": (None, {"use_dora": True}, "lora_magnitude_vector: expected"),
    "truncated": (save({KEY.format("A"): A, KEY.format("B"): B})[:-5], {}, "safetensors header"),
    "header of 2^63": ((1 << 63).to_bytes(8, "little") + b"{}", {}, "header that fits"),
    "empty file": (b"", {}, "header that fits"),
}


@pytest.mark.parametrize(("tensors", "config", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_adapters_end_in_one_error(tensors, config, message, tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tensors, config)
    options = MergeOptions(
        base=str(tmp_path / "base"),
        adapters=((tmp_path / "adapter", 1.0),),
        output=tmp_path / "merged",
    )
    with pytest.raises(LoraportError, match=message):
        make_plan(options)
    assert not (tmp_path / "merged").exists()


class _Code:
    """Something that a pickle would run when it is loaded."""

    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("content", ["code", "nothing", "tensors"])
def test_pickled_adapters_are_plain_tensors_or_refused(content, tmp_path, capsys):
    write_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    pickled = tmp_path / "adapter" / "adapter_model.bin"
    tensors = {KEY.format("A"): A, KEY.format("B"): B}
    torch.save(tensors | ({"x": _Code()} if content == "code" else {}), pickled)
    if content == "tensors":
        assert torch.equal(read_peft(tmp_path / "adapter").modules["fc"].lora_B, B)
        return
    if content == "nothing":
        pickled.write_bytes(b"")
    with pytest.raises(
        LoraportError, match="expected tensors and nothing else, got a file"
    ) as told:
        read_peft(tmp_path / "adapter")
    assert "weights_only" not in str(told.value)
    assert "this ran" not in capsys.readouterr().out


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_adapters_are_errors_or_adapters(data, tmp_path):
    """Any byte of either file flipped: a `LoraportError` or a readable adapter."""
    adapter = tmp_path / "adapter"
    if not adapter.exists():
        write_base(tmp_path / "base")
        write_adapter(adapter)
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    file = adapter / name
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[data.draw(st.integers(0, len(sound) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    try:
        with contextlib.suppress(LoraportError):
            make_plan(MergeOptions(base=str(tmp_path / "base"), adapters=((adapter, 1.0),)))
    finally:
        file.write_bytes(sound)


SIZES = st.integers(1, 5)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_adapter_survives_writing(data, tmp_path):
    """Property: what is written is read back, tensor by tensor and scaling by scaling."""
    from loraport.adapter import Adapter, LoraModule, ModuleKind

    names = data.draw(
        st.lists(
            st.sampled_from(["fc", "a.fc", "b.a.fc", "a.b", "x.q_proj", "q_proj"]),
            min_size=1,
            unique=True,
        )
    )
    dora, rslora = data.draw(st.booleans()), data.draw(st.booleans())
    modules = {}
    for number, name in enumerate(names):
        rank, out, features = (data.draw(SIZES) for _ in range(3))
        generator = torch.Generator().manual_seed(number)
        modules[name] = LoraModule(
            kind=ModuleKind.LINEAR,
            lora_A=torch.randn(rank, features, generator=generator),
            lora_B=torch.randn(out, rank, generator=generator),
            alpha=data.draw(st.sampled_from([1.0, 8.0, 0.3])),
            use_rslora=rslora,
            magnitude=torch.rand(out, generator=generator) if dora else None,
        )
    adapter = Adapter(modules=modules)
    write_peft(adapter, tmp_path / "adapter", force=True)
    again = read_peft(tmp_path / "adapter")
    assert again.modules.keys() == modules.keys()
    for name, module in modules.items():
        back = again.modules[name]
        assert back.scaling == module.scaling
        assert back.tensors().keys() == module.tensors().keys()
        for part, tensor in module.tensors().items():
            assert torch.equal(back.tensors()[part], tensor)


def test_command_line_errors_have_no_traceback(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", {KEY.format("A"): A})
    done = subprocess.run(
        [sys.executable, "-m", "loraport", "merge", "base", "adapter", "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "partner of the other matrix" in done.stderr
    assert not (tmp_path / "out").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    result = CliRunner().invoke(cli, ["merge", base, f"{adapter}=0.5", "--dry-run", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["changed"] == [{"tensor": "fc.weight", "dtype": "F32", "shape": [4, 6]}]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]
    assert CliRunner().invoke(cli, ["merge", base, adapter]).exit_code == 2


def test_force_and_the_base_itself(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    base, out = str(tmp_path / "base"), tmp_path / "out"
    command = ["merge", base, str(tmp_path / "adapter"), "-o"]
    first = CliRunner().invoke(cli, [*command, str(out)])
    assert first.exit_code == 0
    size = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert f"merging: {size} of {size} bytes, 100%" in first.stderr
    assert f"{out}: 1 tensor changed, 0 copied, {size} bytes" in first.stderr
    again = CliRunner().invoke(cli, [*command, str(out)])
    assert isinstance(again.exception, LoraportError)
    assert CliRunner().invoke(cli, [*command, str(out), "--force"]).exit_code == 0
    onto_itself = CliRunner().invoke(cli, [*command, base, "--force"])
    assert "expected an output that is no input and holds none" in str(onto_itself.exception)
    expected = 1 + 2.0 * 2  # scaling 2, a sum of 2 ones
    assert torch.equal(
        load_file(out / "model.safetensors")["fc.weight"], torch.full((4, 6), expected)
    )


def large_base(path, megabytes):
    """Write a checkpoint with tensors of random bfloat16, and an adapter for it."""
    path.mkdir()
    layers = max(2, megabytes // 64)
    shape = (4096, 64 * 2**20 // 2 // 4096)
    generator = np.random.default_rng(0)
    values = generator.standard_normal(shape, dtype=np.float32)
    tensor = torch.from_numpy(values).to(torch.bfloat16)
    weight_map = {}
    for layer in range(layers):
        file = f"model-{layer // 4:05d}.safetensors"
        weight_map[f"layers.{layer}.fc.weight"] = file
        if layer % 4 == 0:
            names = [f"layers.{n}.fc.weight" for n in range(layer, min(layers, layer + 4))]
            save_file({name: tensor.clone() for name in names}, path / file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    tensors = {}
    for layer in range(0, layers, 2):  # every second one is copied
        tensors[f"base_model.model.layers.{layer}.fc.lora_A.weight"] = torch.ones(2, shape[1])
        tensors[f"base_model.model.layers.{layer}.fc.lora_B.weight"] = torch.ones(shape[0], 2)
    write_adapter(path.parent / "adapter", tensors)


def test_kill_in_the_middle_leaves_nothing_and_a_repeat_succeeds(tmp_path):
    write_base(tmp_path / "base", 400, 300, layers=3)
    tensors = {}
    for layer in range(3):
        tensors[f"base_model.model.layers.{layer}.fc.lora_A.weight"] = torch.ones(2, 300)
        tensors[f"base_model.model.layers.{layer}.fc.lora_B.weight"] = torch.ones(400, 2)
    write_adapter(tmp_path / "adapter", tensors)
    script = textwrap.dedent(
        """
        import time
        from pathlib import Path
        from converters.merge import MergeOptions, make_plan, merge
        options = MergeOptions(base="base", adapters=((Path("adapter"), 1.0),), output=Path("out"))
        def stop(nbytes):
            print("middle", flush=True)
            time.sleep(600)
        merge(options, make_plan(options), stop)
        """
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "middle\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(
        cli,
        ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")],
    )
    assert done.exit_code == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_write_that_the_system_refuses_leaves_nothing(tmp_path):
    """As on a full disk: the system itself refuses to write on."""
    write_base(tmp_path / "base", 400, 300, layers=3)
    tensors = {
        "base_model.model.layers.1.fc.lora_A.weight": torch.ones(2, 300),
        "base_model.model.layers.1.fc.lora_B.weight": torch.ones(400, 2),
    }
    write_adapter(tmp_path / "adapter", tensors)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))"
    code, messages, _ = run_merge(tmp_path, limit)
    assert code == 2
    assert "File too large" in messages
    assert "Traceback" not in messages
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter", "base"]


def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "out")])
    expected = r"expected \d{2,4} bytes of room for the merged model, got 1 free on "
    assert re.search(expected, str(result.exception))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """1 GB of weights, in tensors of 128 MB of float32: 2 x that plus 600 MB is the limit."""
    large_base(tmp_path / "base", 1024)
    code, messages, peak = run_merge(tmp_path)
    assert code == 0, messages
    assert peak < 2 * (128 << 20) + 600 * 10**6
    merged = load_file(tmp_path / "out" / "model-00000.safetensors")
    base = load_file(tmp_path / "base" / "model-00000.safetensors")
    assert torch.equal(merged["layers.1.fc.weight"], base["layers.1.fc.weight"])
    expected = (base["layers.0.fc.weight"].double() + 4).to(torch.bfloat16)
    assert (merged["layers.0.fc.weight"] != expected).float().mean() < 1e-4  # torch rounds twice


@pytest.mark.parametrize(
    "damage",
    [
        {"num_hidden_layers": 2**63},
        {"num_attention_heads": 1e400},
        {"initializer_range": "../../x"},
        {"num_attention_heads": ""},
        {"hidden_size": -(2**70)},
        {"architectures": ["os", 3]},
        {"layer_types": []},
        {"vocab_size": None, "rope_parameters": [1]},
    ],
)
def test_nonsense_in_a_base_s_config_is_no_traceback(damage, tmp_path):
    """The model cannot be made then: the tensors' names decide, or one error says why."""
    made = make_case(Case(llama, {"target_modules": ["q_proj"]}), tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    command = ["merge", str(tmp_path / "base"), str(made.path), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0 or isinstance(result.exception, LoraportError)
    if result.exit_code == 0:
        name = "model.layers.1.self_attn.q_proj.weight"
        module = read_peft(made.path).modules[name.removesuffix(".weight")]
        wanted = load_file(tmp_path / "base/model.safetensors")[name] + lower(module).delta()
        got = load_file(tmp_path / "out/model.safetensors")[name]
        assert torch.allclose(got, wanted, rtol=0, atol=1e-6)
