"""Any nn.Module, exported with slots, computes with an adapter what PEFT computes."""

import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from peft_cases import Case, load_with_peft, make_case
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import verify_bundle
from loraport.runtime import Runtime


class Net(nn.Module):
    """A convolution, non-square layers, one of them called twice, one last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 6, 3, padding=1)
        self.mix = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4, bias=False)

    def forward(self, signal, scale):
        hidden = torch.relu(self.conv(signal)).transpose(1, 2)
        hidden = self.mix(torch.tanh(self.mix(hidden))) * scale
        return self.head(torch.tanh(self.wide(hidden)))


def signals(rows, seed=0):
    random = np.random.default_rng(seed)
    return {
        "signal": random.standard_normal((rows, 3, 8)).astype(np.float32),
        "scale": random.standard_normal((rows, 1, 1)).astype(np.float32),
    }


def as_torch(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def net_adapter(net, tmp_path_factory):
    options = {
        "target_modules": ["mix", "wide", "head"],
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": {"head": 2},
    }
    return make_case(Case(lambda: net, options), tmp_path_factory.mktemp("net") / "a", base=net)


@pytest.fixture(scope="module")
def net_bundle(net, net_adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("net") / "bundle"
    export_torch_module(net, as_torch(signals(2)), str(out))  # a string, as in the README
    add_adapters(out, {"a": read_adapter(net_adapter.path)})
    return out


def test_every_linear_layer_has_a_slot_and_the_convolution_none(net_bundle):
    manifest = read_manifest(net_bundle)
    assert [slot.name for slot in manifest.slots.slots] == ["mix", "wide", "head"]
    assert manifest.unslotted == {}
    onnx.checker.check_model(str(net_bundle / "model.onnx"), full_check=True)
    onnx.checker.check_model(str(net_bundle / "model.required.onnx"), full_check=True)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_base_and_adapter_equal_peft(net, net_adapter, net_bundle, rows):
    runtime = Runtime(net_bundle)
    arrays = signals(rows, seed=1)
    peft_model = load_with_peft(net_adapter.fresh_base(), net_adapter.path)
    (output,) = (entry.name for entry in runtime.session.get_outputs())
    with torch.no_grad():
        base, adapted = net(**as_torch(arrays)), peft_model(**as_torch(arrays))
    # float32 sums in another order.
    np.testing.assert_allclose(runtime.run(arrays)[output], base, atol=1e-5)
    np.testing.assert_allclose(runtime.run(arrays, "a")[output], adapted, atol=1e-4)
    assert (adapted - base).abs().max() > 0.1


def test_the_protocol_holds(net, net_adapter, net_bundle):
    report = verify_bundle(net_bundle, net, {"a": read_adapter(net_adapter.path)})
    assert report.passed, [check for check in report.checks if not check.passed]


def test_a_module_without_linear_layers_is_refused(tmp_path):
    conv = nn.Sequential(nn.Conv1d(3, 4, 3))
    with pytest.raises(LoraportError, match="expected operators that can have one"):
        export_torch_module(conv, {"input": torch.ones(2, 3, 8)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_module_torch_cannot_export_is_refused(tmp_path):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    expected = r"torch\.onnx\.export of Branching failed: Could not guard"
    with pytest.raises(LoraportError, match=expected):
        export_torch_module(Branching(), {"x": torch.ones(2, 3)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_tensor_is_named(tmp_path):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(6, 4)

        def forward(self, x):
            return {"y": self.mix(x), "auxiliary": None, "count": 3}

    expected = r"Counting failed: output 2: expected a tensor, got 3, of type int; wrap"
    with pytest.raises(LoraportError, match=expected):
        export_torch_module(Counting(), {"x": torch.randn(2, 6)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_kept(net, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(LoraportError, match="already exists"):
        export_torch_module(net, as_torch(signals(2)), tmp_path / "out")


class Nested(Net):
    """What it returns is nested, as CLIP's result and hidden states are."""

    def forward(self, signal, scale):
        hidden = torch.tanh(self.conv(signal)).transpose(1, 2)
        wide = self.wide(self.mix(hidden)) * scale
        states = (hidden, wide)
        return {"head": self.head(wide), "none": None, "inner": {"mean": wide.mean(1), "s": states}}


def test_nested_outputs_have_names_and_verify(tmp_path):
    torch.manual_seed(0)
    net, out = Nested().eval(), tmp_path / "bundle"
    options = {"target_modules": ["mix", "wide"], "r": 3}
    case = make_case(Case(Nested, options), tmp_path / "a", base=net)
    export_torch_module(net, as_torch(signals(2)), out)
    adapter = read_adapter(case.path)
    add_adapters(out, {"a": adapter})
    got = Runtime(out).run(signals(3), "a")
    with torch.no_grad():
        base = net(**as_torch(signals(3)))
        expected = load_with_peft(case.fresh_base(), case.path)(**as_torch(signals(3)))
    inner = expected["inner"]
    wanted = {
        "head": expected["head"],
        "inner.mean": inner["mean"],
        "inner.s.0": inner["s"][0],
        "inner.s.1": inner["s"][1],
    }
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-5)
    assert (wanted["head"] - base["head"]).abs().max() > 0.05
    report = verify_bundle(out, net, {"a": adapter})
    assert report.passed, [check for check in report.checks if not check.passed]


class Masked(nn.Module):
    """Returns an input as it is, a result called like an input, and one result twice."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, hidden, mask):
        mixed = self.mix(hidden) * mask
        return {"hidden": mixed, "mask": mask, "mix.weight": mixed + 1, "last": mixed}


def test_outputs_that_are_called_like_inputs(tmp_path):
    torch.manual_seed(0)
    net, out = Masked().eval(), tmp_path / "bundle"
    case = make_case(Case(Masked, {"target_modules": ["mix"], "r": 3}), tmp_path / "a", base=net)
    inputs = {"hidden": torch.randn(2, 6), "mask": torch.rand(2, 6)}
    export_torch_module(net, inputs, out)
    add_adapters(out, {"a": read_adapter(case.path)})
    got = Runtime(out).run({name: tensor.numpy() for name, tensor in inputs.items()}, "a")
    with torch.no_grad():
        base, expected = net(**inputs), case.peft_model(**inputs)
    assert list(got) == ["hidden_out", "mask_out", "mix.weight_out", "last"]
    for output, name in zip(got.values(), expected, strict=True):
        np.testing.assert_allclose(output, expected[name], rtol=1e-5, atol=1e-5)
    assert (expected["last"] - base["last"]).abs().max() > 0.1
    report = verify_bundle(out, net, {"a": read_adapter(case.path)})
    assert report.passed, [check for check in report.checks if not check.passed]


class Wrapped(nn.Module):
    """Passes on whatever it is given by name, as wrappers around a model do."""

    def __init__(self):
        super().__init__()
        self.inner = Masked()

    def forward(self, **inputs):
        return self.inner(**inputs)["last"]


def test_inputs_that_a_module_takes_as_further_keywords(tmp_path):
    torch.manual_seed(0)
    net = Wrapped().eval()
    case = make_case(Case(Wrapped, {"target_modules": ["mix"], "r": 3}), tmp_path / "a", base=net)
    inputs = {"mask": torch.rand(2, 6), "hidden": torch.randn(2, 6)}
    export_torch_module(net, inputs, tmp_path / "out")
    assert "forward" not in vars(net)
    add_adapters(tmp_path / "out", {"a": read_adapter(case.path)})
    more = {name: torch.cat([tensor, tensor + 1]) for name, tensor in inputs.items()}
    arrays = {name: tensor.numpy() for name, tensor in more.items()}
    (got,) = Runtime(tmp_path / "out").run(arrays, "a").values()
    with torch.no_grad():
        base, expected = net(**more), case.peft_model(**more)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.1


class Split(nn.Module):
    """Takes a parameter apart, of which the exporter's optimizer says that it is not folded."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.parts = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        one, other = self.parts.split(3)
        return self.mix(x) * one.sum(0) + other.sum(0)


def test_nothing_is_told_of_the_exporters_own_work(tmp_path, caplog, capsys):
    export_torch_module(Split(), {"x": torch.randn(2, 6)}, tmp_path / "out")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
    assert capsys.readouterr() == ("", "")


class Deciding(nn.Module):
    """Looks at a number that it keeps in a tensor, as EnCodec's convolutions do."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.register_buffer("size", torch.tensor(5))

    def forward(self, x):
        return self.mix(x) if self.size + 1 > x.shape[-1] - 1 else x


def test_code_that_decides_by_a_tensor_is_told_with_its_place(tmp_path, caplog, capfd):
    message = (
        r"^torch\.onnx\.export of Deciding failed: Could .* its code decides by the value of a "
        r"tensor, at \S*test_torch_modules\.py:\d+ in forward, which no graph can follow; let .*$"
    )
    with pytest.raises(LoraportError, match=message):
        export_torch_module(Deciding(), {"x": torch.randn(2, 6)}, tmp_path / "out")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []
    assert capfd.readouterr() == ("", "")


def test_inputs_that_a_module_does_not_take_are_refused(net, tmp_path):
    for wrong, reason in (
        ({"signal": torch.ones(2, 3, 8)}, r"takes, got signal, with which it fails: .*'scale'"),
        (
            {**as_torch(signals(2)), "signal": torch.ones(2, 4, 8)},
            r"takes, got signal, scale, with",
        ),
    ):
        with pytest.raises(LoraportError, match=f"inputs: expected what Net {reason}"):
            export_torch_module(net, wrong, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        ((torch.ones(2, 3, 8),), r'such as {"x": x}, got tuple$'),
        (torch.ones(2, 3, 8), "got Tensor$"),
        ({"signal": torch.ones(2, 3, 8), "scale": 2.0}, "to tensors, got scale as float$"),
    ],
)
def test_inputs_without_names_or_that_are_no_tensors_are_refused(net, inputs, got, tmp_path):
    with pytest.raises(LoraportError, match=f"inputs: expected a mapping from the names .*{got}"):
        export_torch_module(net, inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def t5():
    from transformers import T5Config, T5Model

    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1}
    more = {"num_heads": 4, "decoder_start_token_id": 0, "use_cache": False}
    return T5Model(T5Config(**sizes, **more, initializer_factor=2.0)).eval()


def test_a_dimension_that_was_named_and_cannot_vary_is_told(tmp_path):
    """torch exports its one size; who named it would find out where the model runs."""
    module, inputs = nn.Linear(3, 4), {"input": torch.zeros(2, 3)}
    dynamic = {"input": {0: "n", -1: "m"}}
    told = "input: expected a dimension that may vary as 'm', got dimension -1 always 3"
    with pytest.raises(LoraportError, match=told):
        export_torch_module(module, inputs, tmp_path / "out", dynamic=dynamic)
    assert not (tmp_path / "out").exists()
    export_torch_module(module, inputs, tmp_path / "out", dynamic={"input": {-2: "n"}})
    x = torch.randn(5, 3)
    (got,) = Runtime(tmp_path / "out").run({"input": x.numpy()}).values()
    np.testing.assert_allclose(got, module(x).detach().numpy(), atol=1e-6)


def test_attention_that_torch_does_not_export_is_written_plainly(tmp_path):
    """T5 whole; the module itself goes on with the attention it had."""
    torch.manual_seed(0)
    options = {"target_modules": ["q", "v", "wi"], "r": 3, "lora_alpha": 6}
    case = make_case(Case(t5, options), tmp_path / "a")
    module = case.fresh_base().eval()
    own = module.config._attn_implementation
    ids = {"input_ids": torch.tensor([[1, 7, 3, 9], [4, 8, 2, 1]])}
    inputs = ids | {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 9, 11]])}
    export_torch_module(module, inputs, tmp_path / "out")
    assert own != "eager"
    assert module.config._attn_implementation == own
    add_adapters(tmp_path / "out", {"a": read_adapter(case.path)})
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    got = Runtime(tmp_path / "out").run(arrays, "a")["last_hidden_state"]
    with torch.no_grad():
        expected = case.peft_model(**inputs).last_hidden_state
        base = case.base(**inputs).last_hidden_state
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - base).abs().max() > 0.05


class Twins(nn.Module):
    """Layers of equal weights on one input, whose weights the exporter transposes, and not."""

    def __init__(self):
        super().__init__()
        self.one, self.same = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.conv, self.copy = nn.Conv1d(3, 6, 1), nn.Conv1d(3, 6, 1)
        self.head = nn.Linear(10, 4)
        self.same.load_state_dict(self.one.state_dict())
        self.copy.load_state_dict(self.conv.state_dict())

    def forward(self, signal):
        hidden = (torch.tanh(self.conv(signal)) + self.copy(signal)).transpose(1, 2)
        return self.head(torch.tanh(self.one(hidden)) + torch.relu(self.same(hidden)))


def test_equal_layers_of_one_input_take_adapters_of_their_own(tmp_path):
    torch.manual_seed(0)
    twins = Twins()
    signal = {"signal": signals(2)["signal"]}
    options = SlotOptions(variants=("lora", "conv"))
    export_torch_module(twins, as_torch(signal), tmp_path / "bundle", slots=options)
    places = ["conv", "copy", "head", "one", "same"]
    assert sorted(read_manifest(tmp_path / "bundle").slots.modules()) == places
    random = torch.Generator().manual_seed(0)
    answers = [twins(**as_torch(signal)).detach().numpy()]
    for path, kind in (
        ("one", ModuleKind.LINEAR),
        ("same", ModuleKind.LINEAR),
        ("copy", ModuleKind.CONV),
    ):
        module = twins.get_submodule(path)
        out_features, *inside = module.weight.shape
        a = torch.randn((2, *inside), generator=random)
        b = torch.randn((out_features, 2), generator=random)
        adapter = Adapter({path: LoraModule(kind, a, b, alpha=2)})
        add_adapters(tmp_path / "bundle", {path: adapter})
        merged = copy.deepcopy(twins)
        with torch.no_grad():
            merged.get_submodule(path).weight += (b @ a.flatten(1)).reshape(module.weight.shape)
            answers.append(merged(**as_torch(signal)).numpy())
    runtime = Runtime(tmp_path / "bundle")
    for adapter, expected in zip((None, "one", "same", "copy"), answers, strict=True):
        (got,) = runtime.run(signal, adapter).values()
        np.testing.assert_allclose(got, expected, atol=1e-5)
    for one, other in itertools.combinations(answers, 2):
        assert np.abs(one - other).max() > 0.1
