"""How a base stores its model, told from its configuration and its tensors' names."""

import pytest
import torch
import transformers

from converters.merge.layout import base_layout

IMAGES = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4},
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_model_of_images_needs_no_embeddings(kind, tmp_path):
    """transformers raises where it cannot tell which they are."""
    config = getattr(transformers, f"{kind}Config")(**IMAGES[kind])
    config.architectures = [f"{kind}Model"]
    model = getattr(transformers, f"{kind}Model")(config)
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    config.save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layout = base_layout(tmp_path, shapes)
    assert layout.known
    assert layout.model_class == f"{kind}Model"
    assert layout.shapes == shapes
    assert layout.embeddings == frozenset()


TEXTS = {
    "Llama": {"tie_word_embeddings": False},
    "Bert": {},
    "Marian": {
        **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "pad_token_id": 1,
    },
}
CLASSES = {"Llama": "LlamaForCausalLM", "Bert": "BertForMaskedLM", "Marian": "MarianMTModel"}


@pytest.mark.parametrize("kind", TEXTS)
def test_what_no_tensor_holds_is_missing(kind, tmp_path):
    """Not what is tied to something stored, nor positions that the class computes (Marian's)."""
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **TEXTS[kind])
    config.architectures = [CLASSES[kind]]
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[kind])(config)
    config.save_pretrained(tmp_path)
    computed = () if kind != "Marian" else ("embed_positions.weight",)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys and not name.endswith(computed)
    }
    assert bool(computed) == any(name.endswith(computed) for name in model.state_dict())
    assert base_layout(tmp_path, shapes).missing == ()
    lost = {name for name in shapes if name.endswith("norm.weight") or name == "lm_head.weight"}
    lost |= {name for name in shapes if name.endswith("fc1.bias") or "word_embeddings" in name}
    left = {name: shape for name, shape in shapes.items() if name not in lost}
    tied = {name for name, source in model.all_tied_weights_keys.items() if source in lost}
    assert set(base_layout(tmp_path, left).missing) == lost | tied != set()
    assert base_layout(None, left).missing == ()
