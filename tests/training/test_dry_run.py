"""``--dry-run``: what it says of a run, and what would make it fit."""

import io
import json
from dataclasses import replace

from click.testing import CliRunner
from rich.console import Console

from loraport.cli.train import train
from loraport.training.memory.dry_run import dry_run
from loraport.training.options import LoopOptions, LoraOptions, TrainOptions
from loraport.training.report import memory_table


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


def test_rows_are_no_longer_than_the_bases_context(base_directory, monkeypatch):
    """Of 256 tokens, as `read_data` cuts them."""
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: 0)
    plain = TrainOptions(lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"), max_length=256)
    context = dry_run(str(base_directory), plain)
    assert dry_run(str(base_directory), replace(plain, max_length=10_000_000)) == context
    assert dry_run(str(base_directory), replace(plain, max_length=255)) != context


def test_recorded_passes_keep_as_much_as_a_step_takes_and_are_given_up_first(
    base_directory, monkeypatch
):
    plain = TrainOptions(lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"))
    whole = dry_run(str(base_directory), plain).prediction
    found = dry_run(str(base_directory), replace(plain, cuda_graphs=True)).prediction
    assert found.total == whole.total + whole.step.peak
    monkeypatch.setattr("loraport.training.memory.dry_run.available_memory", lambda _: whole.total)
    tight = dry_run(str(base_directory), replace(plain, cuda_graphs=True))
    first, second, *_ = tight.alternatives.items()
    assert first == ("--no-cuda-graphs", whole)
    assert second[0] == "--no-cuda-graphs --gradient-checkpointing"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(memory_table(tight))
    assert "recorded passes" in console.export_text()


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
