"""What is printed, whatever names there are and whatever takes it."""

import io
import os
import sys

import pytest

from loraport.cli import main
from loraport.cli.descriptions import Description
from loraport.cli.reports import print_description, table_console
from loraport.training.report import summary_table
from loraport.training.text import TrainingSummary

# To rich: an end of nothing (an error), the beginning of something (left out), an emoji.
MARKS = "[/red] [bold] a:cat:s"


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_paths_in_messages_are_as_they_are_called(bundle, tmp_path, monkeypatch, capsys):
    (tmp_path / "[").mkdir()
    monkeypatch.chdir(tmp_path)
    zipped, made, delta = f"{MARKS}.zip", f"{MARKS}.bundle", f"{MARKS}.delta"
    for line, output in (
        (("bundle", "pack", bundle), zipped),
        (("bundle", "unpack", zipped), made),
        (("bundle", "diff", made, bundle), delta),
    ):
        code, out, err = call(capsys, *line, "-o", output)
        assert (code, out) == (0, "")
        assert f"{output}: " in err


def test_paths_in_a_trainings_table_are_as_they_are_called(capsys):
    summary = TrainingSummary(
        MARKS, f"base {MARKS}", 1, 0.5, 4, None, None, 1, 1.0, 1, 1, 1, 0, 0, 0, "cpu", "float32", 0
    )
    table_console().print(summary_table(summary))
    shown = capsys.readouterr().out
    assert f"adapter {MARKS}" in shown
    assert f" base {MARKS} " in shown


def test_errors_show_what_a_terminal_would_follow(tiny_base, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text\\u001b[2J": "a"}\n')
    code, _, err = call(capsys, "train", tiny_base, data, "-o", tmp_path / "out")
    assert code == 2
    assert "got keys text\\x1b[2J\n" in err
    assert "\x1b[2J" not in err


def test_of_many_names_a_table_shows_the_first_and_json_all(capsys):
    cases = tuple(f"adapter-{number}" for number in range(300))
    described = Description("bundle", {"golden cases": cases}, (), ())
    print_description(described)
    shown = capsys.readouterr().out
    assert "adapter-11 and 288 more" in shown
    assert "adapter-12" not in shown
    assert described.to_json()["facts"] == {"golden cases": ", ".join(cases)}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_stdout_that_lacks_characters(bundle, monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(bundle)])
    sys.stdout.flush()
    assert stop.value.code == 0
    shown = written.getvalue().decode(encoding)
    assert ("×" in shown) is (encoding != "ascii")
    assert (r"\xd7" in shown) is (encoding == "ascii")


@pytest.mark.parametrize(
    "arguments",
    [("bundle", "check", "BUNDLE"), ("inspect", "--json", "BUNDLE"), ("--help",), ("add", "-h")],
)
def test_a_reader_that_goes_is_not_parity_that_fails(bundle, monkeypatch, arguments):
    reads, writes = os.pipe()
    os.close(reads)
    with monkeypatch.context() as patched, os.fdopen(writes, "w") as pipe:
        patched.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stop:
            main([str(bundle) if word == "BUNDLE" else word for word in arguments])
    assert stop.value.code == 141  # as a shell reports SIGPIPE


def test_progress_without_a_stderr_is_shown_nowhere(monkeypatch, capsys):
    """A closed stderr is None in Python, and print writes to stdout then."""
    from loraport.cli.byte_progress import ByteProgress

    monkeypatch.setattr(sys, "stderr", None)
    with ByteProgress("merging", 4) as progress:
        for _ in range(4):
            progress(1)
    assert capsys.readouterr().out == ""
