"""Rows end to end and packed give the losses and gradients of the padded batch."""

import pytest
import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training import LoraOptions, attach
from loraport.training.data.batches import IGNORED, Row, RowBatches, collate
from loraport.training.data.end_to_end import attention_mask, lay_end_to_end, shared_beginning
from loraport.training.data.model_inputs import model_inputs, shortcuts
from loraport.training.data.packing import (
    PackedBatches,
    cheapest_layout,
    in_few_lengths,
    make_batches,
    pack_by_size,
)
from loraport.training.distributed.sharing import Idle
from loraport.training.losses.language_model import language_model_loss

SYSTEM = tuple(range(3, 9))  # what chat rows begin with


def chat_rows(count=5, beginning=SYSTEM, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        drawn = torch.randint(9, 60, (5 + 2 * index,), generator=numbers).tolist()
        tokens = (*beginning, *drawn)
        learned = len(beginning) + 3
        rows.append(Row(tokens, (IGNORED,) * learned + tokens[learned:], index + 1))
    return rows


def text_rows(count=4):
    return [Row(row.tokens, row.tokens) for row in chat_rows(count, ())]


def adapted(model):
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = attach(model, LoraOptions(rank=3))
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = sum_ = weight = 0
    for batch in batches:
        part = language_model_loss(model, batch)
        part.total.backward()
        total, weight, sum_ = total + part.total.detach(), weight + part.weight, sum_ + part.tokens
    return [total, *(p.grad.clone() for p in model.parameters() if p.requires_grad)], weight, sum_


def assert_equal_within_float32(got, expected):
    """Compare with the roundings of a float64 Llama that computes some things in float32.

    Those are norms, rotary angles and eager attention's softmax, whose kernels round differently
    where an element's place in memory does: some 1e-7 of a tensor's largest element.
    """
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make_rows", [chat_rows, text_rows])
def test_end_to_end_equals_the_padded_batch(llama, make_rows, attention):
    llama.set_attn_implementation(attention)
    model, rows = adapted(llama), make_rows()
    expected, weight, padded = loss_and_gradients(model, [collate(rows, 0)])
    laid = lay_end_to_end([rows], 0)
    got, same_weight, tokens = loss_and_gradients(model, [laid])
    two = lay_end_to_end([rows[:1], rows[1:]], 0)  # the first sequence is padded
    in_two, _, _ = loss_and_gradients(model, [two])
    assert weight == same_weight
    shared = len(SYSTEM) if make_rows is chat_rows else 0
    assert tokens == padded == sum(len(row.tokens) for row in rows)
    side_by_side = collate(rows, 0).tokens.numel()
    assert laid.tokens.numel() == tokens - shared * (len(rows) - 1) < side_by_side
    for mine, other, third in zip(got, expected, in_two, strict=True):
        assert_equal_within_float32(mine, other)
        assert_equal_within_float32(third, other)
    # Control: rows that see each other have another loss.
    object.__setattr__(laid, "segments", torch.zeros_like(laid.segments))
    mixed, _, _ = loss_and_gradients(model, [laid])
    assert abs(mixed[0] - expected[0]) > 1e-3 * expected[0]


def test_every_token_gets_the_loss_it_has_alone(llama):
    model, rows = adapted(llama), chat_rows(3)
    laid = lay_end_to_end([rows], 0)
    logits = model(**model_inputs(model, laid)).logits[0]
    start = len(SYSTEM)
    for row in rows:
        alone = model(input_ids=torch.tensor([row.tokens])).logits[0]
        length = len(row.tokens) - len(SYSTEM)
        mine = torch.cat([logits[: len(SYSTEM)], logits[start : start + length]])
        torch.testing.assert_close(mine, alone, rtol=1e-6, atol=1e-7)
        start += length


def test_the_mask_and_positions():
    rows = [Row((1, 2, 3, 4), (IGNORED,) * 3 + (4,)), Row((1, 2, 5, 6, 7), (IGNORED,) * 4 + (7,))]
    assert shared_beginning(rows) == 2
    batch = lay_end_to_end([rows, rows[:1]], 9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9, 9, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 3, 0, 0, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [1, 1, 1, 1, -1, -1, -1]]
    assert batch.labels[0].tolist() == [IGNORED] * 3 + [4] + [IGNORED] * 2 + [7]
    mask = attention_mask(batch.segments)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 1, 1, 1],
    ]
    assert mask.any(dim=-1).all()  # no token attends to nothing: softmax would give NaN


def test_packed_batches_hold_every_row_once_and_equal_padded_ones(llama):
    model, rows = adapted(llama), chat_rows(9)
    packed = PackedBatches(rows, 2, 0, 1, 40)
    batches = list(packed.epoch(0))
    assert len(batches) == len(packed)
    assert sorted(line for batch in batches for line in batch.lines) == list(range(1, 10))
    assert all(batch.tokens.shape[1] <= 40 for batch in batches)
    got, weight, tokens = loss_and_gradients(model, batches)
    padded = list(RowBatches(rows, 2, 0, 1).epoch(0))
    expected, same, same_tokens = loss_and_gradients(model, padded)
    assert weight == same
    assert tokens == same_tokens
    assert sum(b.tokens.numel() for b in batches) < sum(b.tokens.numel() for b in padded)
    for mine, other in zip(got, expected, strict=True):
        assert_equal_within_float32(mine, other)
    first, second = ([batch.lines for batch in packed.epoch(number)] for number in (0, 1))
    assert first == [batch.lines for batch in packed.epoch(0)] != second


def test_packed_batches_are_shared_between_processes():
    packed = PackedBatches(chat_rows(9), 2, 0, 1, 40)
    parts = [list(packed.share(rank, 2).epoch(0)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(packed)
    lines = [b.lines for part in parts for b in part if not isinstance(b, Idle)]
    assert sorted(line for each in lines for line in each) == list(range(1, 10))


def test_pack_by_size_never_overfills():
    numbers = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 33, (500,), generator=numbers).tolist()
    groups = pack_by_size(sizes, 32)
    assert sorted(index for group in groups for index in group) == list(range(500))
    assert max(sum(sizes[i] for i in group) for group in groups) <= 32
    assert len(groups) <= 1.02 * sum(sizes) / 32 + 1


def test_short_rows_are_laid_end_to_end_and_long_ones_padded(llama):
    layout = cheapest_layout(576, 1 << 40)
    assert layout(chat_rows(4), 0).tokens.shape[0] == 1
    assert layout(chat_rows(1), 0).tokens.shape[0] == 1
    alike = [Row(tuple(range(i, i + 2000)), tuple(range(i, i + 2000))) for i in range(4)]
    assert layout(alike, 0).tokens.shape == (4, 2000)
    assert cheapest_layout(576, 20)(chat_rows(4), 0).tokens.shape[0] == 4
    batches = make_batches(llama, chat_rows(4), 4, 0, 0, packing="auto", max_length=64)
    assert next(batches.epoch(0)).tokens.shape[0] == 1
    padded = make_batches(llama, chat_rows(4), 4, 0, 0, packing="none", max_length=64)
    assert next(padded.epoch(0)).tokens.shape[0] == 4


class BothWays(nn.Module):
    """A model in which a token sees what comes after it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50)

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(x + x.mean(1, keepdim=True)))


class NoPositions(BothWays):
    def forward(self, input_ids, attention_mask=None, use_cache=None):  # noqa: ARG002
        return super().forward(input_ids)


def test_models_that_mix_rows_are_found_out(llama):
    torch.manual_seed(0)
    assert shortcuts(llama).rows_apart
    assert shortcuts(llama).padding_unseen
    for model in (BothWays(), NoPositions()):
        found = shortcuts(model)
        assert not found.rows_apart
        assert not found.padding_unseen
        batches = make_batches(model, chat_rows(4), 4, 0, 0, packing="auto", max_length=64)
        assert next(batches.epoch(0)).tokens.shape[0] == 4
        with pytest.raises(LoraportError, match="keeps packed rows apart, got"):
            make_batches(model, chat_rows(4), 4, 0, 0, packing="fill", max_length=64)


def test_a_recurrent_model_and_a_sliding_window():
    import transformers as t

    torch.manual_seed(0)
    mamba = t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert not shortcuts(mamba.eval()).rows_apart
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    mistral = t.MistralForCausalLM(t.MistralConfig(**sizes, **heads, sliding_window=32)).eval()
    assert shortcuts(mistral).longest == 32
    with pytest.raises(LoraportError, match="attention window is 32 tokens"):
        make_batches(mistral, chat_rows(4), 4, 0, 0, packing="fill", max_length=64)
    # Nothing masks padding, and nothing has to.
    batch = collate(chat_rows(3), 0)
    assert model_inputs(mistral, batch)["attention_mask"] is None
    assert model_inputs(mamba, batch)["attention_mask"] is None or not shortcuts(mamba).rows_apart


def test_a_state_that_hardly_leaks_and_windows_of_other_names():
    """RecurrentGemma forgets at position 0, but not at a shared beginning; GPT-Neo looks back 8."""
    import transformers as t

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "lru_width": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    local = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    kinds = [["global", "local"], 1]
    torch.manual_seed(0)
    models = {
        "end to end": t.RecurrentGemmaForCausalLM(
            t.RecurrentGemmaConfig(**sizes, **heads, attention_window_size=64)
        ),
        "window": t.GPTNeoForCausalLM(
            t.GPTNeoConfig(
                **local, attention_types=[kinds], window_size=8, max_position_embeddings=32
            )
        ),
    }
    rows = chat_rows(4)
    for model in models.values():
        model.eval()
        (batch,) = make_batches(model, rows, 4, 0, None, packing="auto", max_length=64).epoch(0)
        got = language_model_loss(model, batch).total
        ones = [torch.tensor([row.tokens]) for row in rows]
        labels = [torch.tensor(row.labels[1:]) for row in rows]
        alone = [
            torch.nn.functional.cross_entropy(
                model(input_ids=one, use_cache=False).logits[0, :-1], label, reduction="sum"
            )
            for one, label in zip(ones, labels, strict=True)
        ]
        torch.testing.assert_close(got, sum(alone), rtol=1e-6, atol=0)
    assert shortcuts(models["window"]).longest == 8
    laid = language_model_loss(models["end to end"], lay_end_to_end([rows], 0)).total
    assert not shortcuts(models["end to end"]).rows_apart
    alone = language_model_loss(models["end to end"], collate(rows, 0)).total
    assert abs(laid - alone) > 1e-5 * alone


@pytest.mark.parametrize("packing", ["auto", "fill", "none"])
def test_few_lengths_are_at_most_sixteen_for_each_layout(llama, packing):
    """Of rows of 2 to 60 tokens, and what is learned is the same."""
    numbers = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(160):
        length = int(torch.randint(2, 61, (1,), generator=numbers))
        tokens = tuple(torch.randint(250, (length,), generator=numbers).tolist())
        rows.append(Row(tokens, tokens))
    options = {"packing": packing, "max_length": 64}
    few, many = (
        list(make_batches(llama, rows, 4, 0, 0, **options, few_lengths=each).epoch(0))
        for each in (True, False)
    )
    shapes, others = ({tuple(b.tokens.shape) for b in batches} for batches in (few, many))
    assert len({shape for shape in shapes if shape[0] == 1}) <= 16
    assert len({shape for shape in shapes if shape[0] > 1}) <= 16
    assert len(shapes) < len(others) or packing == "fill"
    assert all(length % 8 == 0 for _, length in shapes)
    for mine, other in zip(few, many, strict=True):
        more = mine.tokens.shape[1] - other.tokens.shape[1]
        most = 60 * 4 if mine.tokens.shape[0] == 1 else 60
        assert 0 <= more <= most / 16 + 8
        assert mine.learned().counts == other.learned().counts
        assert torch.equal(mine.tokens[:, : mine.tokens.shape[1] - more], other.tokens)


def test_few_lengths_of_one_sequence_are_parts_of_the_longest_batch():
    layout = in_few_lengths(lambda r, pad: lay_end_to_end([r], pad, share=False), 60, 4)
    for count, length in ((2, 16), (20, 80), (60, 240)):
        rows = [Row(tuple(range(count)), (IGNORED, *range(1, count)))] * 4
        assert layout(rows, 0).tokens.shape == (1, length)  # 60 * 4 / 16 = 15, of eight: 16
