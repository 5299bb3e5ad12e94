"""``loraport train`` as it is typed."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from click.testing import CliRunner
from warm_programs import run_program

from loraport.cli.train import options_from, train
from loraport.training.options import LoopOptions, LoraOptions, TrainOptions


def invoke(*arguments, code=0):
    result = CliRunner().invoke(train, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def parsed(*arguments):
    """The options that a command line means."""
    context = train.make_context("train", ["base", "data", "-o", "out", *arguments])
    mine = ("base", "data", "out", "validation", "resume", "force", "dry_run", "as_json", "quiet")
    return options_from({k: v for k, v in context.params.items() if k not in mine})


def test_the_defaults_are_the_options_own():
    assert parsed() == TrainOptions()


def test_every_option_can_be_given():
    options = parsed(
        *("--rank", "3", "--alpha", "5", "--rslora", "--dropout", "0.2", "--layers", "0-1"),
        *("--targets", "q_proj, v_proj", "--exclude", r".*\.1\..*", "--init", "gaussian"),
        *("--rank-pattern", "v_proj=4", "--rank-pattern", "a=b=2", "--alpha-pattern", "q=1.5"),
        *("--lr", "0.1", "--epochs", "7", "--steps", "9", "--accumulate", "2", "--warmup", "0.3"),
        *("--weight-decay", "0.4", "--clip", "0.6", "--seed", "8", "--device", "cpu"),
        *("--dtype", "bfloat16", "--save-every", "11", "--keep", "3", "--validate-every", "12"),
        *("--batch-size", "13", "--max-length", "14", "--validation-share", "0.5"),
        *(
            "--gradient-checkpointing",
            "--packing",
            "fill",
            "--base-dtype",
            "nf4",
            "--early-stopping",
            "4",
            "--lora-plus-ratio",
            "15",
            "--shard-base",
            "--dora",
            "--optimizer",
            "adamw-8bit",
            "--checkpointed-layers",
            "16",
            "--compile",
            "--cuda-graphs",
            "--liger-kernel",
        ),
    )
    assert options == TrainOptions(
        lora=LoraOptions(
            rank=3,
            alpha=5,
            use_rslora=True,
            dropout=0.2,
            layers="0-1",
            targets=("q_proj", "v_proj"),
            exclude=r".*\.1\..*",
            init="gaussian",
            use_dora=True,
            rank_pattern={"v_proj": 4, "a=b": 2},
            alpha_pattern={"q": 1.5},
            seed=8,
        ),
        loop=LoopOptions(
            learning_rate=0.1,
            epochs=7,
            steps=9,
            accumulate=2,
            warmup=0.3,
            weight_decay=0.4,
            clip=0.6,
            seed=8,
            device="cpu",
            dtype="bfloat16",
            save_every=11,
            keep=3,
            validate_every=12,
            early_stopping=4,
            lora_plus_ratio=15,
            shard_base=True,
            optimizer="adamw-8bit",
        ),
        batch_size=13,
        max_length=14,
        validation_share=0.5,
        gradient_checkpointing=True,
        checkpointed_layers=16,
        compile=True,
        cuda_graphs=True,
        liger_kernel=True,
        packing="fill",
        base_dtype="nf4",
    )
    # Every field differs from its default above, so none was forgotten here.
    for given, default in (
        (options, TrainOptions()),
        (options.lora, LoraOptions()),
        (options.loop, LoopOptions()),
    ):
        for field in fields(given):
            assert getattr(given, field.name) != getattr(default, field.name), field.name


def test_table_and_json(base_directory, chat_data, tmp_path):
    arguments = (base_directory, chat_data, "--steps", 3, "--rank", 2, "-o")
    shown = invoke(*arguments, tmp_path / "a")
    for text in ("trainable parameters", "adapter size", "validation loss, base", "adapted"):
        assert text in shown.stdout
    assert "step 3/3  loss" in shown.stderr
    assert "tokens/s" in shown.stderr
    told = invoke(*arguments, tmp_path / "b", "--json")
    summary = json.loads(told.stdout)
    assert summary["steps"] == 3
    assert 0 < summary["trainable_share"] < 0.2
    quiet = invoke(*arguments, tmp_path / "c", "--quiet")
    assert quiet.output == ""


def test_a_bad_pattern_is_a_usage_error():
    result = invoke("base", "data", "-o", "out", "--rank-pattern", "v_proj", code=2)
    assert "expected NAME=NUMBER, got 'v_proj'" in result.output


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--targets", "q_prj"], "did you mean q_proj"),
        (["--rank", "0"], "rank: expected at least 1"),
        (["--device", "cuda:77"], "try cpu"),
        (["--checkpointed-layers", "1"], "expected gradient checkpointing, too"),
        (["--gradient-checkpointing", "--checkpointed-layers", "3"], "expected at most 2"),
        (["--device", "cpu", "--optimizer", "paged-adamw-8bit"], "expected a CUDA GPU"),
    ],
)
def test_a_users_mistake_ends_with_2_and_no_traceback(
    base_directory, chat_data, tmp_path, more, reason
):
    command = ["train", base_directory, chat_data, "-o", tmp_path / "out", *more]
    done = run_program(command, tmp_path)
    assert done.poll() == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from loraport.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
    assert "--gradient-checkpointing" in done.stdout
