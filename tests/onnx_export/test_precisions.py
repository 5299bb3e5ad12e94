"""Every precision: the graph's own weights and the adapter in floating point, against PyTorch."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from command_line import command
from onnx_graphs import session
from peft_cases import Case, bert, load_with_peft, make_case
from tiny_llm import PHI3, save_adapter, save_base, tokenizer

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.modules.base_parameters import BaseParameters
from converters.onnx.modules.graph_weights import load_graph_weights
from converters.onnx.packing.pack import pack
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, Replacement
from loraport.base.loading import load_model
from loraport.bundle.golden import base_inputs, golden_reason
from loraport.bundle.manifest import read_manifest
from loraport.cli.verify import _reference_model
from loraport.errors import LoraportError
from loraport.parity import verify_bundle
from loraport.parity.changes import changes_of
from loraport.runtime import Runtime
from loraport.runtime.replay import replay_golden
from loraport.runtime.resident import read_packed


def relative(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def torch_logits(model, inputs, adapter=None):
    """Logits of a model, and of the same with PEFT's adapter."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        base = model(**tensors).logits.numpy()
        if adapter is None:
            return base
        return base, load_with_peft(model, adapter)(**tensors).logits.numpy()


def save_tied(untied, directory):
    """Save a base whose head shares the embedding's weight, and return it."""
    model = load_model(str(untied))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def int8(tiny_base, adapter_a, tmp_path_factory):
    out = tmp_path_factory.mktemp("int8") / "bundle"
    export_base(str(tiny_base), out, ExportOptions(precision="int8"))
    add_adapters(out, {"a": read_adapter(adapter_a)})
    return out


class TestDecoder:
    def test_int8_computes_with_its_own_weights(self, int8, tiny_base, adapter_a):
        model = load_model(str(tiny_base))
        inputs = base_inputs(int8, read_manifest(int8))
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        exact = torch_logits(model, arguments)
        replaced = load_graph_weights(int8 / "model.onnx", model)
        # Every linear module, the head among them.
        assert len(replaced) == 2 * 7 + 1
        base, adapted = torch_logits(model, arguments, adapter_a)
        runtime = Runtime(int8, threads=1, float32_activations=True)
        got = {name: runtime.run(inputs, name, ["logits"])["logits"] for name in (None, "a")}
        np.testing.assert_allclose(got[None], base, atol=2e-4)
        np.testing.assert_allclose(got["a"], adapted, atol=2e-4)
        assert np.abs(adapted - base).max() > 0.5
        # Rounding shows: it is another base than the checkpoint, and only a little.
        assert np.abs(base - exact).max() > 2e-3
        assert relative(base, exact) < 0.02

    @pytest.mark.parametrize("precision", ["int8", "int4"])
    def test_a_tied_head_is_rounded_and_its_embedding_as_in_the_graph(
        self, tiny_base, tmp_path, precision
    ):
        """int4 rounds both, in one tensor; int8 leaves the embedding as it was."""
        base, out = tmp_path / "base", tmp_path / "bundle"
        model = save_tied(tiny_base, base)
        export_base(str(base), out, ExportOptions(precision=precision))
        rows = torch.randn(3, model.lm_head.in_features, generator=torch.Generator().manual_seed(0))
        trained = {"model.embed_tokens.weight": Replacement(rows, rows=(5, 9, 40))}
        model = load_model(str(base))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        own = model.lm_head.weight.detach().clone()
        load_graph_weights(out / "model.onnx", model)
        assert not torch.equal(model.lm_head.weight, own)
        assert torch.equal(model.model.embed_tokens.weight, own) is (precision == "int8")
        inputs = base_inputs(out, read_manifest(out))
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        got = Runtime(out, threads=1, float32_activations=True).run(inputs, None, ["logits"])
        exact = torch_logits(model, arguments)
        np.testing.assert_allclose(got["logits"], exact, atol=2e-4)
        # Rows trained in the embedding still act in the head, whose weight is another one now.
        found = changes_of([(Adapter({}, replacements=trained), 1.0)], model)
        assert set(found.replaced) == {"model.embed_tokens.weight", "lm_head.weight"}
        if precision == "int8":
            model.model.embed_tokens.weight = model.lm_head.weight  # the control: one for both
            assert np.abs(got["logits"] - torch_logits(model, arguments)).max() > 2e-3

    @pytest.mark.parametrize("precision", ["int4", "int8"])
    def test_trained_rows_are_what_was_trained_where_the_base_is_rounded(
        self, tiny_base, tmp_path, precision
    ):
        """In the embedding and in the head that shares its weight, each rounded or not."""
        base, out = tmp_path / "base", tmp_path / "bundle"
        model = save_tied(tiny_base, base)
        slots = SlotOptions(("lora", "gain", "embedding"))
        export_base(str(base), out, ExportOptions(precision=precision, slots=slots, lm_head=True))
        numbers = torch.Generator().manual_seed(0)
        tokens = (5, 9, 40)
        rows = torch.randn(3, model.lm_head.in_features, generator=numbers)
        trained = Adapter({}, {"model.embed_tokens.weight": Replacement(rows, rows=tokens)})
        add_adapters(out, {"tokens": trained})
        inputs = base_inputs(out, read_manifest(out))
        inputs["input_ids"] = inputs["input_ids"].copy()
        inputs["input_ids"][0, 1:4] = tokens
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        runtime = Runtime(out, threads=1, float32_activations=True)
        model = load_model(str(base))
        load_graph_weights(out / "model.onnx", model)
        idle = torch_logits(model, arguments)
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight.data[list(tokens)] = rows
        expected = torch_logits(model, arguments)
        got = runtime.run(inputs, "tokens", ["logits"])["logits"]
        np.testing.assert_allclose(got, expected, atol=3e-4)
        assert np.abs(expected - idle)[..., list(tokens)].max() > 1
        # DoRA on the head depends on what was trained, the rows on what the graph has.
        case = Case(
            lambda: load_model(str(base)), {"target_modules": ["lm_head"], "use_dora": True}
        )
        head = read_adapter(make_case(case, tmp_path / "head").path)
        add_adapters(out, {"head": head}, base=str(base))
        adapters = {"tokens": trained, "head": head}
        manifest = read_manifest(out)
        model, original = _reference_model(str(base), out, manifest, adapters)
        report = verify_bundle(out, model, adapters, original=original)
        assert report.passed, [check for check in report.checks if not check.passed]

    def test_a_module_that_the_graph_computes_in_parts_is_rounded_as_they_are(self, tmp_path):
        """The builder takes Phi-3's gate_up_proj apart."""
        from transformers import Phi3Config, Phi3ForCausalLM

        torch.manual_seed(0)
        base = save_base(tmp_path / "base", Phi3ForCausalLM(Phi3Config(**PHI3)))
        out = tmp_path / "bundle"
        slots = SlotOptions(("lora", "gain", "bias"))
        export_base(str(base), out, ExportOptions(precision="int4", slots=slots))
        options = {"target_modules": ["gate_up_proj", "o_proj"], "use_dora": True, "r": 3}
        adapter = save_adapter(base, Case(lambda: None, options), tmp_path / "adapter")
        adapters = {"a": read_adapter(adapter)}
        add_adapters(out, adapters)
        model = load_model(str(base))
        packed = {n: m for n, m in model.named_modules() if n.endswith("gate_up_proj")}
        own = {name: module.weight.detach().clone() for name, module in packed.items()}
        replaced = load_graph_weights(out / "model.onnx", model)
        assert len(replaced) == len(set(replaced))
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert set(replaced) == linear > packed.keys()
        inputs = base_inputs(out, read_manifest(out))
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        runtime = Runtime(out, threads=1, float32_activations=True)
        got = runtime.run(inputs, None, ["logits"])["logits"]
        np.testing.assert_allclose(got, torch_logits(model, arguments), atol=2e-4)
        loaded, original = _reference_model(str(base), out, runtime.manifest, adapters)
        report = verify_bundle(out, loaded, adapters, original=original)
        assert report.passed, [check for check in report.checks if not check.passed]
        for name, module in packed.items():  # the control: they are rounded, too
            module.weight.data = own[name]
        assert np.abs(got - torch_logits(model, arguments)).max() > 0.1

    def test_int8_as_it_is_deployed(self, int8, tiny_base, adapter_a):
        model = load_model(str(tiny_base))
        load_graph_weights(int8 / "model.onnx", model)
        inputs = base_inputs(int8, read_manifest(int8))
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        _, adapted = torch_logits(model, arguments, adapter_a)
        got = Runtime(int8, threads=1).run(inputs, "a", ["logits"])["logits"]
        # Activations are rounded to 8 bits, too.
        assert relative(got, adapted) < 0.03

    def test_int8_weights_are_bytes_and_adapters_are_not(self, int8):
        operators = onnx.load(int8 / "model.onnx").graph.node
        bits = {
            attribute.i
            for node in operators
            if node.op_type == "MatMulNBits"
            for attribute in node.attribute
            if attribute.name == "bits"
        }
        assert bits == {8}
        manifest = read_manifest(int8)
        assert manifest.precision == "int8"
        assert {slot.dtype for slot in manifest.slots.slots} == {"FLOAT"}
        assert all(result.passed for result in replay_golden(int8))

    def test_a_trained_head_of_its_own_is_not_sent_to_an_export_that_is_refused(
        self, int8, bare_bundle
    ):
        """Only the graph of whole weights has a place for it."""
        remedies = {}
        for bundle in (int8, bare_bundle):
            manifest = read_manifest(bundle)
            saved = {
                f"{path}.weight": Replacement(torch.zeros(320, 32))
                for path in ("lm_head", "model.layers.0.self_attn.q_proj", "model.norm")
            }
            with pytest.raises(LoraportError) as refused:
                pack(
                    Adapter({}, replacements=saved),
                    manifest.slots,
                    manifest.unslotted,
                    BaseParameters(bundle, manifest),
                )
            lines = str(refused.value).split("\n  - ")[1:]
            remedies[bundle] = [line.partition("trained bias); ")[2] for line in lines]
        merge = "merge the adapter and export that"
        rounded = (
            f"the graph holds its weight rounded, for which nothing whole can stand; {merge}, or "
            "export again in a precision that does not round, with --replace "
        )
        plain = [
            f"export again with --replace {path}, or {merge}"
            for path in ("lm_head", "model.layers.0.self_attn.q_proj", "model.norm")
        ]
        assert remedies[int8] == [
            f"{rounded}lm_head",
            f"{rounded}model.layers.0.self_attn.q_proj",
            plain[2],
        ]
        assert remedies[bare_bundle] == plain

    def test_bf16_is_built_for_cuda_and_right_when_widened(self, tiny_base, adapter_a, tmp_path):
        """No CPU kernel computes in bfloat16: the same graph is run in float32 here."""
        out = tmp_path / "bundle"
        export_base(str(tiny_base), out, ExportOptions(precision="bf16", provider="cuda"))
        assert "no bfloat16" in golden_reason(out)
        add_adapters(out, {"a": read_adapter(adapter_a)})
        manifest = read_manifest(out)
        assert {slot.dtype for slot in manifest.slots.slots} == {"BFLOAT16"}
        model = load_model(str(tiny_base))
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.data = module.weight.data.bfloat16().float()
        ids = np.array([[5, 9, 40, 7]])
        arguments = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        base, adapted = torch_logits(model, arguments, adapter_a)
        graph = widened(out / "model.onnx")
        cache = {
            value.name: np.zeros([1, 2, 0, 16], np.float32)
            for value in graph.graph.input
            if value.name.startswith("past")
        }
        tensors = read_packed(out / manifest.adapters["a"].tensors, manifest.slots)
        assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
        slots = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        opened = session(graph)
        got = opened.run(["logits"], arguments | cache)[0]
        moved = opened.run(["logits"], arguments | cache | slots)[0]
        # Rotary tables and norms are rounded to bfloat16 in the graph, too.
        assert relative(got, base) < 0.02
        # The adapter is rounded once, to 8 bits of mantissa.
        assert relative(moved - got, adapted - base) < 0.03
        assert np.abs(adapted - base).max() > 0.5

    def test_bf16_for_the_cpu_is_refused(self, tiny_base, tmp_path):
        code, said = command("export", tiny_base, "-o", tmp_path / "out", "--precision", "bf16")
        assert code == 2
        assert "expected fp32 or int8 or int4" in said
        assert "no bfloat16" in said
        assert not (tmp_path / "out").exists()


def widened(file):
    """The same graph with float32 in the place of bfloat16."""
    model = ir.load(file)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.BFLOAT16:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32))
            value.dtype = ir.DataType.FLOAT
    for node in model.graph.all_nodes():
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
        to = node.attributes.get("to")
        if to is not None and to.value == int(ir.DataType.BFLOAT16):
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.BFLOAT16:
            value.dtype = ir.DataType.FLOAT
    return ir.to_proto(model)


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    model = bert().eval()
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def encoder_adapter(encoder_base, tmp_path_factory):
    options = {"target_modules": ["query", "value", "dense"], "r": 4, "lora_alpha": 6}
    out = tmp_path_factory.mktemp("bert") / "a"
    return make_case(Case(bert, options), out, base=load_model(str(encoder_base))).path


# Weights rounded to 8 or 4 bits are the reference's, too; what is left is the activations'
# rounding to 8 bits (int4: none, when the kernel is asked for float32) or to float16.
BOUNDS = {"int8": 0.05, "int4": 1e-4, "fp16": 1e-2}


class TestEncoder:
    @pytest.mark.parametrize("precision", BOUNDS)
    def test_it_computes_with_the_graphs_own_weights(
        self, encoder_base, encoder_adapter, precision, tmp_path
    ):
        base, adapter = encoder_base, encoder_adapter
        out = tmp_path / "bundle"
        export_base(str(base), out, ExportOptions(precision=precision))
        add_adapters(out, {"a": read_adapter(adapter)})
        manifest = read_manifest(out)
        assert manifest.precision == precision
        kinds = {slot.dtype for slot in manifest.slots.slots}
        assert kinds == {"FLOAT16" if precision == "fp16" else "FLOAT"}
        model = load_model(str(base))
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert set(manifest.slots.modules()) == linear
        load_graph_weights(out / "model.onnx", model)
        inputs = base_inputs(out, manifest)
        wanted, adapted = torch_logits(model, inputs, adapter)
        runtime = Runtime(out, threads=1, float32_activations=True)
        got = runtime.run(inputs)["logits"]
        moved = runtime.run(inputs, "a")["logits"]
        bound = BOUNDS[precision]
        assert relative(got, wanted) < bound
        assert relative(moved, adapted) < bound
        assert relative(adapted, wanted) > 0.1
        assert all(result.passed for result in replay_golden(out))
        original = load_model(str(base))
        changed = relative(wanted, torch_logits(original, inputs))
        assert changed > (1e-5 if precision == "fp16" else 1e-3)

    def test_rows_in_int8_have_adapters_of_their_own(self, encoder_base, encoder_adapter, tmp_path):
        """The quantizer forgets the shapes, by which rows are told apart."""
        out, options = tmp_path / "bundle", SlotOptions(per_row=True)
        export_base(str(encoder_base), out, ExportOptions(precision="int8", slots=options))
        add_adapters(out, {"a": read_adapter(encoder_adapter)})
        assert read_manifest(out).unslotted == {}
        model = load_model(str(encoder_base))
        load_graph_weights(out / "model.onnx", model)
        inputs = base_inputs(out, read_manifest(out))
        wanted, adapted = torch_logits(model, inputs, encoder_adapter)
        got = Runtime(out, threads=1).rows(["a"]).run(inputs, ["a", None])["logits"]
        assert relative(got, np.stack([adapted[0], wanted[1]])) < BOUNDS["int8"]
        assert relative(adapted, wanted) > 0.1

    def test_bf16_is_refused(self, encoder_base, tmp_path):
        with pytest.raises(LoraportError, match="no bfloat16"):
            export_base(str(encoder_base), tmp_path / "out", ExportOptions(precision="bf16"))


def test_verify_proves_an_int8_encoder(tmp_path):
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "bundle"
    bert().eval().save_pretrained(base)
    tokenizer().save_pretrained(base)
    model = bert().eval()
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(base)
    options = {"target_modules": ["query", "dense"], "r": 4, "lora_alpha": 6}
    made = make_case(Case(bert, options), tmp_path / "a", base=load_model(str(base)))
    given = ["--adapter", f"a={made.path}", "--precision", "int8"]
    assert command("export", base, "-o", out, *given)[0] == 0
    code, said = command("verify", out)
    assert code == 0, said
