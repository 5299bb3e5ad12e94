"""The runtime against PEFT: swaps, blends, threads, and everything it must refuse."""

import concurrent.futures
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft_cases import load_with_peft
from tiny_llm import TEXTS, peft_model, tokenizer

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from loraport.base.loading import load_model
from loraport.bundle.manifest import read_manifest, write_manifest
from loraport.errors import LoraportError
from loraport.runtime import Lane, Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.session import open_session

# float32 sums in another order; logits are of the order of 10.
ATOL = 1e-4


@pytest.fixture(scope="module")
def runtime(bundle):
    return Runtime(bundle, threads=1)


@pytest.fixture(scope="module")
def prompts():
    return [tokenizer()(text)["input_ids"] for text in TEXTS]


def inputs_of(runtime, token_ids):
    return first_step_inputs(runtime, read_decoder(runtime.directory), token_ids)


def logits(runtime, token_ids, selection=None):
    return runtime.run(inputs_of(runtime, token_ids), selection, ["logits"])["logits"]


def torch_logits(model, token_ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids])).logits.numpy()


class TestNumbers:
    def test_the_base_is_torchs(self, runtime, tiny_base, prompts):
        model = load_model(str(tiny_base))
        for token_ids in prompts:
            expected = torch_logits(model, token_ids)
            np.testing.assert_allclose(logits(runtime, token_ids), expected, atol=ATOL)

    def test_slots_left_empty_change_no_bit(self, runtime, bundle, prompts):
        """The runtime's own defaults have rank 0, the graph's rank 1 and zeros."""
        own = Lane(open_session(bundle / "model.onnx", threads=1), None, "cpu")
        for token_ids in prompts:
            expected = own.run(inputs_of(runtime, token_ids), ["logits"])["logits"]
            np.testing.assert_array_equal(logits(runtime, token_ids), expected)
            assert np.abs(logits(runtime, token_ids, "a") - expected).max() > 0.5

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_an_adapter_is_pefts(self, runtime, tiny_base, adapters, prompts, name):
        model = peft_model(tiny_base, adapters[name])
        for token_ids in prompts:
            got = logits(runtime, token_ids, name)
            np.testing.assert_allclose(got, torch_logits(model, token_ids), atol=ATOL)
            assert np.abs(got - logits(runtime, token_ids)).max() > 0.5

    @pytest.mark.parametrize("strength", [0.5, 2.0, -1.0])
    def test_a_strength_is_pefts_scaling(self, runtime, tiny_base, adapter_b, prompts, strength):
        model = peft_model(tiny_base, adapter_b)
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(strength)
        got = logits(runtime, prompts[0], {"b": strength})
        np.testing.assert_allclose(got, torch_logits(model, prompts[0]), atol=ATOL)

    def test_strength_zero_is_the_base(self, runtime, prompts):
        zero = logits(runtime, prompts[0], {"a": 0.0})
        np.testing.assert_allclose(zero, logits(runtime, prompts[0]), atol=1e-6)

    def test_a_blend_is_the_weighted_sum(self, runtime, tiny_base, adapters, prompts):
        # In float64, from the tensors of the adapters' own files.
        model = load_model(str(tiny_base), dtype=torch.float64)
        with torch.no_grad():
            for name, strength in (("a", 0.75), ("b", -0.5)):
                for path, module in read_adapter(adapters[name]).modules.items():
                    delta = module.lora_B.double() @ module.lora_A.double() * module.scaling
                    model.get_submodule(path).weight += strength * delta
        for token_ids in prompts:
            got = logits(runtime, token_ids, {"a": 0.75, "b": -0.5})
            np.testing.assert_allclose(got, torch_logits(model, token_ids), atol=ATOL)

    def test_a_blend_is_pefts_concatenation(self, runtime, tiny_base, adapters, prompts):
        model = load_with_peft(load_model(str(tiny_base)), adapters["a"])
        model.load_adapter(adapters["b"], "b")
        model.add_weighted_adapter(["default", "b"], [0.75, 0.5], "both", combination_type="cat")
        model.set_adapter("both")
        for token_ids in prompts:
            got = logits(runtime, token_ids, {"a": 0.75, "b": 0.5})
            np.testing.assert_allclose(got, torch_logits(model, token_ids), atol=ATOL)

    def test_several_rows_at_once(self, runtime, tiny_base, adapter_a):
        rows = torch.tensor([[5, 9, 40, 7], [200, 3, 3, 81]])
        inputs = inputs_of(runtime, [1, 2, 3, 4])
        inputs["input_ids"] = rows.numpy()
        inputs["attention_mask"] = np.ones((2, 4), np.int64)
        for name, value in inputs.items():
            if name.startswith("past"):
                inputs[name] = np.zeros((2, *value.shape[1:]), value.dtype)
        got = runtime.run(inputs, "a", ["logits"])["logits"]
        with torch.no_grad():
            expected = peft_model(tiny_base, adapter_a)(input_ids=rows).logits.numpy()
        np.testing.assert_allclose(got, expected, atol=ATOL)


class TestSwaps:
    def test_swaps_repeat_bit_for_bit(self, runtime, prompts):
        plan = [None, "a", "b", {"a": 0.5, "b": 1.5}]
        first = [logits(runtime, prompts[0], selection) for selection in plan]
        for index in (3, 1, 0, 2, 1, 3, 0):
            assert np.array_equal(logits(runtime, prompts[0], plan[index]), first[index])
        for i, one in enumerate(first):
            for other in first[i + 1 :]:
                assert np.abs(one - other).max() > 0.1

    def test_an_adapter_is_resident_until_it_is_unloaded(self, bundle, prompts):
        runtime = Runtime(bundle, threads=1)
        before = logits(runtime, prompts[0], "a")
        resident = runtime.load("a")
        assert runtime.load({"a": 1.0}) is resident
        # A: r = 4 on 7 modules of 2 layers; three of them packed.
        assert resident.nbytes == sum(v.numpy().nbytes for v in resident.values.values())
        runtime.unload("a")
        assert runtime.load("a") is not resident
        assert np.array_equal(logits(runtime, prompts[0], "a"), before)

    def test_a_lane_outlives_the_unloading_of_its_adapter(self, bundle, prompts):
        runtime = Runtime(bundle, threads=1)
        inputs = inputs_of(runtime, prompts[0])
        lane = runtime.lane("a")
        before = lane.run(inputs, ["logits"])["logits"]
        runtime.unload("a")
        assert np.array_equal(lane.run(inputs, ["logits"])["logits"], before)

    def test_an_adapter_added_later_is_found_after_refresh(self, own_bundle, adapter_b, prompts):
        runtime = Runtime(own_bundle, threads=1)
        add_adapters(own_bundle, {"late": read_adapter(adapter_b)})
        with pytest.raises(LoraportError, match=r"adapter 'late': expected one of the bundle's"):
            logits(runtime, prompts[0], "late")
        runtime.refresh()
        assert runtime.adapters == ["a", "b", "late"]
        got = logits(runtime, prompts[0], "late")
        assert np.array_equal(got, logits(runtime, prompts[0], "b"))

    def test_a_replaced_adapter_takes_effect_after_refresh(self, own_bundle, adapter_b, prompts):
        runtime = Runtime(own_bundle, threads=1)
        old, b = (logits(runtime, prompts[0], name) for name in "ab")
        kept = runtime.load("b")
        add_adapters(own_bundle, {"a": read_adapter(adapter_b)}, force=True)
        assert np.array_equal(logits(runtime, prompts[0], "a"), old)
        runtime.refresh()
        assert np.array_equal(logits(runtime, prompts[0], "a"), b)
        assert runtime.load("b") is kept

    def test_refresh_refuses_another_graph(self, own_bundle, bare_bundle):
        runtime = Runtime(own_bundle, threads=1)
        manifest = read_manifest(bare_bundle)
        files = {**manifest.files, "model.onnx": "0" * 64}
        write_manifest(replace(manifest, files=files), own_bundle)
        with pytest.raises(LoraportError, match="got another; open the bundle again"):
            runtime.refresh()

    def test_a_damaged_file_of_a_new_adapter_is_refused_when_it_is_read(
        self, own_bundle, adapter_b, prompts
    ):
        runtime = Runtime(own_bundle, threads=1)
        for name in ("late", "sound"):
            add_adapters(own_bundle, {name: read_adapter(adapter_b)})
        flip_byte(own_bundle / "adapters" / "late.safetensors")
        runtime.refresh()
        damaged = r"adapters/late\.safetensors: expected xxh3-128"
        for _ in range(2):
            with pytest.raises(LoraportError, match=damaged):
                logits(runtime, prompts[0], "late")
        runtime.refresh()
        with pytest.raises(LoraportError, match=damaged):
            logits(runtime, prompts[0], "late")
        got, b = (logits(runtime, prompts[0], name) for name in ("sound", "b"))
        assert np.array_equal(got, b)
        # The control: a runtime that is told not to check takes it.
        unchecked = logits(Runtime(own_bundle, threads=1, check=False), prompts[0], "late")
        assert not np.array_equal(unchecked, b)

    def test_where_a_manifest_has_sha256_alone_that_is_compared(
        self, own_bundle, adapter_b, prompts
    ):
        """As manifests have that were written before."""
        runtime = Runtime(own_bundle, threads=1)
        for name in ("late", "sound"):
            add_adapters(own_bundle, {name: read_adapter(adapter_b)})
        write_manifest(replace(read_manifest(own_bundle), xxh3={}), own_bundle)
        flip_byte(own_bundle / "adapters" / "late.safetensors")
        runtime.refresh()
        with pytest.raises(LoraportError, match=r"adapters/late\.safetensors: expected sha256"):
            logits(runtime, prompts[0], "late")
        got, b = (logits(runtime, prompts[0], name) for name in ("sound", "b"))
        assert np.array_equal(got, b)

    def test_an_adapter_in_use_stays_until_what_replaces_it_is_known_to_be_sound(
        self, own_bundle, adapter_b, prompts
    ):
        runtime = Runtime(own_bundle, threads=1)
        old = logits(runtime, prompts[0], "a")
        add_adapters(own_bundle, {"a": read_adapter(adapter_b)}, force=True)
        flip_byte(own_bundle / "adapters" / "a.safetensors")
        with pytest.raises(LoraportError, match=r"adapters/a\.safetensors: expected sha256"):
            runtime.refresh()
        assert np.array_equal(logits(runtime, prompts[0], "a"), old)
        flip_byte(own_bundle / "adapters" / "a.safetensors")
        runtime.refresh()
        new, b = (logits(runtime, prompts[0], name) for name in "ab")
        assert np.array_equal(new, b)
        assert not np.array_equal(new, old)

    def test_refresh_leaves_what_other_runtimes_read_to_them(self, own_bundle, adapter_b, prompts):
        runtime = Runtime(own_bundle, threads=1)
        add_adapters(own_bundle, {"late": read_adapter(adapter_b)})
        flip_byte(own_bundle / "adapters" / "late.onnx_adapter")
        runtime.refresh()
        got, a, b = (logits(runtime, prompts[0], name) for name in ("late", "a", "b"))
        assert np.array_equal(got, b)
        assert not np.array_equal(got, a)
        with pytest.raises(LoraportError, match=r"adapters/late\.onnx_adapter: expected sha256"):
            Runtime(own_bundle)


_USE = """
import sys
from loraport.runtime.replay import replay
from loraport.runtime import Runtime, Sampling, generate

runtime = Runtime(sys.argv[1])
list(generate(runtime, [3, 5], {"a": 0.5, "b": 2.0}, Sampling(max_new_tokens=2)))
assert len(replay(runtime)) > 1
print("torch" in sys.modules)
"""


def test_running_a_bundle_imports_no_torch(bundle):
    got = subprocess.run(
        [sys.executable, "-c", _USE, str(bundle)], capture_output=True, text=True, check=False
    )
    assert (got.returncode, got.stdout) == (0, "False\n"), got.stderr


class TestThreads:
    def test_different_adapters_at_once_equal_one_at_a_time(self, runtime, prompts):
        selections = [None, "a", "b", {"a": 0.5, "b": 1.5}]
        expected = [[logits(runtime, ids, chosen) for ids in prompts] for chosen in selections]
        start = threading.Barrier(len(selections))

        def work(index):
            start.wait()
            rounds = [[logits(runtime, ids, selections[index]) for ids in prompts]] * 5
            return all(
                np.array_equal(got, want)
                for outputs in rounds
                for got, want in zip(outputs, expected[index], strict=True)
            )

        with concurrent.futures.ThreadPoolExecutor(len(selections)) as pool:
            assert all(pool.map(work, range(len(selections))))

    def test_one_thread_may_unload_what_others_run(self, runtime, prompts):
        expected = {name: logits(runtime, prompts[0], name) for name in "ab"}
        stop = threading.Event()

        def unload():
            while not stop.is_set():
                runtime.unload("a")

        def work(name):
            return all(
                np.array_equal(logits(runtime, prompts[0], name), expected[name]) for _ in range(30)
            )

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            unloading = pool.submit(unload)
            working = [pool.submit(work, name) for name in "ab"]
            try:
                assert all(future.result() for future in working)
            finally:
                stop.set()
            unloading.result()


def flip_byte(file, position=-8):
    content = bytearray(file.read_bytes())
    content[position] ^= 0x10
    file.write_bytes(content)


class TestRefusals:
    def test_an_unknown_adapter(self, runtime, prompts):
        with pytest.raises(LoraportError, match=r"adapter 'c': expected one .* \(a, b\)"):
            logits(runtime, prompts[0], "c")
        with pytest.raises(LoraportError, match="adapter 'c'"):
            logits(runtime, prompts[0], {"a": 1.0, "c": 1.0})

    @pytest.mark.parametrize("strength", [float("nan"), float("inf"), float("-inf"), "1", None])
    def test_a_strength_that_is_no_finite_number(self, runtime, prompts, strength):
        with pytest.raises(LoraportError, match="strength of 'a': expected a finite number"):
            logits(runtime, prompts[0], {"a": strength})

    def test_a_strength_that_leaves_the_dtypes_range(self, runtime, prompts):
        with pytest.raises(LoraportError, match=r"strengths 1e\+300: .* use smaller strengths"):
            logits(runtime, prompts[0], {"a": 1e300})
        assert np.isfinite(logits(runtime, prompts[0], {"a": 1.5})).all()

    def test_inputs_missing_and_too_many_are_all_named(self, runtime, prompts):
        inputs = inputs_of(runtime, prompts[0])
        inputs["input_idz"] = inputs.pop("input_ids")
        del inputs["past_key_values.1.key"]
        with pytest.raises(LoraportError) as refused:
            runtime.run(inputs)
        for name in ("input_ids", "past_key_values.1.key", "input_idz"):
            assert f"  - {name}: expected" in str(refused.value)

    def test_a_slot_is_no_input_of_a_run(self, runtime, prompts):
        inputs = inputs_of(runtime, prompts[0])
        inputs["model.layers.0.mlp.down_proj.lora_A"] = np.ones((48, 1), np.float32)
        with pytest.raises(LoraportError, match=r"down_proj\.lora_A: expected one of the inputs"):
            runtime.run(inputs)

    def test_an_input_of_another_type_or_shape(self, runtime, prompts):
        inputs = inputs_of(runtime, prompts[0])
        wrong_type = inputs | {"input_ids": inputs["input_ids"].astype(np.int32)}
        with pytest.raises(LoraportError, match="the model refuses these inputs"):
            runtime.run(wrong_type)
        with pytest.raises(LoraportError, match="the model refuses these inputs"):
            runtime.run(inputs | {"input_ids": inputs["input_ids"][0]})
        with pytest.raises(LoraportError, match="the model refuses these inputs"):
            runtime.run(inputs | {"input_ids": inputs["input_ids"].tolist()})
        # The lane is none the worse for it.
        assert np.isfinite(logits(runtime, prompts[0])).all()

    def test_an_unknown_output(self, runtime, prompts):
        with pytest.raises(
            LoraportError, match=r"differ\n  - nope: expected one of the outputs logits"
        ):
            runtime.run(inputs_of(runtime, prompts[0]), outputs=["logits", "nope"])

    def test_an_unknown_provider(self, bundle):
        with pytest.raises(LoraportError, match="provider: expected one of cpu, cuda, got 'tpu'"):
            Runtime(bundle, provider="tpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_where_there_is_none_is_refused_and_never_replaced(self, bundle):
        with pytest.raises(LoraportError, match=r"(?s)CUDAExecutionProvider|cannot open it"):
            Runtime(bundle, provider="cuda")

    @pytest.mark.parametrize(
        "file",
        [
            "model.onnx",
            "model.onnx.data",
            "model.required.onnx",
            "adapters/a.safetensors",
            "adapters/b.onnx_adapter",
            "golden/base.safetensors",
            "tokenizer.json",
        ],
    )
    def test_a_flipped_byte_in_any_file_is_refused(self, own_bundle, file):
        flip_byte(own_bundle / file)
        with pytest.raises(LoraportError) as refused:
            Runtime(own_bundle)
        assert f"  - {file}: expected sha256" in str(refused.value)
        assert str(refused.value).count("\n") == 1

    def test_a_missing_file_is_refused(self, own_bundle):
        (own_bundle / "model.onnx.data").unlink()
        with pytest.raises(LoraportError, match=r"model\.onnx\.data: expected the file"):
            Runtime(own_bundle)

    def test_a_graph_that_cannot_be_opened(self, own_bundle):
        (own_bundle / "model.onnx").write_bytes(b"no graph")
        with pytest.raises(LoraportError, match="ONNX Runtime cannot open it"):
            Runtime(own_bundle, check=False)

    def test_no_bundle(self, tmp_path):
        with pytest.raises(LoraportError, match=r"expected a directory with manifest\.json"):
            Runtime(tmp_path)

    def test_adapter_tensors_that_do_not_fit_are_all_named(self, own_bundle, prompts):
        from safetensors.torch import load_file, save_file

        file = own_bundle / "adapters" / "a.safetensors"
        tensors = load_file(file)
        tensors["model.layers.7.mlp.up_proj.lora_A"] = torch.ones(32, 4)
        del tensors["model.layers.0.mlp.up_proj.lora_B"]
        tensors["model.layers.0.mlp.down_proj.lora_A"] = torch.ones(47, 4)
        tensors["model.layers.1.mlp.down_proj.lora_B"] = torch.ones(5, 32)
        save_file(tensors, file)
        with pytest.raises(LoraportError) as refused:
            logits(Runtime(own_bundle, check=False), prompts[0], "a")
        for name in (
            "model.layers.7.mlp.up_proj.lora_A: expected a slot input",
            "model.layers.0.mlp.up_proj.lora_B: expected the partner",
            "model.layers.0.mlp.down_proj.lora_A: expected [48, r], got [47, 4]",
            "model.layers.1.mlp.down_proj: expected lora_A and lora_B of one rank, "
            "got ranks [4, 5]",
        ):
            assert f"  - {name}" in str(refused.value)


def test_a_bundle_is_moved_freely(bundle, tmp_path, prompts):
    moved = shutil.copytree(bundle, tmp_path / "elsewhere" / "ship")
    got = logits(Runtime(moved, threads=1), prompts[0], "a")
    assert np.array_equal(got, logits(Runtime(bundle, threads=1), prompts[0], "a"))
