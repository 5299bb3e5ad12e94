"""A small BERT as other tools export it, without anything of loraport's."""

import warnings

import pytest
import torch
from peft_cases import Case, bert, make_case

ARGUMENTS = ("input_ids", "attention_mask")
PEFT = Case(bert, {"target_modules": ["query", "value", "dense"], "r": 4, "lora_alpha": 6})


def bert_arrays(rows=2, length=7, seed=0):
    import numpy as np

    ids = np.random.default_rng(seed).integers(1, 61, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="session")
def made_bert(tmp_path_factory):
    torch.manual_seed(0)
    return make_case(PEFT, tmp_path_factory.mktemp("bert") / "adapter", base=bert().eval())


@pytest.fixture(scope="session")
def bert_onnx(made_bert, tmp_path_factory):
    """TorchScript's exporter: weights lose their names, nodes keep paths."""
    out = tmp_path_factory.mktemp("bert") / "bert.onnx"
    model = made_bert.fresh_base().eval()
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    axes = {name: {0: "batch", 1: "sequence"} for name in ARGUMENTS}
    model.config._attn_implementation = "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            out,
            kwargs=inputs,
            input_names=list(ARGUMENTS),
            output_names=["logits"],
            dynamic_axes=axes,
            dynamo=False,
        )
    return out
