"""How a base stores its model, told from its configuration and its tensors' names."""

import pytest
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
