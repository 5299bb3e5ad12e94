"""The memory of a step, predicted without weights, against torch's allocator while it trains."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach, train
from loraport.training.base.frozen_base import checkpoint_activations, narrow
from loraport.training.data.batches import Row
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement
from loraport.training.losses.language_model import language_model_loss
from loraport.training.memory.live_bytes import LiveBytes
from loraport.training.memory.memory_plan import kept_memory
from loraport.training.memory.step_memory import step_memory

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# The peak is in the loss, whose logits are the largest tensors; or in a layer's backward pass.
WIDE_HEAD = {**SIZES, "vocab_size": 997, "hidden_size": 64, "intermediate_size": 96}
WIDE_LAYERS = {**SIZES, "vocab_size": 97, "hidden_size": 256, "intermediate_size": 512}
# Mixtral's, which are multiplied together: rows by the expert that each is sent to.
EXPERTS = {**WIDE_LAYERS, "hidden_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
PLAIN = TrainOptions(
    lora=LoraOptions(rank=4),
    loop=LoopOptions(steps=2, device="cpu", dtype="float32"),
    batch_size=2,
    max_length=128,
)
CHECKPOINTED = replace(PLAIN, gradient_checkpointing=True)
BFLOAT16 = replace(PLAIN, loop=replace(PLAIN.loop, dtype="bfloat16"))
# Kernels' own buffers and some numbers a token that name it (targets, places) are not traced.
BOUND = 0.01


def decoder(device, sizes):
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        if "num_local_experts" in sizes:
            return MixtralForCausalLM(MixtralConfig(**sizes))
        return LlamaForCausalLM(LlamaConfig(**sizes))


def predicted(sizes, options):
    """Bytes at the peak beside base and adapter."""
    placement = choose_placement("cpu", options.loop.dtype)
    rounded = options.base_dtype != "auto" and placement.dtype is torch.bfloat16
    model = decoder("meta", sizes).to(torch.bfloat16 if rounded else torch.float32)
    kept = kept_memory(model, options.lora, options.base_dtype, model.dtype)
    return kept.optimizer + step_memory(model, options, placement).peak


def allocated(sizes, options):
    """Bytes at the peak of a real run, as torch's profiler hears them from the allocator."""
    model = decoder("cpu", sizes)
    narrow(model, options.base_dtype, choose_placement("cpu", options.loop.dtype))
    attach(model, options.lora)
    if options.gradient_checkpointing:
        checkpoint_activations(model, options.checkpointed_layers)
    numbers = torch.Generator().manual_seed(0)
    filled = options.packing == "fill"
    length = options.max_length // 2 if filled else options.max_length
    count = options.batch_size * options.loop.accumulate * options.loop.steps * (1 + filled)
    drawn = torch.randint(3, sizes["vocab_size"], (count, length), generator=numbers).tolist()
    rows = [Row(tuple(tokens), tuple(tokens)) for tokens in drawn]
    data = make_batches(
        model,
        rows,
        options.batch_size,
        0,
        0,
        packing=options.packing,
        max_length=options.max_length,
    )
    language_model_loss(model, next(data.epoch(0)))  # what is measured once is measured before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(model, data, language_model_loss, options.loop)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (WIDE_HEAD, PLAIN),
        (WIDE_LAYERS, PLAIN),
        (WIDE_HEAD, CHECKPOINTED),
        (WIDE_LAYERS, CHECKPOINTED),
        (WIDE_LAYERS, replace(CHECKPOINTED, checkpointed_layers=1)),
        (
            WIDE_LAYERS,
            replace(PLAIN, loop=replace(PLAIN.loop, accumulate=2), lora=LoraOptions(rank=64)),
        ),
        (WIDE_HEAD, replace(PLAIN, packing="fill")),
        (WIDE_LAYERS, replace(PLAIN, lora=LoraOptions(rank=4, use_dora=True, dropout=0.1))),
        (
            WIDE_HEAD,
            replace(PLAIN, lora=LoraOptions(rank=4, init="pissa", targets=("q_proj", "lm_head"))),
        ),
        (WIDE_LAYERS, BFLOAT16),
        (EXPERTS, PLAIN),
        (EXPERTS, BFLOAT16),
    ],
)
def test_a_step_takes_what_was_predicted(sizes, options):
    real = allocated(sizes, options)
    assert predicted(sizes, options) == pytest.approx(real, rel=BOUND)
    # The control: what another length takes is out of the bound.
    longer = replace(options, max_length=options.max_length + 8)
    assert predicted(sizes, longer) > (1 + BOUND) * real


@pytest.mark.parametrize("options", [PLAIN, replace(CHECKPOINTED, loop=BFLOAT16.loop)])
def test_a_quantized_weight_is_whole_for_a_moment(options):
    pytest.importorskip("bitsandbytes")
    short = replace(options, max_length=24)
    real = allocated(WIDE_LAYERS, replace(short, base_dtype="nf4"))
    found = predicted(WIDE_LAYERS, replace(short, base_dtype="nf4"))
    assert found == pytest.approx(real, rel=BOUND)
    # The control: a base that is not quantized has no such moment.
    assert predicted(WIDE_LAYERS, replace(short, base_dtype="bfloat16")) < (1 - BOUND) * real


def really_kept(checkpointing):
    """Bytes that autograd keeps of a real pass, parameters left out, and what else is alive."""
    model = decoder("cpu", WIDE_HEAD)
    attach(model, PLAIN.lora)
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros((PLAIN.batch_size, PLAIN.max_length), dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.model(input_ids=tokens, use_cache=False)
    head_dim = WIDE_HEAD["hidden_size"] // WIDE_HEAD["num_attention_heads"]
    rotary = 2 * PLAIN.max_length * head_dim * 4  # not among what checkpointed layers keep
    ids = (2 * tokens.numel() + 2 * tokens[:, 1:].numel()) * 8  # labels, places, targets
    loss = result.last_hidden_state[:, 1:].numel() * 4  # its gradient
    return sum(kept.values()) + loss + ids + checkpointing * rotary


@pytest.mark.parametrize("options", [PLAIN, CHECKPOINTED])
def test_activations_are_what_autograd_keeps(options):
    placement = choose_placement("cpu", "float32")
    found = step_memory(decoder("meta", WIDE_HEAD), options, placement).activations
    real = really_kept(options.gradient_checkpointing)
    assert found == pytest.approx(real, rel=BOUND)
    other = really_kept(not options.gradient_checkpointing)
    assert found < 0.3 * other if options.gradient_checkpointing else found > 3 * other


def test_each_layer_that_is_computed_again_saves_the_same():
    model = decoder("meta", {**WIDE_HEAD, "num_hidden_layers": 4})
    placement = choose_placement("cpu", "float32")
    chosen = [PLAIN, *(replace(CHECKPOINTED, checkpointed_layers=n) for n in range(1, 5))]
    kept = [step_memory(model, options, placement).activations for options in chosen]
    saved = [before - after for before, after in itertools.pairwise(kept)]
    assert all(count == pytest.approx(saved[1], rel=0.1) for count in saved)
    assert saved[1] > 0.15 * kept[0]
    assert step_memory(model, CHECKPOINTED, placement).activations == kept[4]
    assert all(parameter.is_meta for parameter in model.parameters())  # left as it was


def test_live_bytes_are_those_of_storages_not_of_views():
    before = torch.ones(100)
    with LiveBytes() as live:
        before.add_(1)
        part = before[:10]
        assert (live.now, live.peak) == (0, 0)
        made = torch.zeros(1000)
        view = made.view(10, 100)
        made += 1
        assert live.now == 4000
        del made
        assert live.now == 4000  # the view still needs it
        other = view * 2
        assert (live.now, live.peak) == (8000, 8000)
        del view, part
        assert (live.now, live.peak) == (4000, 8000)
        del other
    assert (live.now, live.peak) == (0, 8000)
