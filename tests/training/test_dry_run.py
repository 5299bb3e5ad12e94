"""``--dry-run``: what it says of a run, and what would make it fit."""

import contextlib
import io
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.console import Console

from loraport.cli.train import options_from, train
from loraport.errors import LoraportError
from loraport.training.distributed.processes import Processes
from loraport.training.memory.dry_run import dry_run
from loraport.training.options import LoopOptions, LoraOptions, TrainOptions
from loraport.training.report import memory_table
from loraport.training.run.savers import memory_savers

# Of which few alternatives are left to be predicted.
FRUGAL = TrainOptions(
    lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"), batch_size=1, base_dtype="nf4"
)


def as_typed(flags):
    """Return the options of a command that ends with some flags."""
    context = train.make_context("train", ["base", "data", "--dry-run", *flags.split()])
    fields = {
        name for one in (TrainOptions, LoopOptions, LoraOptions) for name in one.__match_args__
    }
    return options_from({name: context.params[name] for name in fields & context.params.keys()})


def test_what_does_not_fit_comes_with_what_would(base_directory, monkeypatch):
    options = TrainOptions(
        lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"), batch_size=8, max_length=64
    )
    whole = dry_run(str(base_directory), options)
    assert whole.fits
    assert not whole.alternatives
    monkeypatch.setattr(
        "loraport.training.memory.dry_run.available_memory", lambda _: whole.prediction.total - 1
    )
    tight = dry_run(str(base_directory), options)
    assert not tight.fits
    assert tight.prediction == whole.prediction
    names = list(tight.alternatives)
    assert names[0] == "--gradient-checkpointing"
    assert names[1] == "--gradient-checkpointing --batch-size 1 --accumulate 8"
    assert tight.alternatives[names[1]].total < tight.prediction.total
    assert tight.alternatives[names[-1]].kept.base < tight.prediction.kept.base


def test_only_what_takes_less_is_listed(base_directory, monkeypatch):
    """With so few rows this base takes more in bfloat16; with shorter ones it takes less."""
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 0)
    options = TrainOptions(lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"), batch_size=8)
    found = dry_run(str(base_directory), options)
    few = "--gradient-checkpointing --batch-size 1 --accumulate 8"
    assert list(found.alternatives) == [
        "--gradient-checkpointing",
        few,
        f"{few} --base-dtype nf4",
    ]
    typed = [as_typed(flags) for flags in found.alternatives]
    assert [each.gradient_checkpointing for each in typed] == [True] * 3
    assert [each.batch_size * each.loop.accumulate for each in typed] == [4, 8, 8]
    assert [each.base_dtype for each in typed] == ["auto", "auto", "nf4"]
    totals = [made.total for made in found.alternatives.values()]
    assert found.prediction.total > totals[0] > totals[1] > totals[2]
    rounded = replace(
        options,
        gradient_checkpointing=True,
        batch_size=1,
        loop=replace(options.loop, accumulate=8),
        base_dtype="bfloat16",
    )
    assert dry_run(str(base_directory), rounded).prediction.total > totals[1]
    shorter = dry_run(str(base_directory), replace(options, max_length=64, base_dtype="float32"))
    assert [f"{few} --base-dtype {dtype}" for dtype in ("bfloat16", "nf4")] == list(
        shorter.alternatives
    )[2:]


def test_layers_that_keep_their_activations_can_be_given_up(base_directory, monkeypatch):
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 0)
    every = replace(FRUGAL, gradient_checkpointing=True)
    found = dry_run(str(base_directory), replace(every, checkpointed_layers=1))
    flags, made = next(iter(found.alternatives.items()))
    assert flags == "--checkpointed-layers 2"
    typed = f"--gradient-checkpointing --checkpointed-layers 1 {flags}"
    assert as_typed(typed).checkpointed_layers == 2
    assert made == dry_run(str(base_directory), every).prediction
    assert made.total < found.prediction.total


def test_a_base_that_cannot_compute_again_is_not_told_to(base_directory, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 0)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    options = TrainOptions(
        loop=LoopOptions(device="cpu"), batch_size=2, max_length=64, base_dtype="nf4"
    )
    found = dry_run(str(base_directory), options)
    assert list(found.alternatives) == ["--batch-size 1 --accumulate 2"]
    with pytest.raises(LoraportError, match="expected a model that supports it"):
        dry_run(str(base_directory), replace(options, gradient_checkpointing=True))


@pytest.mark.parametrize(
    ("size", "accumulate", "fewer", "more"),
    [(2, 1, 1, 2), (5, 1, 1, 5), (6, 3, 3, 6), (8, 2, 4, 4), (9, 1, 3, 3), (25, 2, 5, 10)],
)
def test_what_is_offered_as_many_rows_a_step_is_as_many(size, accumulate, fewer, more):
    loop = LoopOptions(accumulate=accumulate)
    offered = memory_savers(TrainOptions(batch_size=size, loop=loop))
    assert offered.startswith(f"--batch-size {fewer} --accumulate {more} (as many rows a step), ")
    assert fewer * more == size * accumulate


def test_what_several_processes_refuse_is_not_offered():
    options = TrainOptions(batch_size=6, loop=LoopOptions(shard_base=True))
    assert memory_savers(options, processes=3).startswith("--batch-size 3 --accumulate 2 (")
    assert not memory_savers(options, processes=4).startswith("--batch-size")
    sharded = memory_savers(options, processes=2)
    assert "nf4" not in sharded
    assert "--dry-run" not in sharded
    for flag in ("compile", "cuda_graphs", "liger_kernel"):
        whole = replace(options, loop=LoopOptions(), **{flag: True})
        assert "--shard-base" not in memory_savers(whole, processes=2)
    for apart in (replace(options, loop=LoopOptions()), options):
        assert ", --base-dtype nf4, " in memory_savers(apart, processes=1)


def test_what_is_not_in_use_yet_is_offered():
    plain = TrainOptions(batch_size=1, base_dtype="nf4", max_length=2)
    expected = "--rank 8, or a smaller base (--dry-run says what each takes)"
    assert memory_savers(plain) == f"--gradient-checkpointing, {expected}"
    assert memory_savers(plain, layers=0) == expected  # a model that cannot
    plain = replace(plain, gradient_checkpointing=True)
    assert memory_savers(plain) == expected
    plain = replace(plain, checkpointed_layers=1)
    assert memory_savers(plain) == f"without --checkpointed-layers, {expected}"
    assert memory_savers(plain, layers=3) == f"--checkpointed-layers 3, {expected}"
    assert memory_savers(replace(plain, checkpointed_layers=3), layers=3) == expected
    whole = replace(plain, checkpointed_layers=None, base_dtype="int8")
    assert memory_savers(whole) == f"--base-dtype nf4, {expected}"
    assert memory_savers(whole, processes=2) == f"--base-dtype nf4, {expected}"
    whole = replace(whole, base_dtype="auto")
    assert memory_savers(whole, processes=2) == f"--shard-base or --base-dtype nf4, {expected}"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--cuda-graphs", "--cuda-graphs: expected a CUDA GPU, got cpu"),
        ("--liger-kernel", "--liger-kernel: expected a CUDA GPU, got cpu"),
        ("--optimizer paged-adamw-8bit", "--optimizer paged-adamw-8bit: expected a CUDA GPU"),
        ("--no-cuda-graphs --optimizer adamw-8bit", None),
    ],
)
def test_what_training_refuses_on_a_cpu_is_refused(base_directory, chat_data, flags, reason):
    arguments = [str(base_directory), str(chat_data), "--dry-run", "--device", "cpu"]
    found = CliRunner().invoke(train, [*arguments, *flags.split()])
    if reason is None:
        assert found.exit_code == 0, found.output
        return
    assert isinstance(found.exception, LoraportError)
    assert reason in str(found.exception)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "expected a decoder language model, got"),
        ({"architectures": None}, 'write "architectures": ["LlamaForCausalLM"]'),
        ({"architectures": ["LLaMAForCausalLM"]}, 'write "architectures": ["LlamaForCausalLM"]'),
        ({"model_type": "foo"}, "a kind of model that transformers has, got 'foo'"),
        ({"hidden_size": "x"}, "train a few steps instead"),
    ],
)
def test_of_a_base_that_training_refuses_nothing_is_predicted(
    base_directory, tmp_path, changed, reason
):
    """In the words of the training, where it has any."""
    config = json.loads((base_directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(LoraportError) as refused:
        dry_run(str(tmp_path), FRUGAL)
    assert reason in str(refused.value)


def test_rows_are_no_longer_than_the_bases_context(base_directory, monkeypatch):
    """Of 256 tokens, as `read_data` cuts them."""
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 0)
    plain = replace(FRUGAL, gradient_checkpointing=True, max_length=256)
    context = dry_run(str(base_directory), plain)
    assert dry_run(str(base_directory), replace(plain, max_length=10_000_000)) == context
    assert dry_run(str(base_directory), replace(plain, max_length=255)) != context


def test_recorded_passes_keep_as_much_as_a_step_takes_and_are_given_up_first(
    base_directory, monkeypatch
):
    whole = dry_run(str(base_directory), FRUGAL).prediction
    # As on a GPU: this machine may have none.
    monkeypatch.setattr("loraport.training.memory.dry_run.asked_to_record", lambda *_: True)
    found = dry_run(str(base_directory), replace(FRUGAL, cuda_graphs=True)).prediction
    assert found.total == whole.total + whole.step.peak
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: whole.total)
    tight = dry_run(str(base_directory), replace(FRUGAL, cuda_graphs=True))
    first, second, *_ = tight.alternatives.items()
    assert first == ("--no-cuda-graphs", whole)
    assert second[0] == "--no-cuda-graphs --gradient-checkpointing"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(memory_table(tight))
    assert "recorded passes" in console.export_text()


def test_of_several_processes_each_has_its_rows_and_its_part_of_the_memory(
    base_directory, monkeypatch
):
    loop = LoopOptions(device="cpu")
    options = TrainOptions(
        lora=LoraOptions(rank=4),
        loop=loop,
        batch_size=9,
        max_length=64,
        gradient_checkpointing=True,
        base_dtype="nf4",
    )
    alone, all_rows = (
        dry_run(str(base_directory), replace(options, batch_size=n)).prediction for n in (5, 9)
    )
    monkeypatch.setattr("loraport.training.memory.dry_run.processes_now", lambda: Processes(0, 2))
    # Gradients are there twice while they are summed, which can be more than a step of few tokens.
    wide = replace(options, lora=LoraOptions(rank=512), batch_size=2, max_length=2)
    few = dry_run(str(base_directory), wide).prediction
    assert few.step.peak == 2 * few.kept.gradients
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 10)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = dry_run(str(base_directory), options)
    assert (found.prediction, found.available, found.processes) == (alone, 5, 2)
    assert found.prediction.total < all_rows.total
    assert list(found.alternatives) == ["--batch-size 3 --accumulate 3"]
    with pytest.raises(LoraportError, match="--shard-base, of which nothing is predicted"):
        dry_run(str(base_directory), replace(options, loop=replace(loop, shard_base=True)))
    with pytest.raises(LoraportError, match="at least a row for each of 2 processes"):
        dry_run(str(base_directory), replace(options, batch_size=1))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(memory_table(found))
    said = console.export_text()
    assert "predicted, of each of 2 processes" in said
    assert "free on cpu for each: it does not fit" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_tells(base_directory, chat_data, monkeypatch, rank):
    processes = Processes(rank, 2)
    monkeypatch.setattr(
        "loraport.training.distributed.processes.joined",
        lambda _: contextlib.nullcontext(processes),
    )
    monkeypatch.setattr("loraport.training.memory.dry_run.processes_now", lambda: processes)
    arguments = [str(base_directory), str(chat_data), "--dry-run", "--json", "--device", "cpu"]
    said = CliRunner().invoke(train, arguments).output
    assert json.loads(said)["processes"] == 2 if rank == 0 else said == ""


def test_the_command_prints_a_table_and_writes_nothing(base_directory, chat_data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", str(base_directory), str(chat_data), "--dry-run", "--device", "cpu"]
    shown = CliRunner().invoke(train, arguments[1:])
    assert shown.exit_code == 0, shown.output
    for words in ("activations of a full batch", "it fits"):
        assert words in shown.output
    as_json = CliRunner().invoke(train, [*arguments[1:], "--json"])
    document = json.loads(as_json.stdout)
    assert document["fits"] is True
    kept = document["prediction"]["kept"]
    assert kept["optimizer"] == 2 * kept["gradients"] > 0
    step = document["prediction"]["step"]
    between = kept["base"] + kept["adapter"] + kept["optimizer"]
    assert document["total"] == between + step["peak"]
    assert step["peak"] > step["activations"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_without_an_output_only_a_dry_run_works(base_directory, chat_data):
    found = CliRunner().invoke(train, [str(base_directory), str(chat_data)])
    assert found.exit_code == 2
    assert "--out" in found.output
