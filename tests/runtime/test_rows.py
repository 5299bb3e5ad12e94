"""Adapters per row and strengths, against PyTorch run one row at a time."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from converters.onnx.exporting import export_torch_module
from converters.onnx.packing.adding import add_adapters
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError
from loraport.parity import verify_bundle
from loraport.runtime import Runtime

VOCAB, DIM, WIDE, CHANNELS, OUT = 23, 8, 14, 6, 5


class Net(nn.Module):
    """Rows as [b, s, d], as [b * s, d], as [b, c, h, w] and as [b, d]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.wide = nn.Linear(DIM, WIDE)
        self.flat = nn.Linear(WIDE, DIM)
        self.conv = nn.Conv2d(1, CHANNELS, (3, DIM), padding=(1, 0))
        self.head = nn.Linear(CHANNELS, OUT)

    def forward(self, ids):
        x = self.embed(ids)  # [b, s, d]
        x = torch.relu(self.wide(x))
        x = self.flat(x.reshape(-1, WIDE)).reshape(ids.shape[0], -1, DIM)
        x = self.conv(x.unsqueeze(1)).squeeze(3)  # [b, c, s]
        return self.head(torch.relu(x).mean(2))  # [b, out]


KINDS = {"embed": ModuleKind.EMBEDDING, "conv": ModuleKind.CONV}


def adapter(net, seed, rank, paths):
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path in paths:
        kind = KINDS.get(path, ModuleKind.LINEAR)
        weight = net.get_submodule(path).weight
        if kind is ModuleKind.EMBEDDING:
            shape_a, shape_b = (rank, weight.shape[0]), (weight.shape[1], rank)
        elif kind is ModuleKind.CONV:
            shape_a, shape_b = (rank, *weight.shape[1:]), (weight.shape[0], rank, 1, 1)
        else:
            shape_a, shape_b = (rank, weight.shape[1]), (weight.shape[0], rank)
        a = torch.randn(shape_a, generator=generator)
        b = torch.randn(shape_b, generator=generator) * 0.3
        modules[path] = LoraModule(kind, a, b, alpha=2.0 * rank)
    return Adapter(modules)


def merged(net, parts):
    """The net with ``strength * scaling * B A`` added to its weights in float64."""
    net = copy.deepcopy(net).double()
    for each, strength in parts:
        for path, module in each.modules.items():
            delta = module.lora_B.double().flatten(1) @ module.lora_A.double().flatten(1)
            weight = net.get_submodule(path).weight.data
            delta = delta.T if module.kind is ModuleKind.EMBEDDING else delta.reshape(weight.shape)
            weight += strength * (module.alpha / module.lora_A.shape[0]) * delta
    return net


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def adapters(net):
    # Other ranks, and modules that only some of them have.
    return {
        "a": adapter(net, 1, 4, ["embed", "wide", "flat", "conv", "head"]),
        "b": adapter(net, 2, 2, ["wide", "conv", "head"]),
        "c": adapter(net, 3, 7, ["embed", "flat"]),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "strength"])
def runtime(net, adapters, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("rows") / "bundle"
    slots = SlotOptions(("lora", "embedding", "conv"), strength=request.param, per_row=True)
    dynamic = {"ids": {0: "batch", 1: "sequence"}}
    export_torch_module(net, {"ids": tokens(2)}, out, dynamic=dynamic, slots=slots)
    add_adapters(out, adapters)
    return Runtime(out)


def tokens(rows, seed=0):
    return torch.randint(0, VOCAB, (rows, 7), generator=torch.Generator().manual_seed(seed))


def output(result):
    (value,) = result.values()
    return value


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_every_module_has_its_slot(runtime):
    assert runtime.manifest.unslotted == {}
    assert runtime.manifest.slots.modules().keys() == {"embed", "wide", "flat", "conv", "head"}


def test_the_protocol_holds(runtime, net, adapters):
    """``model.required.onnx`` asks for the strength and the rows' adapters, too."""
    report = verify_bundle(runtime.directory, net, adapters)
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.parametrize(
    "picked",
    [
        ["b", None, "a", "c", "a", None],
        ["b", None, "b"],  # nobody fills the embedding's slot, which shares its count
        ["c", "c", None],  # nor the convolution's
    ],
)
def test_every_row_is_its_own_adapters(runtime, net, adapters, picked):
    rows = runtime.rows(sorted(filter(None, set(picked))))
    ids = tokens(len(picked))
    got = output(rows.run({"ids": ids.numpy()}, picked))
    base = output(runtime.run({"ids": ids.numpy()}))
    for row, name in enumerate(picked):
        parts = [] if name is None else [(adapters[name], 1.0)]
        expected = merged(net, parts)(ids[row : row + 1]).detach().numpy()
        close(got[row : row + 1], expected)
        alone = output(runtime.run({"ids": ids[row : row + 1].numpy()}, name))
        close(got[row : row + 1], alone)
        changed = np.abs(got[row] - base[row]).max()
        assert changed == 0 if name is None else changed > 0.1


def test_rows_without_adapter_are_the_base_bit_for_bit(runtime):
    ids = tokens(3).numpy()
    got = output(runtime.rows(["a", "c"]).run({"ids": ids}, [None, None, None]))
    assert np.array_equal(got, output(runtime.run({"ids": ids})))


def test_a_lane_may_be_a_blend(runtime, net, adapters):
    rows = runtime.rows({"mix": {"a": 0.5, "b": -2.0}, "c": "c"})
    ids = tokens(2)
    got = output(rows.run({"ids": ids.numpy()}, ["mix", "c"]))
    mixed = merged(net, [(adapters["a"], 0.5), (adapters["b"], -2.0)])(ids[:1])
    close(got[:1], mixed.detach().numpy())
    close(got[1:], merged(net, [(adapters["c"], 1.0)])(ids[1:]).detach().numpy())


def test_one_adapter_in_all_rows_needs_no_ids(runtime, net, adapters):
    ids = tokens(4)
    expected = merged(net, [(adapters["b"], 1.0)])(ids).detach().numpy()
    close(output(runtime.run({"ids": ids.numpy()}, "b")), expected)


def test_ids_of_one_run_do_not_act_in_the_next(runtime):
    rows, ids = runtime.rows(["a", "b"]), tokens(2).numpy()
    first = output(rows.run({"ids": ids}, ["a", "b"]))
    other = output(rows.run({"ids": ids}, ["b", "a"]))
    assert np.abs(first - other).max() > 0.1
    assert np.array_equal(output(rows.run({"ids": ids}, ["a", "b"])), first)
    lane = runtime.lane("a")
    plain = output(lane.run({"ids": ids}))
    assert np.array_equal(
        output(lane.run({"ids": ids, "adapter_ids": np.array([-1, -1])})),
        output(runtime.run({"ids": ids})),
    )
    assert np.array_equal(output(lane.run({"ids": ids})), plain)


def test_strengths(runtime, net, adapters):
    if not runtime.manifest.slots.strength:
        pytest.skip("a bundle without strength")
    ids = tokens(2)
    lane = runtime.lane("a")
    for strength in (0.0, 0.5, -1.5):
        factor = np.array([strength], np.float32)
        got = output(lane.run({"ids": ids.numpy(), "lora_strength": factor}))
        close(got, merged(net, [(adapters["a"], strength)])(ids).detach().numpy())
        if strength == 0:
            assert np.array_equal(got, output(runtime.run({"ids": ids.numpy()})))
    unfed = output(lane.run({"ids": ids.numpy()}))
    close(unfed, merged(net, [(adapters["a"], 1.0)])(ids).detach().numpy())
    halved = {"ids": ids.numpy(), "lora_strength": np.array([0.5], np.float32)}
    got = output(runtime.rows(["a", "b"]).run(halved, ["b", "a"]))
    close(got[1:], merged(net, [(adapters["a"], 0.5)])(ids[1:]).detach().numpy())
    per_lane = np.array([0.5, 3.0], np.float32)
    got = output(
        runtime.rows(["a", "b"]).run({"ids": ids.numpy(), "lora_strength": per_lane}, ["b", "a"])
    )
    close(got[:1], merged(net, [(adapters["b"], 3.0)])(ids[:1]).detach().numpy())
    close(got[1:], merged(net, [(adapters["a"], 0.5)])(ids[1:]).detach().numpy())


def test_errors(runtime, bare_bundle):
    rows = runtime.rows(["a"])
    with pytest.raises(LoraportError, match="expected of a, got b; name them"):
        rows.run({"ids": tokens(2).numpy()}, ["a", "b"])
    with pytest.raises(LoraportError, match="expected one for each of 2 rows, got 3"):
        rows.run({"ids": tokens(2).numpy()}, ["a", "a", None])
    with pytest.raises(LoraportError, match="adapter 'z': expected one of the bundle's"):
        runtime.rows(["z"])
    with pytest.raises(LoraportError, match="export it again with --per-row"):
        Runtime(bare_bundle).rows([])
    with pytest.raises(LoraportError, match="per-row: expected slots lora, embedding or conv"):
        SlotOptions(("lora", "gain"), per_row=True)


def test_no_adapter_is_resident_yet(runtime, net):
    ids = tokens(2)
    with torch.no_grad():
        close(output(runtime.rows([]).run({"ids": ids.numpy()}, [None, None])), net(ids).numpy())
    with pytest.raises(LoraportError, match="expected of none, got a; name them"):
        runtime.rows([]).run({"ids": ids.numpy()}, ["a", None])


def test_an_input_without_dimensions_has_no_rows(runtime):
    rows = runtime.rows([])
    inputs = {"ids": np.zeros((2, 3), np.int64), "scale": np.array(0.5, np.float32)}
    assert rows.with_ids(inputs, [None, None])["adapter_ids"].tolist() == [-1, -1]
    with pytest.raises(LoraportError, match="expected one for each of 2 rows, got 3"):
        rows.with_ids(inputs, [None] * 3)


def test_a_text_is_no_name_per_row(runtime):
    with pytest.raises(LoraportError, match="expected a name per row, got 'ab'"):
        runtime.rows(["a", "b"]).run({"ids": tokens(2).numpy()}, "ab")


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("adapter_ids", [0.5, 0]),
        ("adapter_ids", [0, -2]),
        ("adapter_ids", [[0], [0]]),
        ("adapter_ids", ["a", "b"]),
        ("lora_strength", [np.nan]),
        ("lora_strength", [1e39]),
        ("lora_strength", "half"),
    ],
)
def test_controls_that_say_nothing_are_refused(runtime, control, value):
    ids = tokens(2).numpy()
    if control not in {each.input for each in runtime.manifest.slots.controls}:
        pytest.skip("this bundle has no such input")
    with pytest.raises(LoraportError, match=rf"{control}: expected (whole|finite) numbers \[n\]"):
        runtime.run({"ids": ids, control: value}, "a")
    plain = output(runtime.run({"ids": ids}, "a"))
    neutral = np.zeros(2, np.int64) if control == "adapter_ids" else np.ones(1, np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy(neutral)
    for good in (neutral, neutral.tolist(), neutral.astype(np.float64), value):
        close(output(runtime.run({"ids": ids, control: good}, "a")), plain)
