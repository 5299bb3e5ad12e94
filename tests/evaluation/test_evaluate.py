"""Scores against transformers' own loss and PEFT's own model."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from tiny_llm import save_base
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from loraport.cli.eval import eval as eval_command
from loraport.errors import LoraportError
from loraport.evaluation import evaluate
from loraport.evaluation.evaluate import neutral_rows
from loraport.evaluation.scores import greedy_answer
from loraport.peft_layout import read_peft, write_peft
from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.tokens import read_rows

# PEFT asks transformers for a name that is about to change.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ROWS = [
    {"prompt": "Where do the ships go? ", "completion": "To the harbour."},
    {"prompt": "2, 4, 8, ", "completion": "16, 32"},
    {"messages": [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "Yes."}]},
    {"text": "The harbour keeps its light on."},
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def load(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@torch.no_grad()
def by_hand(model, rows):
    """Loss and accuracy of each row alone, without padding, from the model's full logits."""
    found = []
    for row in rows:
        tokens, labels = torch.tensor([row.tokens]), torch.tensor([row.labels])
        output = model(input_ids=tokens, labels=labels)
        counted = labels[0, 1:] != IGNORED
        right = output.logits[0, :-1].argmax(-1)[counted] == labels[0, 1:][counted]
        found.append((float(output.loss), int(counted.sum()), int(right.sum())))
    return found


def test_scores_equal_peft_and_transformers(tiny_base, adapters, data, tokenizer):
    """float32 on other batch shapes: 1e-5. Control: base and adapters differ by far more."""
    rows = read_rows(data, tokenizer, 256).rows
    loaded = {name: read_peft(path) for name, path in adapters.items()}
    model = load(tiny_base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = []
    report = evaluate(
        model, tokenizer, loaded, rows, batch_size=3, progress=lambda *news: told.append(news)
    )
    assert [s.name for s in report.scores] == ["base", "a", "b"]
    assert list(dict.fromkeys(name for name, _, _ in told)) == ["base", "a", "b"]
    each = 2 * len(rows) + len(neutral_rows(tokenizer))  # scored, and answered
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {total for _, _, total in told} == {3 * each}
    assert told[-1][1] == 3 * each
    references = [load(tiny_base)]
    references += [PeftModel.from_pretrained(load(tiny_base), p).eval() for p in adapters.values()]
    for scores, reference in zip(report.scores, references, strict=True):
        expected = by_hand(reference, rows)
        for row, (loss, tokens, correct) in zip(scores.rows, expected, strict=True):
            assert row.loss == pytest.approx(loss, rel=1e-5)
            assert (row.tokens, row.correct) == (tokens, correct)
        total = sum(tokens for _, tokens, _ in expected)
        mean = sum(loss * tokens for loss, tokens, _ in expected) / total
        assert scores.loss == pytest.approx(mean, rel=1e-5)
        assert scores.perplexity == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-4)
        assert scores.token_accuracy == pytest.approx(sum(c for *_, c in expected) / total)
        neutral = by_hand(reference, neutral_rows(tokenizer))
        mean = sum(loss * n for loss, n, _ in neutral) / sum(n for _, n, _ in neutral)
        assert scores.held_out_loss == pytest.approx(mean, rel=1e-5)
    losses = [s.loss for s in report.scores]
    assert min(abs(losses[i] - losses[j]) for i in range(3) for j in range(i)) > 1e-3
    # The base is left as it was.
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_answers_equal_transformers_generation(tiny_base, adapter_a, data, tokenizer):
    rows = read_rows(data, tokenizer, 256).rows
    report = evaluate(load(tiny_base), tokenizer, {"a": read_peft(adapter_a)}, rows)
    peft = PeftModel.from_pretrained(load(tiny_base), adapter_a).eval()
    for scores, model in ((report.scores[0], load(tiny_base)), (report.scores[1], peft)):
        assert [answer.line for answer in scores.answers] == [1, 2, 3]  # no answer in a plain text
        for row, answer in zip(rows[:3], scores.answers, strict=True):
            asked = sum(label == IGNORED for label in row.labels)
            prompt = torch.tensor([row.tokens[:asked]])
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=len(row.tokens) - asked,
            )
            assert answer.got == tokenizer.decode(made[0, asked:], skip_special_tokens=True)
            assert not answer.exact


@torch.no_grad()
def test_a_model_without_a_cache_of_keys_answers(tokenizer):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, initializer_range=0.5)).eval()
    prompt = tokenizer("Ships swap their")["input_ids"]
    made = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
    )[0, len(prompt) :].tolist()
    assert len(set(made)) > 3  # so that what comes before is seen to matter
    assert greedy_answer(model, prompt, 12, (), torch.device("cpu")) == made


def test_a_right_answer_is_an_exact_match(tiny_base, tokenizer):
    """A row whose answer is what the base says."""
    model = load(tiny_base)
    prompt = tokenizer("Ships swap")["input_ids"]
    said = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=5,
    )[0, len(prompt) :].tolist()
    other = tokenizer("light on")["input_ids"]
    rows = [
        Row((*prompt, *answer), ((IGNORED,) * len(prompt) + tuple(answer)))
        for answer in (said, other)
    ]
    (scores,) = evaluate(model, tokenizer, {}, rows).scores
    assert [answer.exact for answer in scores.answers] == [True, False]
    assert scores.exact_match == 0.5


@pytest.mark.parametrize("more", [" ", "<s>"])
def test_an_answer_that_goes_on_is_no_exact_match(tiny_base, tokenizer, monkeypatch, more):
    """With a blank, or a special token that is not shown, where the expected one ends."""
    tea, end = tokenizer("tea")["input_ids"], tokenizer.eos_token_id
    found = {}
    for last in (*tokenizer(more)["input_ids"], end):
        said = [*tea, last]
        monkeypatch.setitem(evaluate.__globals__, "greedy_answer", lambda *_, s=said: s)
        for expected in ([*tea, end], [*tea, last]):  # the latter of a row that was cut
            row = Row((40, *expected), (IGNORED, *expected))
            (answer,) = evaluate(load(tiny_base), tokenizer, {}, [row]).scores[0].answers
            assert answer.got.strip() == answer.expected.strip() == "tea"
            found[last == end, expected[-1] == end] = (answer.ended, answer.exact)
    goes_on, ends = (False, False), (True, True)
    assert found == {(False, True): goes_on, (False, False): ends, (True, True): ends}


def test_answers_end_where_the_model_says_that_they_do(tiny_base, tokenizer):
    """A model can have more ends than its tokenizer (Gemma, Phi). Control: the tokenizer's only."""
    said = greedy_answer(load(tiny_base), [40, 41], 6, (), torch.device("cpu"))
    row = Row((40, 41, *said), (IGNORED, IGNORED, *said))
    found = []
    for ends in ([tokenizer.eos_token_id, said[1]], tokenizer.eos_token_id, None):
        model = load(tiny_base)
        model.generation_config.eos_token_id = ends
        (answer,) = evaluate(model, tokenizer, {}, [row]).scores[0].answers
        found.append(answer.got)
    assert found == [tokenizer.decode(said[:2]), *[tokenizer.decode(said)] * 2]
    assert found[0] != found[1]


def test_warnings(tiny_base, adapter_a, data, tokenizer):
    from dataclasses import replace

    rows = read_rows(data, tokenizer, 256).rows
    adapter = read_peft(adapter_a)

    def scaled(factor):
        modules = {k: replace(m, lora_B=m.lora_B * factor) for k, m in adapter.modules.items()}
        return replace(adapter, modules=modules)

    adapters = {"none": scaled(0), "slight": scaled(0.01), "wild": scaled(30)}
    # What the base itself says is what it knows best.
    said = tuple(greedy_answer(load(tiny_base), [40, 41], 30, (), torch.device("cpu")))
    held_out = [Row((40, 41, *said), (IGNORED, IGNORED, *said))]
    report = evaluate(load(tiny_base), tokenizer, adapters, rows, held_out=held_out, generations=0)
    nothing, forgets = report.warnings
    assert nothing.startswith("none does nothing")
    assert forgets.startswith("wild forgets")
    assert report.scores[0].exact_match is None


def test_what_a_base_is_certain_of_can_be_forgotten(tiny_base, adapter_a, data, tokenizer):
    """A loss of 0 has no share: it ended with ZeroDivisionError."""
    from dataclasses import replace

    model = load(tiny_base)
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    said = tuple(greedy_answer(model, [40, 41], 30, (), torch.device("cpu")))
    held_out = [Row((40, 41, *said), (IGNORED, IGNORED, *said))]
    adapter = read_peft(adapter_a)
    none = {k: replace(m, lora_B=m.lora_B * 0) for k, m in adapter.modules.items()}
    adapters = {"none": replace(adapter, modules=none), "trained": adapter}
    rows = read_rows(data, tokenizer, 256).rows
    report = evaluate(model, tokenizer, adapters, rows, held_out=held_out, generations=0)
    base, same, other = (scores.held_out_loss for scores in report.scores)
    assert (base, same) == (0.0, 0.0)
    nothing, forgets = report.warnings
    assert nothing.startswith("none does nothing")
    told = f"trained forgets: the loss on held-out text goes from 0.000 to {other:.3f}; train for "
    assert forgets.startswith(told)


def test_no_rows_and_a_bad_name_are_refused(tiny_base, adapter_a, tokenizer):
    model = load(tiny_base)
    with pytest.raises(LoraportError, match="expected rows"):
        evaluate(model, tokenizer, {}, [])
    row = Row((3, 4), (3, 4))
    with pytest.raises(LoraportError, match="expected another name"):
        evaluate(model, tokenizer, {"base": read_peft(adapter_a)}, [row])


def test_an_adapter_that_does_not_fit_is_named_before_anything_is_scored(
    tiny_base, adapter_a, data, tokenizer
):
    rows, fits = read_rows(data, tokenizer, 256).rows, read_peft(adapter_a)
    modules = {f"no.{path}": module for path, module in fits.modules.items()}
    told = []
    with pytest.raises(LoraportError, match="adapter 'other': the adapter does not fit the model"):
        evaluate(
            load(tiny_base),
            tokenizer,
            {"fits": fits, "other": replace(fits, modules=modules, base_fingerprint=None)},
            rows,
            progress=lambda *news: told.append(news),
        )
    assert not told


@pytest.mark.parametrize("context", [16, 512])
def test_nothing_is_longer_than_the_context(tmp_path, data, context):
    """Learned positions end at 16: rows, held-out and neutral text are cut there, or not at all."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "init_std": 0.2}
    model = OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=context))
    base = save_base(tmp_path / "base", model)
    data.write_text(json.dumps({"prompt": "tea ->", "completion": "ships and cargo " * 9}))
    (tmp_path / "other.txt").write_text("cargo and light " * 20)

    def scores(*more):
        arguments = [str(base), str(data), "--device", "cpu", "--json", *map(str, more)]
        done = CliRunner().invoke(eval_command, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        return json.loads(done.stdout)["scores"]

    assert len(scores()) == 1
    other = ("--held-out", tmp_path / "other.txt")
    (whole,), (cut,) = scores(*other), scores(*other, "--max-length", 16)
    for figure in ("loss", "held_out_loss"):
        assert (whole[figure] == cut[figure]) is (context == 16)


def test_held_out_text_of_single_tokens_is_refused(tiny_base, data, tmp_path):
    """Control: one paragraph of two tokens."""
    text = tmp_path / "text.txt"
    arguments = [str(tiny_base), str(data), "--held-out", str(text), "--device", "cpu"]
    text.write_text("a\n\nb")
    done = CliRunner().invoke(eval_command, arguments)
    assert isinstance(done.exception, LoraportError)
    assert "held-out text: expected a paragraph of at least two tokens" in str(done.exception)
    text.write_text("a\n\nab")
    assert CliRunner().invoke(eval_command, arguments).exit_code == 0


@pytest.mark.parametrize("nameless", ["={}", "."])
def test_an_adapter_without_a_name_is_refused(tiny_base, adapter_a, data, nameless, monkeypatch):
    """Control: the same adapter with one."""
    monkeypatch.chdir(adapter_a)
    value = nameless.format(adapter_a)
    arguments = [str(tiny_base), str(data), "--device", "cpu", "--generations", "0", "--adapter"]
    done = CliRunner().invoke(eval_command, [*arguments, value])
    assert isinstance(done.exception, LoraportError)
    assert f"--adapter {value}: expected a name" in str(done.exception)
    assert CliRunner().invoke(eval_command, [*arguments, f"mine={adapter_a}"]).exit_code == 0


def test_the_command(tiny_base, adapter_a, data, tmp_path):
    per_example = tmp_path / "rows_out.jsonl"
    arguments = [str(tiny_base), str(data), "--adapter", f"mine={adapter_a}", "--device", "cpu"]
    done = CliRunner().invoke(
        eval_command, [*arguments, "--json", "--per-example", str(per_example)]
    )
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [scores["name"] for scores in document["scores"]] == ["base", "mine"]
    shown = [line.split(":")[0] for line in done.stderr.splitlines() if "scoring" in line]
    assert list(dict.fromkeys(shown)) == ["scoring base", "scoring mine"]
    assert document["scores"][0]["generations"] == 3
    lines = [json.loads(line) for line in per_example.read_text().splitlines()]
    assert [(line["model"], line["line"]) for line in lines] == [
        (name, number) for name in ("base", "mine") for number in (1, 2, 3, 4)
    ]
    done = CliRunner().invoke(eval_command, [*arguments, "--examples", "1"])
    assert done.exit_code == 0, done.output
    assert "held-out loss" in done.stdout
    assert "line 1, expected: To the harbour." in done.stdout
    again = CliRunner().invoke(eval_command, [*arguments, "--per-example", str(per_example)])
    assert isinstance(again.exception, LoraportError)


def test_examples_move_no_cursor(tiny_base, tmp_path):
    """What the data holds is shown; in JSON lines it is as it was."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    completion = "a\x1b[2J\rb\n\tc\x9b"
    data.write_text(json.dumps({"prompt": "say ", "completion": completion}) + "\n")
    arguments = [str(tiny_base), str(data), "--device", "cpu", "--examples", "1"]
    done = CliRunner().invoke(eval_command, [*arguments, "--per-example", str(out)])
    assert done.exit_code == 0, done.output
    assert "line 1, expected: a\\x1b[2J\\rb\n\tc\\x9b\n" in done.stdout
    assert not {"\x1b", "\r", "\x9b"} & set(done.stdout)
    assert json.loads(out.read_text())["expected"] == completion


@pytest.mark.parametrize("form", ["--json", "--force"])
def test_a_full_disk_takes_no_scores_away(tiny_base, data, tmp_path, monkeypatch, form):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rows_out.jsonl")

    monkeypatch.setattr("loraport.output.new_file", full)
    arguments = [str(tiny_base), str(data), "--device", "cpu", "--generations", "0", form]
    done = CliRunner().invoke(
        eval_command, [*arguments, "--per-example", str(tmp_path / "rows_out.jsonl")]
    )
    assert isinstance(done.exception, OSError)
    if form == "--json":
        assert json.loads(done.stdout)["scores"][0]["loss"] > 0
    else:
        assert "held-out loss" in done.stdout


def test_each_row_of_a_divided_chat_has_its_own_answer(tiny_base, tmp_path):
    """A template that hides earlier answers makes two rows of one line."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    hides = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content + ' ' }}"
        "{% endif %}{% endfor %}"
    )
    (base / "chat_template.jinja").write_text(hides)
    turns = [("user", "a"), ("assistant", "ship"), ("user", "and"), ("assistant", "light")]
    data, out = tmp_path / "chat.jsonl", tmp_path / "rows_out.jsonl"
    chat = [{"role": role, "content": content} for role, content in turns]
    data.write_text(json.dumps({"messages": chat}) + "\n")
    arguments = [str(base), str(data), "--device", "cpu", "--per-example", str(out)]
    done = CliRunner().invoke(eval_command, arguments)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["line"], line["expected"].strip()) for line in lines] == [
        (1, "ship"),
        (1, "light"),
    ]


def test_rows_cut_and_left_out_are_told(tiny_base, tmp_path, tokenizer):
    """Four of five are cut; of two of them nothing to score is left."""
    data = tmp_path / "cut.jsonl"
    rows = [{"text": "a"}, {"text": "a ship and a light " * 9}, {"text": "a ship at night " * 9}]
    rows += [{"prompt": "a ship and a light " * 9, "completion": "b"}] * 2
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = read_rows(data, tokenizer, 16)
    assert (len(kept.rows), kept.truncated, kept.dropped) == (3, 4, (4, 5))
    few = [str(tiny_base), str(data), "--generations", "0", "--device", "cpu", "--json"]
    done = CliRunner().invoke(eval_command, [*few, "--max-length", "16"])
    document = json.loads(done.stdout)
    assert [document[f"{kind}rows"] for kind in ("", "truncated_", "dropped_")] == [3, 4, 2]
    said = " ".join(done.stderr.split())
    assert f"note: {data}: 4 rows were cut to 16 tokens" in said
    assert "2 rows were left out, since nothing of the answer is within 16 tokens" in said
    assert "(lines 4, 5)" in said
    whole = CliRunner().invoke(eval_command, [*few, "--max-length", "256"])
    document = json.loads(whole.stdout)
    assert [document[f"{kind}rows"] for kind in ("", "truncated_", "dropped_")] == [5, 0, 0]
    assert "note:" not in whole.stderr


def test_a_loss_that_is_not_finite_is_said_and_null_in_json(tiny_base, adapter_a, data, tmp_path):
    from dataclasses import replace

    adapter = read_peft(adapter_a)
    modules = {k: replace(m, lora_B=m.lora_B * 1e36) for k, m in adapter.modules.items()}
    write_peft(replace(adapter, modules=modules), tmp_path / "burst")
    per_example = tmp_path / "rows_out.jsonl"
    arguments = [str(tiny_base), str(data), "--adapter", str(tmp_path / "burst"), "--json"]
    arguments += ["--per-example", str(per_example), "--generations", "0", "--device", "cpu"]
    done = CliRunner().invoke(eval_command, arguments)
    assert done.exit_code == 0, done.output

    def refuse(constant):
        raise AssertionError(f"no JSON: {constant}")

    document = json.loads(done.stdout, parse_constant=refuse)
    base, burst = document["scores"]
    for key in ("loss", "perplexity", "held_out_loss"):
        assert burst[key] is None
        assert base[key] > 0
    lines = per_example.read_text().splitlines()
    losses = [json.loads(line, parse_constant=refuse)["loss"] for line in lines]
    assert [loss is None for loss in losses] == [False] * 4 + [True] * 4
    remedy = "train it at a lower learning rate"
    assert document["warnings"] == [
        f"burst: expected a finite loss, got nan; {remedy}",
        f"burst: expected a finite loss on held-out text, got nan; {remedy}",
    ]
