"""Graphs in halves whose every rounding is magnified: PyTorch in halves is the measure."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import read_manifest, write_manifest
from loraport.parity import Sample, verify_bundle
from loraport.parity.changes import changes_of
from loraport.parity.metrics import compare
from loraport.parity.rounding import Rounding, allowed_beside
from loraport.parity.tolerances import tolerance_for

PARITY = "adapter a: onnxruntime = torch"


class Magnifying(nn.Module):
    """Outputs of some thousands, of which float16 holds every second number at best."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 24)
        nn.init.normal_(self.last.weight, std=500)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def model():
    return Magnifying().eval()


@pytest.fixture(scope="module")
def adapter():
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=random) * 0.3 for shape in ((4, 16), (32, 4)))
    return Adapter({"first": LoraModule(ModuleKind.LINEAR, a, b, alpha=4)})


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(2)
    drawn = [{"x": random.standard_normal((5, 16)).astype(np.float32)} for _ in range(6)]
    return [Sample(each, each) for each in drawn]


@pytest.fixture
def verified(model, adapter, samples, tmp_path):
    """Import in a precision, change the adapter's file, verify; the checks by name."""

    def checks(precision, factor=1.0):
        file, bundle = tmp_path / "m.onnx", tmp_path / f"{precision}-{factor}"
        x = torch.zeros(5, 16)
        torch.onnx.export(model, (x,), file, input_names=["x"], output_names=["y"], dynamo=False)
        import_model(file, bundle, ImportOptions(precision=precision))
        add_adapters(bundle, {"a": adapter})
        manifest = read_manifest(bundle)
        tensors = bundle / manifest.adapters["a"].tensors
        save_file({name: factor * t for name, t in load_file(tensors).items()}, tensors)
        write_manifest(manifest.with_files(bundle, list(manifest.files)), bundle)
        report = verify_bundle(bundle, model, {"a": adapter}, samples=samples)
        return report.tolerance, {check.name: check for check in report.checks}

    return checks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_itself_rounds_is_allowed_twice_in_halves(verified, model, adapter, samples):
    tolerance, checks = verified("fp16")
    found = checks[PARITY].comparison
    assert found.max_abs > tolerance.max_abs  # the table alone would refuse it
    assert all(check.passed for check in checks.values()), checks
    own = Rounding(model, "float16").measure(
        [sample.torch for sample in samples], changes_of([(adapter, 1.0)], model)
    )
    assert f"max abs {own.max_abs:.2e}" in checks[PARITY].detail
    assert found.within(allowed_beside(tolerance, own))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapter_that_is_not_the_one_fails_all_the_same(verified):
    _, checks = verified("fp16", factor=1.03)
    assert not checks[PARITY].passed
    assert "twice that is allowed" in checks[PARITY].detail
    assert not checks["adapter a: packed = source"].passed


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_in_float32_is_measured_by_the_table_alone(verified):
    tolerance, checks = verified(None, factor=1.001)
    assert tolerance.floats == "float32"
    assert not checks[PARITY].passed
    assert not checks[PARITY].detail


def test_the_distance_is_that_of_a_model_in_halves(model, adapter, samples):
    inputs = [sample.torch for sample in samples[:1]]
    x = torch.from_numpy(inputs[0]["x"])
    module = adapter.modules["first"]
    merged = Magnifying()
    with torch.no_grad():
        merged.first.weight += module.lora_B @ module.lora_A
        expected, base = merged(x), model(x)
    half = Magnifying().half()
    with torch.no_grad():
        h = half.first(x.half()) + x.half() @ module.lora_A.half().T @ module.lora_B.half().T
        got = half.last(torch.tanh(h)).float()
    own = Rounding(model, "float16").measure(inputs, changes_of([(adapter, 1.0)], model))
    mine = compare(expected.numpy(), got.numpy())
    assert own.max_abs == pytest.approx(mine.max_abs, rel=0.01)
    assert own.relative == pytest.approx(mine.relative, rel=0.01)
    assert compare(expected.numpy(), base.numpy()).max_abs > 20 * own.max_abs
    assert model.first.weight.dtype is torch.float32


def test_no_kernels_for_the_halves(adapter, samples):
    class Deaf(Magnifying):
        def forward(self, x):
            if x.dtype is torch.bfloat16:
                raise RuntimeError("not implemented for 'BFloat16'")
            return super().forward(x)

    deaf = Deaf().eval()
    changes = changes_of([(adapter, 1.0)], deaf)
    inputs = [sample.torch for sample in samples]
    assert Rounding(deaf, "bfloat16").measure(inputs, changes) is None
    assert Rounding(deaf, "float16").measure(inputs, changes) is not None


class Stepping(Magnifying):
    """A step within one rounding of 1: what an input of about 1 gives hangs on that rounding."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward(self, x):
        return super().forward(x) + 3000 * torch.sigmoid(((x[:, :1] - 1) - self.place) * 1e5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("place", "others", "passes"),
    [
        (1.5, 0.0, True),  # the step is within a rounding of where it should be
        (200.0, 0.0, True),  # further away, and no input tells
        (200.0, 0.1, False),  # another input does
    ],
)
def test_inputs_that_hang_on_one_rounding_are_measured_by_several_runs(
    place, others, passes, adapter, samples, tmp_path
):
    rounding = 2**-10
    model, exported = (Stepping(each * rounding).eval() for each in (0.25, place))
    drawn = [sample.torch["x"].copy() for sample in samples]
    for x in drawn:
        x[:, 0] = -1
    drawn[2][3, 0] = 1 + 0.6 * rounding  # in float16 it is beyond the step, moved a little before
    drawn[4][1, 0] = 1 + others
    inputs = [Sample({"x": x}, {"x": x}) for x in drawn]
    file, bundle = tmp_path / "m.onnx", tmp_path / "bundle"
    x = torch.zeros(5, 16)
    torch.onnx.export(exported, (x,), file, input_names=["x"], output_names=["y"], dynamo=False)
    import_model(file, bundle, ImportOptions(precision="fp16"))
    add_adapters(bundle, {"a": adapter})
    report = verify_bundle(bundle, model, {"a": adapter}, samples=inputs)
    checks = {check.name: check for check in report.checks}
    changes = changes_of([(adapter, 1.0)], model)
    own = Rounding(model, "float16").measure([each.torch for each in inputs], changes)
    assert checks[PARITY].comparison.max_abs > 1000 > 2 * own.max_abs  # one run would refuse it
    assert checks[PARITY].passed is passes
    assert f"in {1 if passes else 2} of 6 inputs it is further off" in checks[PARITY].detail
    assert checks["adapter a: differs from base"].passed


def test_embeddings_are_moved_where_a_model_takes_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embeddings = nn.Embedding(32, 16)

        def get_input_embeddings(self):
            return self.embeddings

        def forward(self, input_ids):
            return 100 * self.embeddings(input_ids)

    model = Tokens().eval()
    rounding = Rounding(model, "float16")
    ids = {"input_ids": np.arange(12).reshape(2, 6)}
    once = rounding.measure([ids], changes_of([], model))
    (several,) = rounding.moved([ids], changes_of([], model))
    size = 100 * float(model.embeddings.weight[:12].detach().abs().max())
    assert once.max_abs < several.max_abs < 3 * 2**-11 * size
    assert rounding.measure([ids], changes_of([], model)) == once  # nothing stays moved


def test_halves_that_overflow_are_no_measure():
    table = tolerance_for("fp16", "cpu")
    overflown = compare(np.eye(4), np.full((4, 4), np.inf))
    assert allowed_beside(table, overflown) == table
    assert not overflown.within(allowed_beside(table, overflown))


def test_bounds_are_never_narrower_than_the_table():
    table = tolerance_for("bf16", "cuda")
    small = compare(np.eye(4), np.eye(4) + 1e-6)
    assert allowed_beside(table, small) == table
    large = replace(small, max_abs=4.0, relative=0.05, top1=0.9)
    wide = allowed_beside(table, large)
    assert (wide.max_abs, wide.relative) == (8.0, 0.1)
    assert wide.top1 == pytest.approx(0.8)
