"""GGUF adapters in llama.cpp itself, against PEFT on the same base."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from llama_gguf import tiny_decoder, write_gguf_base
from peft_cases import Case, load_with_peft, make_case

from converters.formats.registry import read_adapter, write_adapter

_TOKENS = [1, 7, 14, 300, 28, 35, 42, 49, 56, 63, 70, 77]
# llama.cpp in float32 on these models is within 2e-6 of PyTorch; adapters move it by 0.1 and more.
_TOLERANCE = {"llama": 2e-5, "qwen2": 2e-5, "gpt2": 5e-3}  # GELU from a table of float16
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_CASES = {
    "plain": ("llama", {"target_modules": _ALL, "r": 4, "lora_alpha": 10}),
    "rslora_and_patterns": (
        "llama",
        {
            "target_modules": _ALL,
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "embedding_and_head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    # Its weights are stored [in, out]; attn.c_proj is square, so that no shape tells.
    "conv1d_storage": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 4, "fan_in_fan_out": True},
    ),
    "no_permutation": ("qwen2", {"target_modules": _ALL, "r": 4, "lora_alpha": 10}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    models = {}
    for model_type in ("llama", "qwen2", "gpt2"):
        models[model_type] = tiny_decoder(model_type)
        models[model_type].save_pretrained(directory / model_type)
        write_gguf_base(models[model_type], directory / f"{model_type}.gguf")
    return directory, models


def _llama_cpp(node_modules: Path, base: Path, adapter: Path | None, out: Path) -> torch.Tensor:
    """Return llama.cpp's log-probabilities ``[tokens, vocabulary]``."""
    node = shutil.which("node")
    assert node is not None, "npm is here, node is not"
    script = Path(__file__).with_name("llama_logits.mjs")
    command = [node, script, node_modules, base, adapter or "-", ",".join(map(str, _TOKENS)), out]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(out.read_text()), dtype=torch.float64).log()


def _pytorch(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([_TOKENS])).logits[0]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", sorted(_CASES))
def test_llama_cpp_computes_what_peft_computes(name, bases, node_modules, tmp_path) -> None:
    directory, models = bases
    model_type, options = _CASES[name]
    case = Case(lambda: None, options)
    made = make_case(case, tmp_path / "adapter", base=models[model_type])
    adapter = read_adapter(made.path)
    gguf = tmp_path / "adapter.gguf"
    write_adapter(adapter, gguf, "gguf", base=str(directory / model_type))
    base = directory / f"{model_type}.gguf"
    adapted = _llama_cpp(node_modules, base, gguf, tmp_path / "adapted.json")
    expected = _pytorch(load_with_peft(made.fresh_base(), made.path))
    torch.testing.assert_close(adapted, expected, rtol=0, atol=_TOLERANCE[model_type])
    bare = _llama_cpp(node_modules, base, None, tmp_path / "bare.json")
    torch.testing.assert_close(bare, _pytorch(made.base), rtol=0, atol=_TOLERANCE[model_type])
    assert (adapted - bare).abs().max() > 0.1


def test_foreign_files_need_the_base_and_are_read_with_it(bases, tmp_path) -> None:
    """Without what loraport adds, as llama.cpp's own converter writes it."""
    import gguf

    from converters.formats.gguf_file import read_gguf, write_gguf
    from loraport.errors import LoraportError

    directory, models = bases
    options = _CASES["plain"][1]
    made = make_case(Case(lambda: None, options), tmp_path / "adapter", base=models["llama"])
    adapter = read_adapter(made.path)
    write_adapter(adapter, tmp_path / "ours.gguf", "gguf", base=str(directory / "llama"))
    fields, tensors = read_gguf(tmp_path / "ours.gguf")
    kept = {key: fields[key] for key in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert gguf.Keys.Adapter.LORA_ALPHA in kept
    write_gguf(tmp_path / "foreign.gguf", "llama", kept, tensors)
    with pytest.raises(LoraportError, match="give --base"):
        read_adapter(tmp_path / "foreign.gguf")
    back = read_adapter(tmp_path / "foreign.gguf", base=str(directory / "llama"))
    assert back.modules.keys() == adapter.modules.keys()
    for path, module in adapter.modules.items():
        assert torch.equal(back.modules[path].lora_A, module.lora_A)
        assert torch.equal(back.modules[path].lora_B, module.lora_B)
        assert back.modules[path].scaling == module.scaling


def test_tied_embeddings_and_unknown_bases_are_refused(case_of, tmp_path) -> None:
    from loraport.errors import LoraportError

    tied = case_of("tied_embedding")
    with pytest.raises(LoraportError, match=r"tied embeddings, one tensor in llama\.cpp"):
        write_adapter(read_adapter(tied.made.path), tmp_path / "x", "gguf", base=tied.base)
    unknown = case_of("bert_classifier")
    with pytest.raises(LoraportError, match=r"expected one of the architectures .*llama.*got bert"):
        write_adapter(read_adapter(unknown.made.path), tmp_path / "x", "gguf", base=unknown.base)
    nowhere = case_of("plain")
    with pytest.raises(LoraportError, match="the base: expected its architecture and head counts"):
        write_adapter(read_adapter(nowhere.made.path), tmp_path / "x", "gguf")
