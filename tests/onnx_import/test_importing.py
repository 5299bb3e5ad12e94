"""A model that somebody else exported takes adapters, and computes what PEFT computes."""

import os
import shutil
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import command
from peft_cases import load_with_peft
from safetensors.torch import save_file

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots import slot_nodes
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.golden import golden_reason
from loraport.bundle.manifest import check_files, read_manifest
from loraport.bundle.sources import base_source, record_adapter
from loraport.errors import LoraportError
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden


def arrays(seed=1):
    ids = np.random.default_rng(seed).integers(1, 61, (3, 5))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def imported(bert_onnx, made_bert, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "bundle"
    import_model(bert_onnx, out)
    add_adapters(out, {"a": read_adapter(made_bert.path)})
    return out


def reference(made_bert):
    peft_model = load_with_peft(made_bert.fresh_base(), made_bert.path).eval()
    tensors = {name: torch.from_numpy(array) for name, array in arrays().items()}
    with torch.no_grad():
        base, adapted = made_bert.fresh_base().eval()(**tensors), peft_model(**tensors)
    return base.logits.numpy(), adapted.logits.numpy()


def test_it_computes_what_peft_computes(imported, made_bert):
    base, adapted = reference(made_bert)
    runtime = Runtime(imported)
    # float32 sums in another order.
    np.testing.assert_allclose(runtime.run(arrays())["logits"], base, atol=1e-4)
    np.testing.assert_allclose(runtime.run(arrays(), "a")["logits"], adapted, atol=1e-4)
    assert np.abs(adapted - base).max() > 0.05


def test_every_linear_module_has_its_own_name(imported, made_bert):
    linear = {n for n, m in made_bert.base.named_modules() if isinstance(m, torch.nn.Linear)}
    manifest = read_manifest(imported)
    assert set(manifest.slots.modules()) == linear
    assert manifest.unslotted["bert.embeddings.word_embeddings"].startswith("not asked for")


def test_the_fingerprint_is_the_checkpoints_own(imported, made_bert):
    from loraport.base.loading import fingerprint_model

    found = read_manifest(imported).fingerprint.modules
    expected = fingerprint_model(made_bert.base, sorted(found)).modules
    assert found == expected
    assert len(found) == len(read_manifest(imported).slots.modules())


def test_golden_cases_replay(imported):
    results = replay_golden(imported)
    assert {result.name for result in results} >= {"base", "adapter-a"}
    assert all(result.passed for result in results)


def test_the_graphs_are_valid_and_say_who_made_them(imported, bert_onnx):
    original = onnx.load(bert_onnx)
    for name in ("model.onnx", "model.required.onnx"):
        onnx.checker.check_model(str(imported / name), full_check=True)
        proto = onnx.load(imported / name)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        names = [value.name for value in proto.graph.input]
        assert len(names) == len(set(names))
        opsets = [
            {(entry.domain, entry.version) for entry in model.opset_import}
            for model in (proto, original)
        ]
        assert opsets[0] == opsets[1]
        assert proto.producer_name == original.producer_name
        said = {entry.key: entry.value for entry in proto.metadata_props}
        assert said["loraport.slots_by"].startswith("loraport ")
        assert said["loraport.slots_in"] == "bert.onnx"


def test_the_same_bytes_twice(bert_onnx, imported, tmp_path):
    import_model(bert_onnx, tmp_path / "again")
    for name in ("model.onnx", "model.required.onnx", "model.onnx.data"):
        assert (tmp_path / "again" / name).read_bytes() == (imported / name).read_bytes()


class TestExternalData:
    @pytest.fixture
    def outside(self, bert_onnx, tmp_path):
        """The same model with its weights in a data file in a folder."""
        directory = tmp_path / "source"
        (directory / "data").mkdir(parents=True)
        proto = onnx.load(bert_onnx)
        onnx.save(
            proto,
            directory / "m.onnx",
            save_as_external_data=True,
            location="data/w.bin",
            size_threshold=64,
        )
        return directory / "m.onnx"

    def test_data_is_linked_and_never_rewritten(self, outside, made_bert, tmp_path):
        data = outside.parent / "data" / "w.bin"
        data.chmod(0o444)
        before = data.read_bytes()
        import_model(outside, tmp_path / "out")
        assert (tmp_path / "out" / "data" / "w.bin").samefile(data)
        assert data.read_bytes() == before
        assert data.stat().st_mode & 0o777 == 0o444
        check_files(read_manifest(tmp_path / "out"), tmp_path / "out")
        # A file with two names now: it can still be read, and imported again.
        import_model(outside, tmp_path / "again")
        add_adapters(tmp_path / "again", {"a": read_adapter(made_bert.path)})
        _, adapted = reference(made_bert)
        got = Runtime(tmp_path / "again").run(arrays(), "a")["logits"]
        np.testing.assert_allclose(got, adapted, atol=1e-4)

    def test_linked_data_is_told_and_can_be_stored_anew(self, outside, tmp_path):
        """onnx itself refuses files with two names."""
        said = []
        import_model(outside, tmp_path / "out", progress=said.append)
        with pytest.raises(onnx.checker.ValidationError, match="hard link"):
            onnx.load(outside)
        (told,) = (text for text in said if "shared with the model" in text)
        assert "by hard links: data/w.bin; onnx.load refuses" in told
        for precision in ("int8", "int4", "fp16"):
            import_model(outside, tmp_path / precision, ImportOptions(precision=precision))
            assert read_manifest(tmp_path / precision).precision == precision

    def test_many_files_are_told_in_one_line(self, bert_onnx, tmp_path):
        (tmp_path / "source").mkdir()
        file = tmp_path / "source" / "m.onnx"
        onnx.save(
            onnx.load(bert_onnx),
            file,
            save_as_external_data=True,
            all_tensors_to_one_file=False,
            size_threshold=64,
        )
        count = len(list(file.parent.iterdir())) - 1
        said = []
        import_model(file, tmp_path / "out", progress=said.append)
        (told,) = (text for text in said if "shared with the model" in text)
        assert f" and {count - 3} more; onnx.load" in told
        assert count > 10

    def test_data_is_copied_where_that_is_asked_for(self, outside, bert_onnx, tmp_path):
        said = []
        options = ImportOptions(copy_data=True)
        import_model(outside, tmp_path / "out", options, progress=said.append)
        data = outside.parent / "data" / "w.bin"
        assert data.stat().st_nlink == 1
        assert (tmp_path / "out" / "data" / "w.bin").read_bytes() == data.read_bytes()
        assert not any("shared" in text for text in said)
        onnx.checker.check_model(str(outside), full_check=True)
        onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)
        one, two = (onnx.load(file).graph.initializer[0] for file in (outside, bert_onnx))
        assert one.raw_data == two.raw_data

    def test_data_is_copied_where_it_cannot_be_linked(self, outside, tmp_path, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise OSError(18, "another file system")

        monkeypatch.setattr(os, "link", refuse)
        said = []
        import_model(outside, tmp_path / "out", progress=said.append)
        data = outside.parent / "data" / "w.bin"
        assert not (tmp_path / "out" / "data" / "w.bin").samefile(data)
        assert any("cannot be linked" in text for text in said)
        assert all(result.passed for result in replay_golden(tmp_path / "out"))

    @pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "data/none.bin"])
    def test_a_location_that_is_no_file_of_the_model_is_refused(self, outside, tmp_path, location):
        proto = onnx.load(outside, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        bad = outside.parent / "bad.onnx"
        bad.write_bytes(proto.SerializeToString())
        (outside.parent.parent / "w.bin").write_bytes((outside.parent / "data/w.bin").read_bytes())
        with pytest.raises(LoraportError, match="its data cannot be read"):
            import_model(bad, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_data_file_that_is_too_short_is_refused(self, outside, tmp_path):
        data = outside.parent / "data" / "w.bin"
        data.write_bytes(data.read_bytes()[:-100])
        with pytest.raises(LoraportError, match="fetch the data file again"):
            import_model(outside, tmp_path / "out")


def test_a_graph_that_opens_no_more_is_refused(tmp_path, monkeypatch):
    """``Gemm`` without a third input is of opset 11; zeros stand for it before."""
    from onnx import helper as make
    from onnx import numpy_helper

    weight, bias = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    graph = make.make_graph(
        [make.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], name="/fc/Gemm")],
        "g",
        [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "fc.weight"), numpy_helper.from_array(bias, "fc.bias")],
    )
    for opset, optional in ((9, 9), (9, 11), (11, 11)):
        monkeypatch.setattr(slot_nodes, "_OPTIONAL_IN_GEMM", optional)
        opsets = [make.make_opsetid("", opset)]
        onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.ONNX")
        arguments = ("export", tmp_path / "m.ONNX", "-o", tmp_path / "out", "--slots", "lora,gain")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, said = command(*arguments)
        if optional == 9:
            assert code == 2
            assert "m.ONNX: ONNX Runtime runs it, but not with these slots" in said
            assert "partial" not in said
            assert not (tmp_path / "out").exists()
        else:
            assert code == 0
    with pytest.raises(LoraportError, match=r"fc\.lora_A: expected a graph without an input"):
        import_model(tmp_path / "out" / "model.onnx", tmp_path / "again")


@pytest.mark.parametrize("name", ["model.onnx", "model.required.onnx"])
@pytest.mark.parametrize("said", [True, False], ids=["metadata", "optimized"])
def test_a_graph_that_has_slots_already_is_refused(name, said, tmp_path):
    # New slots, of other layers, would stand beside slots that nothing fills any more.
    make, rng = onnx.helper, np.random.default_rng(0)
    weights = {"fc": rng.normal(size=(8, 4)), "other": rng.normal(size=(4, 5))}
    stored = [
        onnx.numpy_helper.from_array(w.astype(np.float32), f"{n}.weight")
        for n, w in weights.items()
    ]
    nodes = [
        make.make_node("MatMul", ["x", "fc.weight"], ["h"], name="/fc/MatMul"),
        make.make_node("MatMul", ["h", "other.weight"], ["y"], name="/other/MatMul"),
    ]
    ends = [make.make_tensor_value_info(n, 1, [None, w]) for n, w in (("x", 8), ("y", 5))]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "one", ImportOptions(copy_data=True))
    again = tmp_path / "one" / name
    proto = onnx.load(again)
    if not said:
        del proto.metadata_props[:]
        onnx.save(proto, again)
    refused = r"lora_A: expected a graph without an input that is a slot's, got one .*with 2 slots"
    remedy = r"export m\.onnx, which they were put in" if said else "export the model that they"
    for slots in (SlotOptions(), SlotOptions(("lora", "embedding", "conv"), per_row=True)):
        with pytest.raises(LoraportError, match=f"{refused}; {remedy}"):
            import_model(again, tmp_path / "two", ImportOptions(slots=slots))
    with pytest.raises(LoraportError, match=f"{refused}; {remedy}"):
        import_model(again, tmp_path / "two", ImportOptions(slots=SlotOptions(("embedding",))))
    assert not (tmp_path / "two").exists()


class Convolved(torch.nn.Module):
    """What TorchScript calls by the path of whoever called it."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        )
        self.last = torch.nn.Conv2d(4, 5, 1)

    def forward(self, x):
        return self.last(self.body(x))

    def save(self, directory):
        directory.mkdir()
        save_file(self.state_dict(), directory / "model.safetensors")
        (directory / "config.json").write_text("{}")


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize(("dynamo", "fold"), [(False, True), (False, False), (True, True)])
def test_kernels_that_a_normalization_was_folded_into_are_told(dynamo, fold, tmp_path):
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    more = {"verbose": False} if dynamo else {"do_constant_folding": fold, "training": mode}
    model, images = Convolved(), (torch.randn(1, 3, 6, 6),)
    model.train(not fold)
    torch.onnx.export(model, images, tmp_path / "m.onnx", dynamo=dynamo, **more)
    said = []
    options = ImportOptions(slots=SlotOptions(("conv",)))
    import_model(tmp_path / "m.onnx", tmp_path / "out", options, progress=said.append)
    assert list(read_manifest(tmp_path / "out").slots.modules()) == ["body.0", "last"]
    told = [text for text in said if "computed by the exporter" in text]
    assert len(told) == fold
    assert all("folded in: body.0;" in text for text in told)
    # An adapter of the convolution as it was changes other numbers where it is folded.
    random = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3, 3, 3, generator=random), torch.randn(4, 2, 1, 1, generator=random)
    adapter = Adapter({"body.0": LoraModule(ModuleKind.CONV, a, b, alpha=2)})
    model.save(tmp_path / "base")
    if fold:
        with pytest.raises(LoraportError, match=r"body\.0: expected the module's own weight in"):
            add_adapters(tmp_path / "out", {"a": adapter})
        with pytest.raises(LoraportError, match=r"body\.0: expected the weight that the bundle"):
            add_adapters(tmp_path / "out", {"a": adapter}, base=str(tmp_path / "base"))
        assert not read_manifest(tmp_path / "out").adapters
        add_adapters(tmp_path / "out", {"a": adapter}, ignore_fingerprint=True)
    else:
        add_adapters(tmp_path / "out", {"a": adapter})
    plain = LoraModule(ModuleKind.CONV, torch.randn(2, 4, 1, 1), torch.randn(5, 2, 1, 1), alpha=2)
    add_adapters(tmp_path / "out", {"last": Adapter({"last": plain})})


@pytest.mark.parametrize("tool", ["onnxruntime", "tf2onnx", "none"])
def test_weights_that_other_tools_folded_into_are_told(tool, tmp_path):
    """They keep their modules' names, which the tools add to; only names tell of them."""
    make, random = onnx.helper, np.random.default_rng(0)
    shapes = {
        "net.0.weight": (6, 4, 1, 1),
        "fc.weight": (6, 5),
        "last.weight": (5, 3),
        "k": (6, 1, 1),
    }
    shapes |= {f"{norm}.{n}": (w,) for norm, w in (("n0", 6), ("n1", 5)) for n in "abcd"}
    weights = {n: random.uniform(0.5, 2, s).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        make.make_node("Conv", ["x", "net.0.weight"], ["a"], name="/net/net.0/Conv"),
        make.make_node("Mul", ["a", "k"], ["b"], name="/net/Mul"),
        make.make_node("BatchNormalization", ["b", *(f"n0.{n}" for n in "abcd")], ["c"]),
        make.make_node("ReduceMean", ["c"], ["d"], axes=[2, 3], keepdims=0),
        make.make_node("MatMul", ["d", "fc.weight"], ["e"], name="/fc/MatMul"),
        make.make_node("BatchNormalization", ["e", *(f"n1.{n}" for n in "abcd")], ["f"]),
        make.make_node("MatMul", ["f", "last.weight"], ["y"], name="/last/MatMul"),
    ]
    if tool == "tf2onnx":
        weights["net.0/Conv2D_weights_fused_bn"] = weights.pop("net.0.weight")
        nodes[0] = make.make_node(
            "Conv", ["x", "net.0/Conv2D_weights_fused_bn"], ["a"], name="net.0/Conv2D"
        )
    ends = [
        make.make_tensor_value_info("x", 1, ["n", 4, 3, 3]),
        make.make_tensor_value_info("y", 1, ["n", 3]),
    ]
    stored = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    file = tmp_path / "m.onnx"
    opsets = [make.make_opsetid("", 15)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=8), file)
    if tool == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "folded.onnx")
        onnxruntime.InferenceSession(file, options)
        file = tmp_path / "folded.onnx"
        assert "Mul" not in {node.op_type for node in onnx.load(file).graph.node}
    said = []
    import_model(
        file,
        tmp_path / "out",
        ImportOptions(slots=SlotOptions(("lora", "conv"))),
        progress=said.append,
    )
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest.slots.modules()) == {"net.0", "fc", "last"}
    folded = {"onnxruntime": ("net.0", "fc"), "tf2onnx": ("net.0",), "none": ()}[tool]
    assert sorted(manifest.computed) == sorted(folded)
    assert sum("computed by the exporter" in text for text in said) == bool(folded)
    adapters = {
        "net.0": LoraModule(
            ModuleKind.CONV, torch.ones(2, 4, 1, 1), torch.ones(6, 2, 1, 1), alpha=2
        ),
        "fc": LoraModule(ModuleKind.LINEAR, torch.ones(2, 6), torch.ones(5, 2), alpha=2),
        "last": LoraModule(ModuleKind.LINEAR, torch.ones(2, 5), torch.ones(3, 2), alpha=2),
    }
    for path, module in adapters.items():
        named = {path.replace(".", "_"): Adapter({path: module})}
        if path in folded:
            with pytest.raises(
                LoraportError, match=rf"{path}: expected the module's own weight in"
            ):
                add_adapters(tmp_path / "out", named)
        else:
            add_adapters(tmp_path / "out", named)


class Normalized(torch.nn.Module):
    """A linear layer that torch fuses with the normalization behind it, and one without."""

    def __init__(self, *, bias):
        super().__init__()
        self.first = torch.nn.Linear(6, 5, bias=bias)
        self.norm, self.last = torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4)
        torch.nn.init.uniform_(self.norm.running_var, 0.3, 3)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("bias", [True, False])
def test_matrices_that_a_normalization_was_folded_into_are_told(bias, tmp_path):
    """The fused weight keeps its name: an adapter's update was added to another, unnoticed."""
    torch.manual_seed(0)
    model, x = Normalized(bias=bias).eval(), torch.randn(7, 6)
    torch.onnx.export(
        model, (x,), tmp_path / "m.onnx", input_names=["x"], dynamo=True, verbose=False
    )
    weights = {
        t.name: onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "m.onnx").graph.initializer
    }
    assert np.abs(weights["first.weight"] - model.first.weight.detach().numpy()).max() > 0.05
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.computed == ("first",)
    assert list(manifest.slots.modules()) == ["first", "last"]
    adapters = {
        name: Adapter(
            {name: LoraModule(ModuleKind.LINEAR, torch.randn(2, i), torch.randn(o, 2), alpha=2)}
        )
        for name, i, o in (("first", 6, 5), ("last", 5, 4))
    }
    with pytest.raises(LoraportError, match=r"first: expected the module's own weight in the"):
        add_adapters(tmp_path / "out", adapters)
    add_adapters(tmp_path / "out", {"last": adapters["last"]})
    module = adapters["last"].modules["last"]
    got = Runtime(tmp_path / "out", threads=1).run({"x": x.numpy()}, "last")
    with torch.no_grad():
        base = model(x)
        model.last.weight += module.lora_B @ module.lora_A
        expected = model(x)
    (output,) = got.values()
    np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)
    assert (base - expected).abs().max() > 0.1


class Shared(torch.nn.Module):
    """Modules with one weight, functions with a module's, and one called twice."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.twice = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
        self.other.weight = self.one.weight
        self.inner = torch.nn.Module()
        self.inner.deep = torch.nn.Linear(8, 8)

    def forward(self, x):
        x = torch.nn.functional.linear(x, self.inner.deep.weight, self.inner.deep.bias)
        return self.other(self.twice(self.twice(self.one(x)).relu()).relu())


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_modules_that_share_a_weight_have_slots_of_their_own(tmp_path):
    """As PEFT has it, where the exporter recorded which is which."""
    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(3, 8)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", input_names=["x"], dynamo=True)
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    modules = read_manifest(tmp_path / "out").slots.modules()
    assert list(modules) == ["inner.deep", "one", "twice", "other"]
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random) for shape in ((2, 8), (8, 2)))
    adapter = Adapter({"other": LoraModule(ModuleKind.LINEAR, a, b, alpha=2)})
    add_adapters(tmp_path / "out", {"a": adapter})
    with torch.no_grad():
        base = model(x).numpy()
        model.other.weight = torch.nn.Parameter(model.other.weight + b @ a)
        expected = model(x).numpy()
    runtime = Runtime(tmp_path / "out")
    (got,) = runtime.run({"x": x.numpy()}, "a").values()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    (plain,) = runtime.run({"x": x.numpy()}).values()
    np.testing.assert_allclose(plain, base, atol=1e-5)
    assert np.abs(expected - base).max() > 0.1


class Twins(torch.nn.Module):
    """``b`` is equal to ``a``, ``f`` to ``e``; so are the norms, by chance."""

    def __init__(self):
        super().__init__()
        for name in "abefc":
            setattr(self, name, torch.nn.Linear(8, 8))
        self.one, self.other = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.b.load_state_dict(self.a.state_dict())
        self.f.load_state_dict(self.e.state_dict())

    def forward(self, x):
        x = torch.tanh(self.one(self.a(x))) + torch.relu(self.b(x))
        x = torch.tanh(self.e(x)) + 2 * torch.tanh(self.f(x))
        return self.c(self.other(x))


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_merged_layers_have_no_slot_and_others_do(tmp_path):
    torch.manual_seed(0)
    module = Twins().eval()
    x = torch.randn(2, 8)
    torch.onnx.export(module, (x,), tmp_path / "m.onnx", input_names=["x"], dynamo=True)
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.slots.modules()) == ["c"]
    assert sorted(manifest.unslotted) == ["a", "b", "e", "f"]
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random) for shape in ((2, 8), (8, 2)))
    adapters = {p: Adapter({p: LoraModule(ModuleKind.LINEAR, a, b, alpha=2)}) for p in "abc"}
    for path in "ab":
        with pytest.raises(LoraportError, match=r"merged|by one operator"):
            add_adapters(tmp_path / "out", {path: adapters[path]})
    add_adapters(tmp_path / "out", {"c": adapters["c"]})
    with torch.no_grad():
        base = module(x).numpy()
        module.c.weight += b @ a
        expected = module(x).numpy()
    runtime = Runtime(tmp_path / "out")
    (got,) = runtime.run({"x": x.numpy()}, {"c": 1.0}).values()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - base).max() > 0.1


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
@pytest.mark.parametrize("dynamo", [False, True])
def test_folded_kernels_are_told_where_they_were_fused_with_an_activation(dynamo, tmp_path):
    """ONNX Runtime's optimizer writes FusedConv, and drops what the exporter recorded."""
    model = Convolved().eval()
    model.body[0].bias = None
    model.body[1].running_mean.uniform_(-1, 1)
    images = (torch.randn(1, 3, 6, 6),)
    more = {"verbose": False} if dynamo else {}
    torch.onnx.export(model, images, tmp_path / "plain.onnx", dynamo=dynamo, **more)
    wanted = onnxruntime.SessionOptions()
    wanted.log_severity_level = 3
    wanted.optimized_model_filepath = str(tmp_path / "m.onnx")
    wanted.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(tmp_path / "plain.onnx", wanted)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds == ["FusedConv", "Conv"]
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(slots=SlotOptions(("conv",))))
    assert list(read_manifest(tmp_path / "out").slots.modules()) == ["body.0", "last"]
    a, b = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    adapter = Adapter({"body.0": LoraModule(ModuleKind.CONV, a, b, alpha=2)})
    with pytest.raises(LoraportError, match=r"body\.0: expected the module's own weight in"):
        add_adapters(tmp_path / "out", {"a": adapter})
    a, b = torch.randn(2, 4, 1, 1), torch.randn(5, 2, 1, 1)
    add_adapters(
        tmp_path / "out", {"b": Adapter({"last": LoraModule(ModuleKind.CONV, a, b, alpha=2)})}
    )


def test_where_no_rows_can_be_told_apart_the_reasons_are_told(tmp_path):
    make, kind = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "layer.weight")
    nodes = [
        make.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        make.make_node("MatMul", ["t", "layer.weight"], ["y"]),
    ]
    ends = [
        make.make_tensor_value_info(n, kind.FLOAT, s) for n, s in (("x", [3, "n"]), ("y", None))
    ]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    options = ImportOptions(slots=SlotOptions(("lora",), per_row=True))
    with pytest.raises(LoraportError, match="layer: its input is not known to have the batch"):
        import_model(tmp_path / "m.onnx", tmp_path / "out", options)
    import_model(tmp_path / "m.onnx", tmp_path / "out")


@pytest.mark.parametrize("place", ["initializer", "branch", "constant"])
def test_sparse_weights_are_refused_by_name(tmp_path, place):
    make, kind = onnx.helper, onnx.TensorProto
    values = make.make_tensor("layer.weight", kind.FLOAT, [2], [1.0, 2.0])
    sparse = make.make_sparse_tensor(values, make.make_tensor("p", kind.INT64, [2], [0, 4]), [3, 3])
    nodes = [make.make_node("MatMul", ["x", "layer.weight"], ["y"])]
    if place == "constant":
        nodes.insert(0, make.make_node("Constant", [], ["layer.weight"], sparse_value=sparse))
    ends = [make.make_tensor_value_info(n, kind.FLOAT, ["rows", 3]) for n in "xy"]
    choice = make.make_tensor_value_info("choice", kind.BOOL, [])
    graph = make.make_graph(nodes, "g", [ends[0], choice], ends[1:])
    if place != "constant":
        graph.sparse_initializer.append(sparse)
    if place == "branch":
        del graph.input[:]
        node = make.make_node("If", ["choice"], ["y"], then_branch=graph, else_branch=graph)
        graph = make.make_graph([node], "g", [ends[0], choice], ends[1:])
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"dense, got sparse ones: layer\.weight; store them"):
        import_model(tmp_path / "m.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_maps_are_refused_with_what_to_do(tmp_path):
    """What scikit-learn's classifiers give; onnx-ir knows no such type."""
    make, kind = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    labels = make.make_map_type_proto(kind.INT64, make.make_tensor_type_proto(kind.FLOAT, []))
    nodes = [
        make.make_node("MatMul", ["x", "w"], ["scores"]),
        make.make_node(
            "ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
        ),
    ]
    given = make.make_tensor_value_info("x", kind.FLOAT, ["n", 3])
    maps = make.make_value_info("maps", make.make_sequence_type_proto(labels))
    graph = make.make_graph(nodes, "g", [given], [maps], [weight])
    opsets = [make.make_opsetid("", 18), make.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(LoraportError, match=r"got maps: maps; export again without ZipMap"):
        import_model(tmp_path / "m.onnx", tmp_path / "out")


def test_with_the_checkpoint_names_need_not_be_in_the_graph(
    bert_onnx, made_bert, imported, tmp_path
):
    nameless = onnx.load(bert_onnx)
    for number, node in enumerate(nameless.graph.node):
        node.name = f"node_{number}"
    onnx.save(nameless, tmp_path / "nameless.onnx")
    base = tmp_path / "base"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_bert.fresh_base().save_pretrained(base)
    import_model(tmp_path / "nameless.onnx", tmp_path / "out", ImportOptions(base=str(base)))
    add_adapters(tmp_path / "out", {"a": read_adapter(made_bert.path)})
    record_adapter(tmp_path / "out", "a", str(made_bert.path))
    assert base_source(tmp_path / "out") == str(base)
    _, adapted = reference(made_bert)
    got = Runtime(tmp_path / "out").run(arrays(), "a")["logits"]
    np.testing.assert_allclose(got, adapted, atol=1e-4)
    slots = read_manifest(tmp_path / "out").slots.modules()
    assert set(slots) == set(read_manifest(imported).slots.modules())


def test_inputs_can_be_given(bert_onnx, tmp_path):
    import_model(bert_onnx, tmp_path / "out", ImportOptions(inputs=arrays(7)))
    from loraport.bundle.golden import base_inputs

    kept = base_inputs(tmp_path / "out", read_manifest(tmp_path / "out"))
    assert np.array_equal(kept["input_ids"], arrays(7)["input_ids"])


def test_no_possible_run_is_said_and_adapters_still_fit(bert_onnx, made_bert, tmp_path):
    said = []
    wrong = ImportOptions(inputs={"input_ids": np.zeros((1, 2), np.int64)})
    import_model(bert_onnx, tmp_path / "out", wrong, progress=said.append)
    assert any("no golden outputs: give --input" in text for text in said)
    add_adapters(tmp_path / "out", {"a": read_adapter(made_bert.path)})
    _, adapted = reference(made_bert)
    got = Runtime(tmp_path / "out").run(arrays(), "a")["logits"]
    np.testing.assert_allclose(got, adapted, atol=1e-4)


def test_a_graph_that_onnx_runtime_never_opens_is_told_apart_from_inputs(tmp_path):
    """Scales for each column came with opset 13: no inputs would help."""
    from onnx import TensorProto, helper, numpy_helper

    arrays = {"q": np.ones((3, 4), np.int8), "s": np.ones(4, np.float32), "z": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="rows", axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    opsets = [helper.make_opsetid("", 10)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    said = []
    import_model(tmp_path / "m.onnx", tmp_path / "out", progress=said.append)
    (told,) = [text for text in said if "no golden outputs" in text]
    assert told.startswith("no golden outputs: ONNX Runtime does not open m.onnx itself: ")
    assert "axis" in told
    assert "--input" not in told
    assert str(tmp_path) not in told
    assert golden_reason(tmp_path / "out") == told.removeprefix("no golden outputs: ")


def test_a_graph_without_any_place_is_refused_with_the_reasons(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    weights = {n: np.ones(s, np.float32) for n, s in (("w", (1, 16, 3)), ("r", (1, 16, 4)))}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], name="rnn", hidden_size=4)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 1, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "g", [x], [y], constants)
    onnx.save(helper.make_model(graph), tmp_path / "rnn.onnx")
    with pytest.raises(LoraportError, match="rnn: LSTM: a recurrent layer's projections"):
        import_model(tmp_path / "rnn.onnx", tmp_path / "out")


def test_weights_that_the_graph_computes_are_said_to_be_nowhere(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Cos", ["zeros"], ["ones"]),
        helper.make_node("MatMul", ["x", "ones"], ["y"], name="computed"),
        helper.make_node("MatMul", ["y", "vector"], ["v"], name="stored, but no matrix"),
        helper.make_node("Transpose", ["x"], ["turned"]),
        helper.make_node("MatMul", ["y", "turned"], ["z"], name="of two inputs"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    v = helper.make_tensor_value_info("v", TensorProto.FLOAT, None)
    arrays = {"shape": np.array([3, 3]), "vector": np.ones(3, np.float32)}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [z, v], constants)
    onnx.save(helper.make_model(graph), tmp_path / "m")
    with pytest.raises(LoraportError) as refused:
        import_model(tmp_path / "m", tmp_path / "out")
    lines = str(refused.value).splitlines()
    assert lines[1:] == [
        "  - computed: MatMul: its weight is not stored, Cos computes it",
        "  - stored, but no matrix: MatMul: its constant of shape (3,) is no matrix of floats",
    ]


def test_weights_without_elements_are_listed_and_others_have_slots(tmp_path):
    """A layer that was pruned to no features: the whole model could not be exported."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    arrays = {"full.weight": weight, "none.weight": np.zeros((3, 0), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "full.weight"], ["h"], "full"),
        helper.make_node("MatMul", ["h", "none.weight"], ["nothing"], "none"),
        helper.make_node("Concat", ["h", "nothing"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=opsets, ir_version=8
    )
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.slots.modules()) == ["full"]
    assert manifest.unslotted == {"none": "MatMul: its constant of shape (3, 0) is empty"}
    a, b = np.ones((1, 4), np.float32), np.array([[1], [-2], [3]], np.float32)
    module = LoraModule(ModuleKind.LINEAR, torch.from_numpy(a), torch.from_numpy(b), alpha=1)
    add_adapters(tmp_path / "out", {"a": Adapter({"full": module})})
    given = np.arange(8, dtype=np.float32).reshape(2, 4)
    base, adapted = (Runtime(tmp_path / "out").run({"x": given}, n)["y"] for n in (None, "a"))
    np.testing.assert_allclose(base, given @ weight, rtol=1e-5)
    np.testing.assert_allclose(adapted, given @ (weight + (b @ a).T), rtol=1e-5)
    assert np.abs(adapted - base).max() > 1
