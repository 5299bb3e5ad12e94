"""MLX adapters: mlx-lm's documented layout, and mlx-lm itself where it is installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_cases import inputs, load_with_peft, logits
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter, write_adapter
from loraport.errors import LoraportError


def _written(case, tmp_path):
    adapter = read_adapter(case.made.path)
    write_adapter(adapter, tmp_path / "mlx", "mlx", base=case.base)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    return adapter, config, load_file(tmp_path / "mlx" / "adapters.safetensors")


@pytest.mark.parametrize("name", ["plain", "rslora_patterns", "dora", "embedding"])
def test_layout(name, case_of, tmp_path) -> None:
    """lora_a [in, rank], lora_b [rank, out], one rank and one scale, update scale * B'A'."""
    adapter, config, tensors = _written(case_of(name), tmp_path)
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == ("dora" if name == "dora" else "lora")
    for path, module in adapter.modules.items():
        a, b = tensors[f"{path}.lora_a"].double(), tensors[f"{path}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == parameters["rank"]
        expected = (module.lora_B.double() @ module.lora_A.double()) * module.scaling
        # B was rounded to float32 once more where the scale was folded in.
        torch.testing.assert_close((a @ b * parameters["scale"]).T, expected, rtol=1e-5, atol=1e-6)
    names = {name.rpartition(".")[2] for name in tensors}
    assert names == ({"lora_a", "lora_b", "m"} if name == "dora" else {"lora_a", "lora_b"})


@pytest.mark.parametrize(
    "name", ["plain", "rslora_patterns", "dora", "embedding_and_head", "conv1d_storage"]
)
def test_mlx_lm_computes_what_peft_computes(name, case_of, tmp_path) -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm (pip install 'mlx[cpu]' mlx-lm) is not installed")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    case = case_of(name)
    _written(case, tmp_path)
    model, _ = load_model(_as_on_the_hub(Path(case.base), tmp_path))
    ids = mx.array(inputs().numpy())
    bare = np.array(model(ids))
    model = load_adapters(model, str(tmp_path / "mlx"))
    model.eval()
    expected = logits(load_with_peft(case.made.fresh_base(), case.made.path)).numpy()
    np.testing.assert_allclose(np.array(model(ids)), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(bare - expected).max() > 0.1


def _as_on_the_hub(base: Path, tmp_path: Path) -> Path:
    """GPT-2's checkpoint as mlx-lm expects it: with n_ctx, and names without "transformer."."""
    config = json.loads((base / "config.json").read_text())
    if config["model_type"] != "gpt2":
        return base
    published = tmp_path / "published"
    published.mkdir()
    config["n_ctx"] = config["n_positions"]
    (published / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(renamed, published / "model.safetensors", {"format": "pt"})
    return published


def test_foreign_directories_are_read(case_of, tmp_path) -> None:
    """As mlx-lm trains them: without what loraport adds."""
    adapter, config, _ = _written(case_of("plain"), tmp_path)
    del config["loraport"]
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    back = read_adapter(tmp_path / "mlx")
    assert {path: module.scaling for path, module in back.modules.items()} == pytest.approx(
        {path: module.scaling for path, module in adapter.modules.items()}
    )
    assert all(
        torch.equal(back.modules[path].lora_B, module.lora_B)
        for path, module in adapter.modules.items()
    )


@pytest.mark.parametrize("dora", [False, True])
def test_what_mlx_lm_trained_is_what_it_computes(dora, case_of, tmp_path) -> None:
    """Its own layers, saved by MLX itself as mlx-lm's trainer does."""
    pytest.importorskip("mlx_lm", reason="mlx-lm (pip install 'mlx[cpu]' mlx-lm) is not installed")
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    case = case_of("plain")
    model, _ = load_model(Path(case.base))
    ids = mx.array(inputs().numpy())
    bare = np.array(model(ids))
    model.freeze()
    parameters = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    linear_to_lora_layers(model, 1, parameters, use_dora=dora)
    trained = {
        name: value + 0.1 * mx.random.normal(value.shape, key=mx.random.key(number))
        for number, (name, value) in enumerate(tree_flatten(model.trainable_parameters()))
    }
    model.update(tree_unflatten(list(trained.items())))
    model.eval()
    (tmp_path / "mlx").mkdir()
    mx.save_safetensors(str(tmp_path / "mlx" / "adapters.safetensors"), trained)
    kind = "dora" if dora else "lora"
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(read_adapter(tmp_path / "mlx", base=case.base), tmp_path / "peft", "peft")
    got = logits(load_with_peft(case.made.fresh_base(), tmp_path / "peft")).numpy()
    expected = np.array(model(ids))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(bare - expected).max() > 0.1


def test_tied_and_normalised_embeddings_are_refused(case_of, tmp_path) -> None:
    tied = case_of("tied_embedding")
    with pytest.raises(LoraportError, match="MLX would adapt the head too"):
        write_adapter(read_adapter(tied.made.path), tmp_path / "x", "mlx", base=tied.base)
    case = case_of("embedding_dora")
    with pytest.raises(LoraportError, match="DoRA, which MLX normalises per token"):
        write_adapter(read_adapter(case.made.path), tmp_path / "x", "mlx", base=case.base)


def test_a_config_without_a_scale_is_refused(case_of, tmp_path) -> None:
    _, config, _ = _written(case_of("plain"), tmp_path)
    config["lora_parameters"] = {"alpha": 16}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraportError, match=r"lora_parameters.scale: expected a number, got null"):
        read_adapter(tmp_path / "mlx")


def test_a_full_fine_tune_is_told_as_that(tmp_path) -> None:
    config = {"fine_tune_type": "full", "num_layers": 2, "lora_parameters": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 3) for layer in (0, 1)}
    save_file(weights, tmp_path / "adapters.safetensors")
    with pytest.raises(LoraportError, match=r"got full, whole weights; fuse .* extract") as refused:
        read_adapter(tmp_path)
    assert len(str(refused.value).splitlines()) == 1
