"""Attention told where rows begin: what masks give, up to the kernel, which is a GPU's.

A kernel that computes row by row stands for it; the GPU's own is in ``tests/cuda``.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM

from loraport.training import LoraOptions, attach
from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.end_to_end import lay_end_to_end
from loraport.training.data.model_inputs import attends_within_rows, model_inputs
from loraport.training.data.packing import cheapest_within_rows, make_batches
from loraport.training.devices import Placement
from loraport.training.kernels import row_attention
from loraport.training.kernels.cuda_graphs import RecordedPasses
from loraport.training.losses.language_model import language_model_loss

CPU = torch.device("cpu")


class OnAGpu(Placement):
    """What a GPU's says of itself, and computes here in float32."""

    def __init__(self):
        super().__init__(torch.device("cuda"), torch.bfloat16)

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, row by row; what it was asked for."""
    seen = []

    def causal_rows(query, key, value, bounds, longest, scaling, before):
        ends = bounds.tolist()
        assert ends[0] == 0
        assert ends[-1] == len(query)
        assert max(e - s for s, e in itertools.pairwise(ends)) <= longest
        seen.append(ends)
        rows = []
        for start, end in itertools.pairwise(ends):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            size = end - start
            seen_by = torch.ones(size, size, dtype=torch.bool).tril()
            seen_by = seen_by.triu(-before) if before >= 0 else seen_by
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen_by, scale=scaling, enable_gqa=True
            )
            rows.append(mixed[0].transpose(0, 1))
        return torch.cat(rows)

    monkeypatch.setattr(row_attention, "causal_rows", causal_rows)
    to = row_attention.lay_end_to_end

    def stays(*arguments, **named):  # there is no GPU to go to
        batch = to(*arguments, **named)
        return type("Stays", (), {"to": lambda _, __: batch.to(CPU)})()

    monkeypatch.setattr(row_attention, "lay_end_to_end", stays)
    return seen


def rows(count=5):
    numbers = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        tokens = tuple(torch.randint(250, (5 + 4 * (index % 3),), generator=numbers).tolist())
        made.append(Row(tokens, (IGNORED,) * 2 + tokens[2:]))
    return made


def gradients(model, batch):
    model.zero_grad()
    part = language_model_loss(model, batch.to(CPU))
    part.total.backward()
    return part.total.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("padded", [0, 7])
def test_losses_and_gradients_are_those_of_masks(llama, kernel, padded):
    attach(llama, LoraOptions(rank=4))
    sequences = [rows(5), rows(2)]
    batch = lay_end_to_end(sequences, 0, share=False)
    batch = batch.lengthened(batch.tokens.shape[1] + padded, 0)
    expected, theirs = gradients(llama, batch)
    assert row_attention.use_row_attention(llama, OnAGpu(), 64)
    kernel.clear()
    got, mine = gradients(llama, batch)
    assert len(kernel) == 2  # layers
    torch.testing.assert_close(got, expected)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    joined = lay_end_to_end([rows(5)[:1], rows(2)], 0, share=False)
    assert not torch.allclose(gradients(llama, joined)[0], expected)  # the control: other rows


def test_a_shared_beginning_still_has_a_mask(llama, kernel):
    shared = [Row((7, 8, 9, *row.tokens), (IGNORED,) * 5 + row.tokens[2:]) for row in rows(3)]
    batch = lay_end_to_end([shared], 0)
    assert batch.to(CPU).bounds is None
    expected = language_model_loss(llama, batch.to(CPU)).total
    assert row_attention.use_row_attention(llama, OnAGpu(), 64)
    kernel.clear()
    assert model_inputs(llama, batch.to(CPU))["attention_mask"].dtype is torch.bool
    assert torch.equal(language_model_loss(llama, batch.to(CPU)).total, expected)
    assert kernel == []


@pytest.mark.usefixtures("kernel")
def test_only_where_it_gives_what_masks_give(llama, monkeypatch):
    """A kernel that is wrong, a model that asks for more, another precision, a CPU."""
    assert not row_attention.use_row_attention(llama, Placement(CPU, torch.bfloat16), 64)
    assert not row_attention.use_row_attention(
        llama, Placement(torch.device("cuda"), torch.float32), 64
    )
    monkeypatch.setattr(row_attention, "causal_rows", lambda q, *_: q.roll(1, 0))
    assert not row_attention.use_row_attention(llama, OnAGpu(), 64)
    assert llama.config._attn_implementation == "sdpa"
    assert not attends_within_rows(llama)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_model_that_drops_out_attention_while_it_trains_keeps_its_masks(dropout):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=dropout)).eval()
    assert row_attention.use_row_attention(model, OnAGpu(), 64) is (dropout == 0)
    attach(model, LoraOptions(rank=4))
    model.train()
    _, found = gradients(model, lay_end_to_end([rows(3)], 0, share=False))
    assert any(gradient.any() for gradient in found)


@pytest.mark.usefixtures("kernel")
def test_a_window_of_the_models_own():
    """It is the kernel's, too; rows that it does not cover are none for end to end."""
    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=16))
    attach(model, LoraOptions(rank=4))
    batch = lay_end_to_end([rows(5)], 0, share=False)
    expected, theirs = gradients(model, batch)
    assert not row_attention.use_row_attention(model, OnAGpu(), 17)
    assert row_attention.use_row_attention(model, OnAGpu(), 16)
    got, mine = gradients(model, batch)
    torch.testing.assert_close(got, expected)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    x = torch.randn(1, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([[[[0, 40]]]], dtype=torch.int32)
    windowed, _ = row_attention.attend(None, x, x, x, bounds, sliding_window=12)
    mask = torch.ones(40, 40, dtype=torch.bool).tril().triu(-11)
    whole = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    reference = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    torch.testing.assert_close(windowed.transpose(1, 2), reference)
    assert not torch.allclose(whole, reference, atol=1e-2)


def test_what_else_a_model_asks_of_attention_is_refused():
    x = torch.zeros(1, 2, 4, 8)
    bounds = torch.tensor([[[[0, 4]]]], dtype=torch.int32)
    for asked in ({"softcap": 30.0}, {"s_aux": x}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError, match=next(iter(asked))):
            row_attention.attend(None, x, x, x, bounds, **asked)


@pytest.mark.usefixtures("kernel")
def test_rows_are_laid_end_to_end_and_share_where_that_is_less_work(llama):
    assert row_attention.use_row_attention(llama, OnAGpu(), 64)
    batches = make_batches(llama, rows(8), 4, 0, 0, packing="auto", max_length=64)
    for batch in batches.epoch(0):
        assert batch.tokens.shape[0] == 1
        assert batch.to(CPU).bounds.tolist()[-4:] == [batch.tokens.shape[1]] * 4

    def beginning(shared, own):
        tokens = [(*range(shared), *range(100 * i, 100 * i + own)) for i in range(1, 5)]
        return [Row(t, (IGNORED,) * (shared + 1) + t[shared + 1 :]) for t in tokens]

    layout = cheapest_within_rows(64)
    assert layout(beginning(50, 3), 0).tokens.shape == (1, 50 + 4 * 3)
    assert layout(beginning(3, 50), 0).tokens.shape == (1, 4 * 53)


@pytest.mark.usefixtures("kernel")
def test_recorded_passes_are_told_where_the_present_rows_begin(llama):
    """Two batches of one shape, whose rows end elsewhere."""

    class Repeats:
        def __call__(self, run):
            run()

            def replay():
                with torch.enable_grad():
                    run()

            return replay

    attach(llama, LoraOptions(rank=4))
    assert row_attention.use_row_attention(llama, OnAGpu(), 64)
    long, short, middle, *_ = sorted(rows(3), key=lambda row: -len(row.tokens))
    batches = [
        lay_end_to_end([order], 0, share=False).lengthened(40, 0).to(CPU)
        for order in ([long, short, middle], [middle, long, short])
    ]
    plain = [language_model_loss(llama, batch).total for batch in batches]
    assert abs(plain[0] - plain[1]) < 1e-3  # the same rows in another order
    recorded = RecordedPasses(llama, Repeats())
    for batch in (*batches, *batches):
        told = language_model_loss(llama, batch, recorded).total
        torch.testing.assert_close(told, plain[batches.index(batch)])
    assert any(made is not None for made in recorded._passes.values())
