"""What becomes of a JSONL file, and what is said about a bad one."""

import gzip
import json

import pytest
import tokenizers

from loraport.errors import LoraportError
from loraport.training.data.batches import IGNORED, Row, RowBatches, collate
from loraport.training.data.chat import chat_rows
from loraport.training.data.text_data import split_rows
from loraport.training.data.tokens import read_rows


def learned(row, tokenizer):
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def shown(row, tokenizer):
    return tokenizer.decode(list(row.tokens))


def test_text_is_learned_whole_and_ended(write_jsonl, tokenizer):
    rows = read_rows(write_jsonl([{"text": "Hé!"}]), tokenizer, 99).rows
    assert shown(rows[0], tokenizer) == "Hé!<|end|>"
    assert rows[0].labels == rows[0].tokens


def test_of_a_completion_only_the_completion_is_learned(write_jsonl, tokenizer):
    rows = read_rows(write_jsonl([{"prompt": "2+2=", "completion": "4"}]), tokenizer, 99).rows
    assert shown(rows[0], tokenizer) == "2+2=4<|end|>"
    assert learned(rows[0], tokenizer) == "4<|end|>"


def test_every_assistant_turn_is_learned_and_nothing_else(write_jsonl, tokenizer):
    turns = [("user", "a"), ("assistant", "bcd"), ("user", "e"), ("assistant", "fg")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 99).rows
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown(rows[0], tokenizer) == rendered
    # Not the line feed that the template writes after the end of a turn.
    assert learned(rows[0], tokenizer) == "bcd<|end|>fg<|end|>"


DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|start|>system: help<|end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("template", [(), (DEFAULT_SYSTEM,)])
@pytest.mark.parametrize("text", ["hi", "a help", "bc", "assistant: a"])
def test_of_a_chat_that_an_assistant_begins_its_text_alone_is_learned(
    write_jsonl, make_tokenizer, template, text
):
    tokenizer = make_tokenizer(*template)
    turns = [("assistant", text), ("user", "e"), ("assistant", "fg")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 199).rows
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown(rows[0], tokenizer) == rendered
    assert ("system: help" in rendered) is bool(template)
    assert learned(rows[0], tokenizer) == f"{text}<|end|>fg<|end|>"


def test_reading_a_long_file_is_told(write_jsonl, make_tokenizer, monkeypatch):
    from loraport.training.data import tokens

    monkeypatch.setattr(tokens, "_TOLD_EVERY", 2)
    path, told = write_jsonl([{"text": text} for text in "abcde"]), []
    read_rows(path, make_tokenizer(), 99, told.append)
    assert told == [f"{path}: {count} of 5 rows read" for count in (2, 4)]


def test_the_end_of_texts_is_looked_up_once_a_chat(write_jsonl, make_tokenizer, monkeypatch):
    """By name, which for each token took a fifth of the time."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy " * 9}]
    path, asked = write_jsonl([{"messages": chat}]), []
    end = tokenizer.eos_token_id
    monkeypatch.setattr(
        type(tokenizer), "eos_token_id", property(lambda _: asked.append(1) or end), raising=False
    )
    assert len(read_rows(path, tokenizer, 199).rows[0].tokens) > 20
    assert len(asked) == 1


def test_a_chat_of_many_turns_is_not_gone_through_for_each_of_them():
    compared = []

    class Place(int):
        """Where a token begins or ends; it counts what it is compared with."""

        def __radd__(self, other):
            return Place(int(self) + other)

        def __lt__(self, other):
            compared.append(other)
            return int(self) < int(other)

        def __gt__(self, other):
            compared.append(other)
            return int(self) > int(other)

    class Letters:
        """A tokenizer of single letters, whose turns end with ``~``."""

        eos_token_id = ord("~")

        def apply_chat_template(self, messages, *, add_generation_prompt, **_):
            turns = [f"{each['role'][0]}:{each['content']}~" for each in messages]
            return "".join(turns) + "a:" * add_generation_prompt

        def __call__(self, text, **_):
            offsets = [(Place(at), Place(at + 1)) for at in range(len(text))]
            return {"input_ids": list(map(ord, text)), "offset_mapping": offsets}

    counts = {}
    for turns in (10, 40):
        compared.clear()
        chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * turns
        (row,) = chat_rows(chat, [], Letters())
        assert "".join(map(chr, row.tokens)) == "u:hi~a:ho~" * turns
        answers = [token if token != IGNORED else ord(".") for token in row.labels]
        assert "".join(map(chr, answers)) == ".......ho~" * turns
        counts[turns] = len(compared)
    assert counts[10] > 0
    assert counts[40] < 8 * counts[10]  # sixteen times, if each turn looked at every token


def test_tools_reach_the_chat_template(write_jsonl, make_tokenizer):
    """What a template writes of them is context, as transformers renders it, and not learned."""
    template = (
        "{% if tools %}<s>tools: {% for t in tools %}{{ t['function']['name'] }} {% endfor %}</s>"
        "{% endif %}{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ahoy"}]
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {}}}]
    path = write_jsonl([{"messages": chat, "tools": given} for given in (tools, [], None)])
    told, *others = read_rows(path, tokenizer, 99).rows
    whole = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
    assert tokenizer.decode(told.tokens) == whole
    assert "tools: tide" in whole
    learned = [[label for label in row.labels if label != IGNORED] for row in (told, *others)]
    assert learned[0] == learned[1] == learned[2]
    assert others[0] == others[1]
    assert len(told.tokens) > len(others[0].tokens)
    bad = write_jsonl([{"messages": chat, "tools": given} for given in ({}, ["tide"])])
    with pytest.raises(LoraportError) as raised:
        read_rows(bad, tokenizer, 99)
    assert '1: "tools": expected a list of objects, got an object' in str(raised.value)
    assert "2: tools[0]: expected an object, got a string" in str(raised.value)


def test_a_boundary_that_melts_into_one_token_is_kept_apart(write_jsonl):
    """At inference the prompt is tokenized alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "<end>": 3}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    melting = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    assert melting("ab")["input_ids"] == [2]
    row = read_rows(write_jsonl([{"prompt": "a", "completion": "b"}]), melting, 9).rows[0]
    assert row == Row((0, 1, 3), (IGNORED, 1, 3))


@pytest.mark.parametrize("answer", ["\nahoy", "ahoy\n", "ahoy"])
def test_bounds_of_an_answer_that_melt_into_one_token_are_kept_apart(
    write_jsonl, make_tokenizer, answer
):
    """The prompt is tokenized alone when the model is asked; two line feeds are one token."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + ':\\n' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    )
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    inner["pre_tokenizer"]["use_regex"] = False
    inner["model"]["vocab"]["ĊĊ"] = 300
    inner["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(inner)),
        eos_token="<|end|>",
        chat_template=tokenizer.chat_template,
    )
    turns = [("user", "a"), ("assistant", answer), ("user", "b"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 99).rows[0]
    asked = [
        tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)
        for count in (1, 3)
    ]
    prompt = tokenizer(asked[0])["input_ids"]
    wanted = tokenizer(answer + "\n")["input_ids"]
    assert list(row.tokens[: len(prompt)]) == prompt
    assert list(row.labels[: len(prompt)]) == [IGNORED] * len(prompt)
    assert list(row.labels[len(prompt) : len(prompt) + len(wanted)]) == wanted
    assert list(row.labels[-len(wanted) :]) == wanted
    assert tokenizer.decode(row.tokens) == asked[1] + answer + "\n"
    # Control: there are answers that melt with what is around them.
    melts = tokenizer(asked[0] + answer)["input_ids"][: len(prompt)] != prompt
    assert melts is (answer[0] == "\n")


def test_after_a_turn_that_ends_with_another_token_than_texts_nothing_is_learned(
    write_jsonl, make_tokenizer, tokenizer
):
    """Gemma's and Phi's turns: what follows their end is never generated."""
    template = tokenizer.chat_template
    tokenizer = make_tokenizer(template.replace("<|end|>", "<|start|>"))
    turns = [("user", "a"), ("assistant", "b <|pad|> c"), ("user", "d"), ("assistant", "e\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 99).rows[0]
    assert learned(row, tokenizer) == "b <|pad|> c<|start|>e\n<|start|>"
    # Control: a token in the middle of an answer that has no end of its own ends nothing.
    tokenizer = make_tokenizer(template.replace("<|end|>", "."))
    row = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 99).rows[0]
    assert learned(row, tokenizer) == "b <|pad|> c.\ne\n.\n"


HIDES_EARLIER = (
    "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}"
    "{{ m.role + ':' + m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# As Qwen3's: an answer has thoughts, if only empty ones, until the user speaks again.
THINKS = (
    "{% set ns = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + ':' }}{% if m.role == 'assistant' and "
    "loop.index0 > ns.user and (loop.last or m.thoughts) %}<think>{{ m.thoughts }}</think>"
    "{% endif %}{{ m.content + '<|end|>,' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)
TURNS = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e")]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (HIDES_EARLIER, [["b<|end|>"], ["d<|end|>"], ["f<|end|>"]]),
        (
            THINKS,
            [["<think></think>b<|end|>"], ["<think></think>d<|end|>"], ["<think></think>f<|end|>"]],
        ),
        (None, [["b<|end|>", "d<|end|>", "f<|end|>"]]),
    ],
)
def test_each_answer_is_learned_after_what_the_model_is_asked_with(
    write_jsonl, make_tokenizer, template, answers
):
    """Also where a template writes an answer otherwise once other turns follow."""
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    messages = [{"role": role, "content": text} for role, text in [*TURNS, ("assistant", "f")]]
    path = write_jsonl([{"messages": messages}])
    read = read_rows(path, tokenizer, 999)
    assert [row.line for row in read.rows] == [1] * len(answers)
    asked = iter([index for index, m in enumerate(messages) if m["role"] == "assistant"])
    for row, expected in zip(read.rows, answers, strict=True):
        assert learned(row, tokenizer) == "".join(expected)
        for answer in expected:
            question = tokenizer.apply_chat_template(
                messages[: next(asked)], tokenize=False, add_generation_prompt=True
            )
            start = len(tokenizer(question)["input_ids"])
            wanted = tokenizer(answer)["input_ids"]
            assert list(row.tokens[:start]) == tokenizer(question)["input_ids"]
            assert row.labels[start - 1] == IGNORED
            assert list(row.labels[start : start + len(wanted)]) == wanted
    told = " ".join(read.notes(path, 999))
    assert ("1 chat is several rows, since" in told) is bool(template)


@pytest.mark.parametrize("template", [None, HIDES_EARLIER])
def test_a_turn_of_no_weight_is_read_and_not_learned(write_jsonl, make_tokenizer, template):
    """As in OpenAI's format; control: without weights, and with 1, all are learned."""
    tokenizer = make_tokenizer(template) if template else make_tokenizer()
    plain = [{"role": role, "content": text} for role, text in [*TURNS, ("assistant", "f")]]
    weights = (None, 0, None, 1, None, None)
    weighted = [
        turn if weight is None else turn | {"weight": weight}
        for turn, weight in zip(plain, weights, strict=True)
    ]
    every, some = (
        read_rows(write_jsonl([{"messages": turns}]), tokenizer, 999).rows
        for turns in (plain, weighted)
    )
    assert "".join(learned(row, tokenizer) for row in every) == "b<|end|>d<|end|>f<|end|>"
    assert "".join(learned(row, tokenizer) for row in some) == "d<|end|>f<|end|>"
    assert [row.tokens for row in some] == [row.tokens for row in every][-len(some) :]


def test_turns_that_stay_as_they_are_share_a_row(write_jsonl, make_tokenizer):
    """Qwen3 keeps thoughts that the row has, until the user speaks again."""
    tokenizer = make_tokenizer(THINKS)
    messages = [{"role": role, "content": text} for role, text in [*TURNS, ("assistant", "f")]]
    messages[1]["thoughts"] = "hm"
    rows = read_rows(write_jsonl([{"messages": messages}]), tokenizer, 999).rows
    assert [learned(row, tokenizer) for row in rows] == [
        "<think>hm</think>b<|end|><think></think>d<|end|>",
        "<think></think>f<|end|>",
    ]


def test_a_prompt_that_the_turn_does_not_begin_with_is_told(write_jsonl, make_tokenizer):
    """As DeepSeek-R1's: the answer begins within thoughts that no turn is written with."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant:<think>\n{% endif %}"
    )
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ahoy"}]
    path = write_jsonl([{"messages": messages}])
    with pytest.raises(LoraportError) as raised:
        read_rows(path, make_tokenizer(template), 99)
    assert f"{path}:1: messages[1]: expected a chat template that writes a turn after the" in str(
        raised.value
    )
    assert "whose prompt ends with '<think>\\n' where it writes 'ahoy<|end|>'" in str(raised.value)


def test_rows_of_one_chat_are_held_out_together():
    rows = [Row((line, turn), (line, turn), line) for line in range(1, 9) for turn in range(3)]
    train, held_out = split_rows(rows, 0.25, seed=3)
    assert {row.line for row in train}.isdisjoint(row.line for row in held_out)
    assert (len(train), len(held_out)) == (18, 6)
    # As the first rows alone are split.
    assert split_rows(rows[::3], 0.25, seed=3) == (train[::3], held_out[::3])


def test_a_template_that_refuses_a_row_is_quoted(write_jsonl, make_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(LoraportError, match=r":1: the chat template refuses it: roles must alt"):
        read_rows(write_jsonl([{"messages": messages}]), make_tokenizer(template), 99)


def test_messages_need_a_chat_template(write_jsonl, make_tokenizer):
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(LoraportError, match="expected a base with a chat template"):
        read_rows(write_jsonl([{"messages": messages}]), make_tokenizer(None), 99)


BAD = {
    b'{"text": "fine"}': None,
    b"{nonsense": "expected JSON",
    b"[1]": "expected an object, got a list",
    b'{"txt": "a"}': 'expected "text", "prompt" with "completion", or "messages", got keys txt',
    b'{"prompt": "a"}': "got prompt",
    b'{"text": "a", "messages": []}': "got text, messages",
    b'{"text": ""}': "expected some text",
    b'{"text": 5}': "expected a string, got a number",
    b'{"prompt": null, "completion": "x"}': '"prompt": expected a string, got null',
    b'{"messages": []}': "got an empty list",
    b'{"messages": ["x"]}': "messages[0]: expected an object, got a string",
    b'{"messages": [{"role": "bot", "content": "x"}]}': "messages[0].role: expected one of",
    b'{"messages": [{"role": "user", "content": "x"}]}': "expected an assistant turn",
    b'{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}': "expected an assistant",
    b'{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}': "weight: expected 0",
    b'{"messages": [{"role": "user", "content": "x", "weight": 1}]}': "of role user",
    b'{"messages": [{"role": "user", "content": ["x"]}]}': "content: expected a string, got a list",
    b'{"text": "a", "text": "b"}': 'expected each key of an object once, got "text" 2 times',
    b'{"messages": [{"role": "assistant", "content": "", "content": "x"}]}': 'got "content" 2',
    b'{"text": "\xff"}': "expected UTF-8, got byte 0xff",
}


def test_all_bad_lines_are_told_at_once(tmp_path, tokenizer):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(BAD) + b"\n")
    with pytest.raises(LoraportError) as raised:
        read_rows(path, tokenizer, 99)
    text = str(raised.value)
    assert text.startswith(f"{path}: {len(BAD) - 1} bad lines\n")
    for index, reason in enumerate(BAD.values()):
        prefix = f"{path}:{2 * index + 1}: "
        if reason is None:
            assert prefix not in text
        else:
            line = next(line for line in text.splitlines() if prefix in line)
            assert reason in line


def test_of_very_many_bad_lines_some_are_shown_and_all_counted(write_jsonl, tokenizer):
    path = write_jsonl([[]] * 50)
    with pytest.raises(LoraportError) as raised:
        read_rows(path, tokenizer, 99)
    assert str(raised.value).count("expected an object") == 20
    assert "50 bad lines" in str(raised.value)
    assert str(raised.value).endswith("... and 30 more")


def test_files_without_rows(tmp_path, write_jsonl, tokenizer):
    with pytest.raises(LoraportError, match="cannot be read: No such file"):
        read_rows(tmp_path / "missing.jsonl", tokenizer, 99)
    with pytest.raises(LoraportError, match="expected rows to learn, got none"):
        read_rows(write_jsonl([]), tokenizer, 99)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            json.dumps([{"text": "abc"}] * 40, indent=2).encode(),
            r"several lines; .* jq -c '\.\[\]'$",
        ),
        (json.dumps({"text": "abc"}, indent=2).encode(), r"got JSON over several .* jq -c '\.'$"),
        (
            gzip.compress(b'{"text": "abc"}\n' * 40, mtime=0),
            r"expected text \(JSONL\), got a gzip file; unpack it",
        ),
        (json.dumps([{"text": "abc"}] * 40).encode(), r"a list of all on one; .* jq -c '\.\[\]'$"),
        (b"PAR1\x15\x04\n\xff\n\nPAR1", r"got a Parquet file; .* pandas\.read_parquet\("),
        (b"ARROW1\0\0\n\xff\n", r"got an Arrow file; .* pandas\.read_feather\("),
        (b"\xff\xff\xff\xff\x90\1\0\0\n\n\n", r"datasets saves it; .*Dataset\.from_file\("),
        (b"PK\x03\x04\n\n\xff", "got a zip file; unpack it: unzip"),
        (b"\x28\xb5\x2f\xfd\n\n\xff", "got a Zstandard file; unpack it: unzstd"),
        ('{"text": "abc"}\n'.encode("utf-16"), "got text in UTF-16; write it in UTF-8: iconv"),
    ],
)
def test_another_kind_of_file_is_told_as_a_whole(tmp_path, tokenizer, content, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(LoraportError, match=reason) as raised:
        read_rows(path, tokenizer, 16)
    assert "\n" not in str(raised.value)
    # Control: one line that is not JSON is told by its number, whatever it begins with.
    path.write_bytes(b'{"text": "abc"}\n[\n')
    with pytest.raises(LoraportError, match=r"1 bad line\n  .*:2: expected JSON"):
        read_rows(path, tokenizer, 16)


@pytest.mark.parametrize(("suffix", "reader"), [(".csv", "read_csv"), (".TSV", "read_table")])
def test_a_table_is_told_as_one(tmp_path, tokenizer, suffix, reader):
    path = tmp_path / f"data{suffix}"
    path.write_text('text,label\n"a cat, sat",1\n')
    with pytest.raises(LoraportError, match=rf"got a table; .* pandas\.{reader}\(") as raised:
        read_rows(path, tokenizer, 16)
    assert "\n" not in str(raised.value)
    path.write_text('{"text": "abc"}\n')  # control: a name is no content
    assert len(read_rows(path, tokenizer, 16).rows) == 1


def test_long_rows_are_cut_and_counted_and_rows_without_answer_left_out(write_jsonl, tokenizer):
    rows = [
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": "cdefgh"},
        {"prompt": "abcdefgh", "completion": "i"},
    ]
    read = read_rows(write_jsonl(rows), tokenizer, 5)
    assert [shown(row, tokenizer) for row in read.rows] == ["abcd<|end|>", "abcde"]
    assert read.truncated == 2
    assert read.dropped == (3,)
    told = "3 rows whose answer is cut off at 2 tokens; raise --max-length as far as the base's "
    with pytest.raises(LoraportError, match=f"{told}context goes, or shorten them$"):
        read_rows(write_jsonl(rows), tokenizer, 2)


def test_a_row_of_one_token_is_not_said_to_be_cut(write_jsonl, tokenizer):
    rows = [
        {"text": "<|end|>"},
        {"text": "abc"},
        {"prompt": "", "completion": "<|end|>"},
        {"prompt": "abcdefgh", "completion": "i"},
    ]
    path = write_jsonl(rows)
    read = read_rows(path, tokenizer, 5)
    assert [shown(row, tokenizer) for row in read.rows] == ["abc<|end|>"]
    assert (read.dropped, read.empty) == ((1, 3, 4), (1, 3))
    _, cut, empty = read.notes(path, 5)
    assert cut.endswith("1 row was left out, since nothing of the answer is within 5 tokens "
                        "(line 4)")  # fmt: skip
    assert empty.endswith("2 rows were left out, since nothing is to be learned after the first "
                          "token (lines 1, 3)")  # fmt: skip
    with pytest.raises(LoraportError, match="got 1 row, of which nothing is to be learned after"):
        read_rows(write_jsonl(rows[:1]), tokenizer, 5)


def rows_of_lengths(lengths):
    return [Row((index,) * length, (index,) * length) for index, length in enumerate(lengths)]


def test_batches_pad_on_the_right():
    batch = collate([Row((5, 6, 7), (IGNORED, 6, 7)), Row((8,), (8,))], pad=9)
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert collate([Row((5,), (5,))], pad=9).mask is None


def test_an_epoch_has_every_row_once_in_an_order_of_its_own():
    batches = RowBatches(rows_of_lengths([1 + i % 7 for i in range(50)]), 4, 0, seed=1)

    def order(epoch):
        return [batch.tokens[:, 0].tolist() for batch in batches.epoch(epoch)]

    assert len(order(0)) == len(batches) == 13
    assert sorted(row for batch in order(0) for row in batch) == list(range(50))
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_rows_of_like_length_share_a_batch():
    lengths = [1 + i % 16 for i in range(64)]
    batches = list(RowBatches(rows_of_lengths(lengths), 4, 0, seed=1).epoch(0))
    padded = sum(batch.tokens.numel() for batch in batches)
    assert padded == sum(lengths)  # four rows of each length: nothing is padded


def test_splitting_is_seeded_and_loses_nothing():
    rows = rows_of_lengths(range(1, 21))
    train, held_out = split_rows(rows, 0.25, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    assert set(train) | set(held_out) == set(rows)
    assert split_rows(rows, 0.25, seed=3) == (train, held_out)
    assert split_rows(rows, 0.25, seed=4)[1] != held_out
    with pytest.raises(LoraportError, match="--validation-share 0"):
        split_rows(rows[:1], 0.1, seed=0)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": "a \ud800"}, "text: "),
        ({"prompt": "\udfff", "completion": "b"}, "prompt: "),
        ({"prompt": "a", "completion": "b\ude00\ud83d"}, "completion: "),
        ({"messages": [{"role": "assistant", "content": "\udcff"}]}, "messages[0].content: "),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"\ud800": 1}]}]},
            "a key of messages[0].tool_calls[0]: ",
        ),
    ],
)
def test_half_a_character_is_named_by_line_and_field(write_jsonl, tokenizer, row, field):
    """Control: both halves, which JSON makes one character of, and halves that nobody reads."""
    path = write_jsonl([{"text": "🚢", "note": "\ud800"}, row])
    with pytest.raises(LoraportError) as caught:
        read_rows(path, tokenizer, 99)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.startswith(f"  {path}:2: {field}expected whole characters")
    whole = read_rows(write_jsonl([{"text": "🚢", "note": "\ud800"}]), tokenizer, 99)
    assert shown(whole.rows[0], tokenizer) == "🚢<|end|>"
