"""Initialisations of PEFT: those that change the base need the initial adapter, others do not."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from merge_bases import save_base
from peft_cases import gpt2, inputs, llama, load_with_peft, logits

from loraport.cli import main
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft

_TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}


def _corda(model, config):
    from peft.tuners.lora.corda import preprocess_corda

    samples = torch.randint(0, 61, (4, 1, 40))
    preprocess_corda(model, config, run_model=lambda: [model(input_ids=ids) for ids in samples])


def _lora_ga(model, config):
    from peft.tuners.lora.loraga import preprocess_loraga

    model.requires_grad_(True)
    preprocess_loraga(model, config, lambda: model(input_ids=inputs()).logits.sum().backward())
    model.zero_grad()


def _corda_config():
    from peft.tuners.lora.config import CordaConfig

    return {"corda_config": CordaConfig(corda_method="kpm")}


def _lora_ga_config():
    from peft.tuners.lora.config import LoraGAConfig

    return {"lora_ga_config": LoraGAConfig()}


# Name → model, options, further options that need PEFT, what is to run beforehand.
_CHANGING = {
    "pissa": (llama, _TARGETS, dict, None),
    "pissa_niter_4": (llama, _TARGETS, dict, None),
    "olora": (llama, _TARGETS, dict, None),
    "corda": (llama, _TARGETS, _corda_config, _corda),
    "lora_ga": (llama, _TARGETS, _lora_ga_config, _lora_ga),
    "pissa, rsLoRA and patterns": (
        llama,
        {**_TARGETS, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
        dict,
        None,
    ),
    "pissa, DoRA": (llama, {**_TARGETS, "use_dora": True}, dict, None),
    "pissa, Conv1D": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True},
        dict,
        None,
    ),
}


def trained(model_of, options, path, before=None, seed=0, steps=0.1):
    """Save a base, an adapter as it begins and the same one later; returns the later outputs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = model_of().eval()
    save_base(base, path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**options)
        if before is not None:
            before(base, config)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(path / "initial")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * steps)
        model.save_pretrained(path / "trained")
    return logits(model)


def load(path):
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(path).eval()


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(each) for each in arguments])
    return stop.value.code


@pytest.mark.parametrize("name", sorted(_CHANGING))
def test_those_that_change_the_base(name, tmp_path, merge_into):
    model_of, options, more, before = _CHANGING[name]
    options = {**options, **more(), "init_lora_weights": name.partition(",")[0]}
    expected = trained(model_of, options, tmp_path, before)
    base, adapter, initial = (tmp_path / each for each in ("base", "trained", "initial"))
    out, peft = tmp_path / "merged", tmp_path / "converted"
    with pytest.raises(LoraportError, match=r"belongs to a changed base.*--initial-adapter"):
        merge_into(base, out, adapter)
    assert run("convert", adapter, "--to", "mlx", "-o", tmp_path / "x") == 2
    merge_into(base, out, adapter, initial_adapter=initial)
    assert run("convert", adapter, "--to", "peft", "-o", peft, "--initial-adapter", initial) == 0
    # PEFT took the initial update out of the base in float32: that rounding is in `expected`.
    bound = 3e-5 * expected.abs().max()
    assert torch.allclose(logits(load(out)), expected, rtol=0, atol=bound)
    unmerged = logits(load_with_peft(load(base), peft))
    assert torch.allclose(unmerged, expected, rtol=0, atol=bound)
    # The control: read as if the base were its own, it is another model.
    naive = copy.deepcopy(json.loads((adapter / "adapter_config.json").read_text()))
    naive["init_lora_weights"] = True
    (adapter / "adapter_config.json").write_text(json.dumps(naive))
    assert (logits(load_with_peft(load(base), adapter)) - expected).abs().max() > 100 * bound
    # PEFT's own recipe has the adapter say so; the user's word counts then.
    merge_into(base, tmp_path / "again", adapter, initial_adapter=initial)
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(out)))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", "eva", False])
def test_those_that_leave_the_base_alone(init, tmp_path, merge_into):
    options = {**_TARGETS, "init_lora_weights": init}
    if init == "eva":
        from peft.tuners.lora.config import EvaConfig

        options["eva_config"] = EvaConfig(rho=2.0, adjust_scaling_factors=True)
    expected = trained(llama, options, tmp_path)
    merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "trained")
    got = logits(load(tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (got - logits(load(tmp_path / "base"))).abs().max() > 0.1


def test_eva_with_ranks_of_its_own(tmp_path, merge_into):
    """EVA moves ranks between modules, and their alphas with them."""
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import EvaConfig

    torch.manual_seed(0)
    base = llama().eval()
    save_base(base, tmp_path / "base")
    config = LoraConfig(**_TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    batches = [{"input_ids": torch.randint(0, 61, (8, 12))} for _ in range(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).eval()
        initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert len({module.rank for module in read_peft(tmp_path / "adapter").modules.values()}) > 1
    merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    got = logits(load(tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_loftq_is_merged_into_its_own_base_only(tmp_path, merge_into, monkeypatch):
    """LoftQ's base is quantized: no difference of two adapters leads back to the original."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import layer

    def coarse(weight, num_bits, reduced_rank, num_iter):
        """Stand in for LoftQ's own, which wants bitsandbytes on a GPU: steps of 0.1."""
        del num_bits, num_iter
        quantized = (weight.data * 10).round() / 10
        u, s, v = torch.linalg.svd(weight.data - quantized, full_matrices=False)
        return quantized, s[:reduced_rank, None] * v[:reduced_rank], u[:, :reduced_rank]

    monkeypatch.setattr(layer, "loftq_init", coarse)
    torch.manual_seed(0)
    base = llama().eval()
    save_base(base, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: True)
        options = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
        model = get_peft_model(base, LoraConfig(**_TARGETS, **options)).eval()
        monkeypatch.undo()
        model.save_pretrained(tmp_path / "initial")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "trained")
        expected = logits(model)
        save_base(copy.deepcopy(model).unload(), tmp_path / "quantized")
    for initial in (None, tmp_path / "initial"):
        with pytest.raises(LoraportError, match="belongs to the base that LoftQ quantized"):
            merge_into(
                tmp_path / "base", tmp_path / "out", tmp_path / "trained", initial_adapter=initial
            )
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    config["init_lora_weights"] = True
    (tmp_path / "trained" / "adapter_config.json").write_text(json.dumps(config))
    merge_into(tmp_path / "quantized", tmp_path / "out", tmp_path / "trained")
    got = logits(load(tmp_path / "out"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    merge_into(tmp_path / "base", tmp_path / "wrong", tmp_path / "trained")
    assert (logits(load(tmp_path / "wrong")) - expected).abs().max() > 0.01


def test_which_adapter_the_initial_one_is_for(tmp_path, merge_into):
    """A plain adapter in the same merge is not what begins with it."""
    expected = trained(llama, {**_TARGETS, "init_lora_weights": "pissa"}, tmp_path)
    (tmp_path / "other").mkdir()
    trained(llama, _TARGETS, tmp_path / "other", seed=0)
    plain, pissa, initial = tmp_path / "other/trained", tmp_path / "trained", tmp_path / "initial"
    merge_into(tmp_path / "base", tmp_path / "one", pissa, initial_adapter=initial)
    merge_into(tmp_path / "base", tmp_path / "both", pissa, (plain, 0.0), initial_adapter=initial)
    for name in ("one", "both"):
        got = logits(load(tmp_path / name))
        assert torch.allclose(got, expected, rtol=0, atol=3e-5 * expected.abs().max())
    shutil.copytree(plain, tmp_path / "plain2")
    with pytest.raises(LoraportError, match="expected one of the adapters to say"):
        merge_into(
            tmp_path / "base",
            tmp_path / "none",
            plain,
            tmp_path / "plain2",
            initial_adapter=initial,
        )
    with pytest.raises(LoraportError, match="got the trained one itself"):
        merge_into(tmp_path / "base", tmp_path / "none", pissa, initial_adapter=pissa)


def test_an_initialisation_that_nobody_knows(tmp_path, merge_into):
    trained(llama, _TARGETS, tmp_path)
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    config["init_lora_weights"] = "of_next_year"
    (tmp_path / "trained" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraportError, match=r"one of PEFT 0\.21's: .*of_next_year.*may have"):
        merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "trained")


def test_initial_adapters_are_peft_s(tmp_path, capsys):
    trained(llama, _TARGETS, tmp_path)
    assert run("convert", tmp_path / "trained", "--to", "mlx", "-o", tmp_path / "mlx") == 0
    capsys.readouterr()
    command = ["convert", tmp_path / "mlx", "--to", "peft", "-o", tmp_path / "back"]
    assert run(*command, "--initial-adapter", tmp_path / "initial") == 2
    assert "expected PEFT's layout beside an initial adapter, got mlx" in capsys.readouterr().err
