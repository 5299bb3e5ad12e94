"""From a JSONL file to an adapter directory, also when killed in between."""

import json
import shutil
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from warm_programs import WarmProgram, run_program

from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.training import (
    LoopOptions,
    LoraOptions,
    TrainOptions,
    attach,
    load_into,
    train_language_model,
)
from loraport.training.data.batches import IGNORED, RowBatches
from loraport.training.data.tokens import read_rows
from loraport.training.losses.language_model import language_model_loss
from loraport.training.text import SUMMARY_FILE, work_directory

LORA = LoraOptions(rank=4, dropout=0.1)
LOOP = LoopOptions(learning_rate=0.02, steps=14, save_every=3)
OPTIONS = TrainOptions(lora=LORA, loop=LOOP, batch_size=4)


def test_training_lowers_the_loss_and_writes_all(base_directory, chat_data, tmp_path):
    out = tmp_path / "adapter"
    lora = replace(LORA, rank=8, targets=r".*(_proj|lm_head)")
    options = replace(OPTIONS, lora=lora, loop=replace(LOOP, steps=60))
    summary = train_language_model(str(base_directory), chat_data, out, options)
    assert summary.validation_loss < 0.6 * summary.base_validation_loss
    assert (summary.rows, summary.validation_rows, summary.steps) == (22, 2, 60)
    names = ["adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.jsonl"]
    assert sorted(entry.name for entry in out.iterdir()) == [*names, "training.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 61))
    assert not work_directory(out).exists()
    assert json.loads((out / SUMMARY_FILE).read_text())["summary"]["steps"] == 60
    adapter = read_peft(out)
    assert adapter.parameters == summary.trainable_parameters
    assert adapter.base_model == str(base_directory)


def test_paths_may_be_texts_and_the_base_a_path(base_directory, chat_data, tmp_path):
    options = replace(OPTIONS, loop=replace(LOOP, steps=1))
    written = []
    for kind, base in ((str, Path(base_directory)), (Path, str(base_directory))):
        out = tmp_path / kind.__name__
        held_out = kind(chat_data)
        train_language_model(base, kind(chat_data), kind(out), options, validation=held_out)
        assert read_peft(str(out)).base_model == str(base_directory)
        written.append((out / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_the_written_adapter_gives_the_validation_loss_told(
    base_directory, chat_data, tmp_path, llama, tokenizer
):
    """Control: without the training the loss is the base's."""
    out = tmp_path / "adapter"
    summary = train_language_model(
        str(base_directory), chat_data, out, OPTIONS, validation=chat_data
    )
    rows = read_rows(chat_data, tokenizer, 256).rows

    def loss():
        with torch.no_grad():
            parts = [language_model_loss(llama, b) for b in RowBatches(rows, 4, 258, None).epoch(0)]
        return sum(float(p.total) for p in parts) / sum(p.weight for p in parts)

    assert loss() == pytest.approx(summary.base_validation_loss, rel=1e-6)
    load_into(llama, read_peft(out))
    assert loss() == pytest.approx(summary.validation_loss, rel=1e-6)
    assert summary.validation_loss < 0.95 * summary.base_validation_loss


@pytest.mark.parametrize("with_head", [True, False])
def test_the_loss_is_transformers_own(llama, tokenizer, chat_data, with_head, monkeypatch):
    """Loss and gradients from the picked positions against the model's full logits."""
    rows = read_rows(chat_data, tokenizer, 256).rows[:5]
    batch = next(RowBatches(rows, 5, 258, None).epoch(0))
    assert batch.mask is not None
    layers = attach(llama, LORA)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    if not with_head:
        monkeypatch.setattr(llama, "get_output_embeddings", lambda: None)
    llama.eval()
    ours = language_model_loss(llama, batch)
    (ours.total / ours.weight).backward()
    gradients = [p.grad.clone() for p in llama.parameters() if p.requires_grad]
    llama.zero_grad()
    theirs = llama(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss
    theirs.backward()
    assert ours.weight == (batch.labels != IGNORED).sum()
    torch.testing.assert_close(ours.total / ours.weight, theirs, rtol=1e-6, atol=0)
    expected = [p.grad for p in llama.parameters() if p.requires_grad]
    for mine, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_gradient_checkpointing_computes_the_same(base_directory, chat_data, tmp_path):
    losses = []
    for on, layers in ((False, None), (True, None), (True, 1)):
        out = tmp_path / f"{on}{layers}"
        options = replace(
            OPTIONS,
            gradient_checkpointing=on,
            checkpointed_layers=layers,
            loop=replace(LOOP, steps=4),
        )
        train_language_model(str(base_directory), chat_data, out, options)
        losses.append((out / "metrics.jsonl").read_text())
    assert losses[0] == losses[1] == losses[2]


def command(base, data, out, *more):
    options = ["--rank", "4", "--dropout", "0.1", "--lr", "0.02", "--steps", "14"]
    options += ["--save-every", "3", *more]
    return ["train", base, data, "-o", out, *options]


def test_killed_at_any_moment_it_resumes_bit_for_bit(base_directory, chat_data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run_program(command(base_directory, chat_data, whole, "--quiet"), tmp_path)
    assert done.poll() == 0, done.stderr
    work = work_directory(parts)
    stops = [work / "metrics.jsonl", work / "checkpoint-00000003", work / "checkpoint-00000009"]
    for kill_at in stops:
        run = WarmProgram(
            command(base_directory, chat_data, parts, "--quiet", "--resume"), tmp_path
        )
        while run.poll() is None and not kill_at.exists():
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not parts.exists()
    done = run_program(command(base_directory, chat_data, parts, "--resume", "--json"), tmp_path)
    assert done.poll() == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 14
    assert "resumed after step" in done.stderr
    for name in ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert not work.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == [
        "parts",
        "whole",
    ]


class Stopped(Exception):
    """Stands for a kill, in this process."""


def stopped_run(base, data, out, at=8, options=OPTIONS):
    from loraport.training.run.observer import Silent

    class Stop(Silent):
        def stepped(self, *, step, **_):
            if step == at:
                raise Stopped

    with pytest.raises(Stopped):
        train_language_model(str(base), data, out, options, observer=Stop())


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    return tmp_path_factory.mktemp("stopped") / "out"


@pytest.fixture
def stopped(base_directory, chat_data, stopped_once, tmp_path):
    """Where a run would write that was stopped; what it kept is a copy, trained once for all."""
    if not work_directory(stopped_once).exists():
        stopped_run(base_directory, chat_data, stopped_once)
    out = tmp_path / "out"
    shutil.copytree(work_directory(stopped_once), work_directory(out))
    return out


def test_torn_and_extra_metrics_lines_are_cut_on_resume(
    base_directory, chat_data, tmp_path, stopped
):
    whole = tmp_path / "whole"
    train_language_model(str(base_directory), chat_data, whole, OPTIONS)
    metrics = work_directory(stopped) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 9, "lo')
    train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_resume_with_other_options_or_data_is_refused(base_directory, stopped, write_jsonl):
    other = replace(
        OPTIONS, lora=replace(LORA, alpha=3), loop=replace(LOOP, weight_decay=0.5, save_every=7)
    )
    data = write_jsonl([{"text": "something else"}] * 9, "other.jsonl")
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), data, stopped, other, resume=True)
    text = str(raised.value)
    for name in ("lora.alpha: expected None, got 3", "weight_decay: expected 0.0, got 0.5"):
        assert name in text
    assert "training rows (data, tokenizer, chat template)" in text
    assert "save_every" not in text  # it does not change what is computed
    assert work_directory(stopped).exists()


@pytest.fixture
def other_base(base_directory, tmp_path, llama):
    """The base but for one number."""
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other = tmp_path / "other"
    llama.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other / name).write_bytes((base_directory / name).read_bytes())
    return other


def test_resume_with_another_base_is_refused(other_base, chat_data, stopped):
    with pytest.raises(LoraportError, match="1 of 14 base weights differ"):
        train_language_model(str(other_base), chat_data, stopped, OPTIONS, resume=True)


def test_an_unfinished_run_is_not_discarded_unasked(base_directory, chat_data, stopped):
    with pytest.raises(LoraportError, match="was not finished; continue it with --resume"):
        train_language_model(str(base_directory), chat_data, stopped, OPTIONS)
    refused = replace(OPTIONS, liger_kernel=True, loop=replace(LOOP, device="cpu"))
    with pytest.raises(LoraportError, match="--liger-kernel: expected a CUDA GPU, got cpu"):
        train_language_model(str(base_directory), chat_data, stopped, refused, force=True)
    assert work_directory(stopped).is_dir()
    summary = train_language_model(str(base_directory), chat_data, stopped, OPTIONS, force=True)
    assert summary.steps == 14
    with pytest.raises(LoraportError, match="already exists"):
        train_language_model(str(base_directory), chat_data, stopped, OPTIONS)


def test_resuming_what_is_finished_only_tidies_up(base_directory, chat_data, tmp_path):
    """As after a kill between the adapter's appearance and the checkpoints' removal."""
    out = tmp_path / "out"
    summary = train_language_model(str(base_directory), chat_data, out, OPTIONS)
    written = (out / "adapter_model.safetensors").stat().st_mtime_ns
    work_directory(out).mkdir()
    again = train_language_model(str(base_directory), chat_data, out, OPTIONS, resume=True)
    assert again == summary
    assert not work_directory(out).exists()
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == written
    free = replace(OPTIONS, loop=replace(LOOP, save_every=7, keep=5))  # changes no result
    assert summary == train_language_model(str(base_directory), chat_data, out, free, resume=True)


def test_resuming_what_is_finished_with_other_options_or_another_base_is_refused(
    base_directory, other_base, chat_data, tmp_path
):
    out = tmp_path / "out"
    train_language_model(str(base_directory), chat_data, out, OPTIONS)
    other = replace(OPTIONS, batch_size=3, loop=replace(LOOP, learning_rate=0.03, steps=15))
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, out, other, resume=True)
    for difference in ("batch_size: expected 4, got 3", "learning_rate: expected 0.02, got 0.03"):
        assert difference in str(raised.value)
    assert "steps: expected 14, got 15" in str(raised.value)
    assert "base weights" not in str(raised.value)
    with pytest.raises(LoraportError, match="base weights: expected") as raised:
        train_language_model(str(other_base), chat_data, out, OPTIONS, resume=True)
    assert str(raised.value).count("expected") == 1
    document = json.loads((out / SUMMARY_FILE).read_bytes())
    other_fields = document["summary"] | {"of_another_version": 1}
    for other in (document["summary"], [], document | {"summary": other_fields}):
        (out / SUMMARY_FILE).write_text(json.dumps(other))
        with pytest.raises(LoraportError, match=r"got another version's .* use the adapter as it"):
            train_language_model(str(base_directory), chat_data, out, OPTIONS, resume=True)
    document["identity"]["of the future"] = document["identity"].pop("packing")
    (out / SUMMARY_FILE).write_text(json.dumps(document))
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, out, OPTIONS, resume=True)
    none = "none (of another version of loraport)"
    assert f"of the future: expected 'auto', got {none}" in str(raised.value)
    assert f"packing: expected {none}, got 'auto'" in str(raised.value)
    (out / SUMMARY_FILE).unlink()
    with pytest.raises(LoraportError, match="is not a training's result"):
        train_language_model(str(base_directory), chat_data, out, OPTIONS, resume=True)


def test_a_damaged_checkpoint_is_named(base_directory, chat_data, stopped):
    newest = max(work_directory(stopped).glob("checkpoint-*"))
    assert newest.name == "checkpoint-00000006"
    (newest / "state.json").write_text("{")
    with pytest.raises(LoraportError, match="resume from the one before"):
        train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)


def cut(file):
    file.write_bytes(file.read_bytes()[:60])


def changed(place, value):
    """Write another value into ``state.json``; ``position.step`` is the place of a step."""

    def change(file):
        document = json.loads(file.read_text())
        *outer, last = place.split(".")
        inner = document
        for key in outer:
            inner = inner[key]
        inner[last] = value
        file.write_text(json.dumps(document))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "got"),
    [
        ("state.json", Path.unlink, "No such file"),
        ("state.json", lambda file: file.write_text("[]"), "TypeError"),
        ("state.json", changed("random", {}), "KeyError"),
        ("state.json", changed("random.python", [3, [1], None]), "ValueError"),
        ("state.json", changed("epoch_random.numpy", None), "TypeError"),
        ("state.json", changed("random.numpy", ["MT19937", [2**40], 0, 0, 0.0]), "Overflow"),
        ("state.json", changed("identity", []), r"identity \[\]"),
        ("state.json", changed("position.step", "a"), "'step': 'a'"),
        ("state.json", changed("position.tokens", -1), "'tokens': -1"),
        ("state.json", changed("position.step", 1000000), "one of step 1000000"),
        ("state.safetensors", Path.unlink, "No such file.*state.safetensors"),
        ("state.safetensors", cut, "state.safetensors"),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors"),
        ("adapter_config.json", Path.unlink, "adapter_config.json"),
    ],
)
def test_a_checkpoint_damaged_in_any_part_is_named(
    base_directory, chat_data, stopped, file, damage, got
):
    """The advice is followed: the run goes on."""
    newest = work_directory(stopped) / "checkpoint-00000006"
    damage(newest / file)
    advice = "remove this directory to resume from the one before, or start again with --force"
    with pytest.raises(LoraportError, match=rf"(?s)^checkpoint {newest}: .*{got}.*; {advice}$"):
        train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)
    shutil.rmtree(newest)
    summary = train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)
    assert summary.steps == 14


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "No such file"),
        (b"", "0 bytes of"),
        (b"x" * 9999, "line 1"),
        (b"[]" * 9999, "Extra data"),
        (b"[]\n" * 9999, "another line 1"),
        (b'{"step": "a"}\n' * 999, "another line 1"),
    ],
)
def test_damaged_metrics_are_named(base_directory, chat_data, stopped, content, got):
    """Control: the file as it was."""
    metrics = work_directory(stopped) / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.unlink() if content is None else metrics.write_bytes(content)
    with pytest.raises(LoraportError, match=rf"{metrics}: .*{got}.*start again with --force"):
        train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)
    metrics.write_bytes(whole)
    train_language_model(str(base_directory), chat_data, stopped, OPTIONS, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes().startswith(whole[:99])


def test_checkpoints_are_adapters_without_pickle(base_directory, chat_data, tmp_path):
    out = tmp_path / "out"
    stopped_run(base_directory, chat_data, out, at=10)
    checkpoints = sorted(work_directory(out).glob("checkpoint-*"))
    assert [path.name[-2:] for path in checkpoints] == ["06", "09"]  # the last two
    assert read_peft(checkpoints[-1]).modules
    suffixes = {entry.suffix for path in checkpoints for entry in path.iterdir()}
    assert suffixes == {".json", ".safetensors"}


@pytest.mark.parametrize("part", [LoraOptions, LoopOptions, TrainOptions])
def test_every_option_is_consumed(base_directory, chat_data, tmp_path, monkeypatch, part):
    read = set()
    original = part.__getattribute__

    def watched(self, name):
        if sys._getframe(1).f_code.co_name not in ("__post_init__", "asdict", "_asdict_inner"):
            read.add(name)
        return original(self, name)

    lora = replace(LORA, targets=("q_proj",), layers="0")
    loop = replace(LOOP, steps=None, epochs=1, save_every=2)
    options = TrainOptions(lora=lora, loop=loop, gradient_checkpointing=True)
    monkeypatch.setattr(part, "__getattribute__", watched)
    train_language_model(str(base_directory), chat_data, tmp_path / "out", options)
    assert {field.name for field in fields(part)} <= read


def test_cut_and_repeated_rows_are_told(base_directory, write_jsonl, tmp_path):
    from loraport.training.run.observer import Silent

    notes = []

    class Watch(Silent):
        def note(self, text):
            notes.append(text)

    rows = [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "a" * 9, "completion": "b"}]
    data = write_jsonl([*rows, {"text": "xyz"}])
    held_out = write_jsonl([{"text": "xyz"}], "held_out.jsonl")
    options = replace(OPTIONS, max_length=6, loop=replace(LOOP, steps=1))
    summary = train_language_model(
        str(base_directory),
        data,
        tmp_path / "out",
        options,
        validation=held_out,
        observer=Watch(),
    )
    assert notes == [
        f"{data}: 2 rows were cut to 6 tokens",
        f"{data}: 1 row was left out, since nothing of the answer is within 6 tokens (line 2)",
        "1 validation row also occurs in the training rows",
    ]
    assert (summary.rows, summary.truncated_rows, summary.dropped_rows) == (2, 2, 1)


def told_losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [
        line["validation_loss"] for line in lines if "validation_loss" in line
    ]


def test_packing_trains_the_same(base_directory, write_jsonl, tmp_path, monkeypatch):
    """End to end: step by step the padded run's losses; filled: the same rows, other batches."""
    words = ["red", "green", "blue", "grey", "pink", "teal", "plum", "gold"]
    rows = [
        {"prompt": "say it: ", "completion": f"{word} " * (1 + i % 5)}
        for i in range(3)
        for word in words
    ]
    data = write_jsonl(rows)
    losses, tokens, computed = {}, {}, {"none": 0, "auto": 0, "fill": 0}

    def counting(model, batch):
        computed[packing] += batch.tokens.numel()
        return language_model_loss(model, batch)

    monkeypatch.setattr("loraport.training.text.language_model_loss", counting)
    for packing in computed:
        out = tmp_path / packing
        loop = LoopOptions(learning_rate=0.02, epochs=2, validate_every=5)
        options = TrainOptions(lora=LoraOptions(rank=4), loop=loop, packing=packing, max_length=96)
        tokens[packing] = train_language_model(str(base_directory), data, out, options).tokens
        losses[packing] = told_losses(out)
    for padded, packed in zip(losses["none"], losses["auto"], strict=True):
        # The same sums in another order, in float32, through some steps.
        assert packed == pytest.approx(padded, rel=1e-5)
    assert computed["auto"] < 0.9 * computed["none"]
    # What is told does not depend on it: the rows' own tokens, in each of the epochs.
    assert tokens["auto"] == tokens["none"] == tokens["fill"] < computed["none"]
    assert len(losses["fill"][0]) < len(losses["none"][0])
    # Control: validation begins with the base, whatever the batches.
    assert losses["fill"][1][0] == pytest.approx(losses["none"][1][0], rel=1e-6)
    assert losses["fill"][1][-1] != pytest.approx(losses["none"][1][-1], rel=1e-5)
