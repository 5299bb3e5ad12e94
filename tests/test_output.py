"""Outputs appear whole or not at all: killed, failed, full disk, and --force."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from loraport.errors import LoraportError
from loraport.output import cached_directory, new_directory, new_file, refuse_existing


def run_and_kill(program, tmp_path):
    """Start a writer, wait until it says that it is in the middle, and kill -9 it."""
    script = f"from pathlib import Path\nfrom loraport.output import *\n{textwrap.dedent(program)}"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path, text=True
    )
    with process:
        assert process.stdout.readline() == "middle\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_kill_in_the_middle_of_a_file(tmp_path):
    run_and_kill(
        """
        import time
        with new_file(Path("out.bin")) as partial:
            partial.write_bytes(b"half")
            print("middle", flush=True)
            time.sleep(600)
        """,
        tmp_path,
    )
    target = tmp_path / "out.bin"
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what the killed writer left
    with new_file(target) as partial:
        partial.write_bytes(b"whole")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.bin"]
    assert target.read_bytes() == b"whole"


def test_kill_in_the_middle_of_a_replacement_keeps_the_old(tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    (old / "a").write_text("old")
    run_and_kill(
        """
        import time
        with new_directory(Path("out"), force=True) as partial:
            (partial / "a").write_text("new")
            print("middle", flush=True)
            time.sleep(600)
        """,
        tmp_path,
    )
    assert (old / "a").read_text() == "old"
    with new_directory(old, force=True) as partial:
        (partial / "a").write_text("new")
    assert (old / "a").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_kill_between_the_two_renames_loses_nothing(tmp_path):
    """The one moment when nothing stands under the final name: the next writer puts it back."""
    run_and_kill(
        """
        import time
        Path("out").mkdir()
        (Path("out") / "a").write_text("old")
        rename = Path.rename
        def slow(self, target):
            rename(self, target)
            print("middle", flush=True)
            time.sleep(600)
        Path.rename = slow
        with new_directory(Path("out"), force=True) as partial:
            (partial / "a").write_text("new")
        """,
        tmp_path,
    )
    out = tmp_path / "out"
    with pytest.raises(LoraportError, match="already exists"), new_directory(out):
        pass
    assert (out / "a").read_text() == "old"


def test_failure_leaves_nothing(tmp_path):
    target = tmp_path / "out"

    def fail():
        with new_directory(target) as partial:
            (partial / "a").write_text("x")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_write_that_the_system_refuses_leaves_nothing(tmp_path):
    """A limit on file sizes makes the system itself refuse the write, as a full disk does."""
    script = textwrap.dedent(
        """
        import resource, signal
        from pathlib import Path
        from loraport.output import new_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with new_file(Path("out.bin")) as partial:
                partial.write_bytes(bytes(5000))
        except OSError as error:
            print(error.errno)
        """
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout == f"{errno.EFBIG}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("writer", [new_file, new_directory])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_told_with_the_output(writer, number, tmp_path):
    """The system names no file where a write to an open one fails."""
    with pytest.raises(OSError, match=os.strerror(number)) as caught, writer(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert (caught.value.filename == str(tmp_path / "out")) is (number == errno.ENOSPC)
    with pytest.raises(OSError, match="No space") as caught, writer(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space", "elsewhere")
    assert caught.value.filename == "elsewhere"


@pytest.mark.parametrize("writer", [new_file, new_directory])
@pytest.mark.parametrize("name", ["file/out", "file/deeper/out"])
def test_an_output_below_a_file_is_refused(writer, name, tmp_path):
    (tmp_path / "file").write_text("kept")
    expected = r"expected a directory to write it in, got .*file, which is a file"
    with pytest.raises(LoraportError, match=expected), writer(tmp_path / name):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("writer", [new_file, new_directory])
def test_nothing_is_overwritten_without_force(writer, tmp_path):
    target = tmp_path / "out"
    target.mkdir() if writer is new_directory else target.write_text("old")
    with pytest.raises(LoraportError, match=r"out already exists; .*--force"), writer(target):
        pytest.fail("the block must not run")


def test_what_is_read_is_not_replaced_even_with_force(tmp_path):
    read = tmp_path / "home" / "rows.jsonl"
    read.parent.mkdir()
    read.write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(read)
    for given in (read, link):
        for output in (given, read.parent, tmp_path, tmp_path / "home" / ".." / "home"):
            with pytest.raises(LoraportError, match=r"no input and holds none.*choose another"):
                refuse_existing(output, force=True, inputs=(None, "no/such", given))
        for output in (read.parent / "new", tmp_path / "rows.jsonl", tmp_path / "home2"):
            refuse_existing(output, force=True, inputs=(None, "no/such", given))
    with pytest.raises(LoraportError, match="already exists"):
        refuse_existing(read, force=False, inputs=(read,))


def test_a_file_of_what_is_read_is_not_replaced_even_with_force(tmp_path):
    adapter = tmp_path / "adapter"
    (adapter / "earlier").mkdir(parents=True)
    weights = adapter / "adapter_model.safetensors"
    weights.write_text("numbers")
    with pytest.raises(LoraportError, match=r"safetensors: expected .* no file of an input, got"):
        refuse_existing(weights, force=True, inputs=(adapter,))
    # What is new, or a directory, replaces nothing that is read: a base may be where one works.
    for output in (adapter / "adapter.gguf", adapter / "earlier"):
        refuse_existing(output, force=True, inputs=(adapter,))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("writer", [new_file, new_directory])
def test_a_device_or_pipe_is_never_replaced(writer, force, tmp_path):
    """`-o /dev/null --force` by root took the machine's null device away."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        with (
            pytest.raises(LoraportError, match=f"{path}: expected a file or directory"),
            writer(path, force=force),
        ):
            raise AssertionError
    with pytest.raises(LoraportError, match="/dev/stdout: expected a file or directory"):
        refuse_existing(Path("/dev/stdout"), force=force)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_points_to_is_kept(there, tmp_path):
    target, out = tmp_path / "target", tmp_path / "out"
    if there:
        target.mkdir()
        (target / "kept").write_text("kept")
    out.symlink_to(target.name)  # which the one that reads the message may not be beside
    leads = os.path.realpath(target)
    told = f"out is a link to {leads}; .*--force, which replaces the link and keeps what it leads"
    for writer in (new_directory, new_file):
        with pytest.raises(LoraportError, match=told), writer(out):
            pytest.fail("the block must not run")
    with new_directory(out, force=True) as partial:
        (partial / "new").write_text("new")
    assert not out.is_symlink()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == ({"out", "target"} if there else {"out"})
    assert not there or (target / "kept").read_text() == "kept"


def test_kinds_are_not_mixed_up_even_with_force(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    with (
        pytest.raises(LoraportError, match="is a file"),
        new_directory(tmp_path / "file", force=True),
    ):
        pass
    with (
        pytest.raises(LoraportError, match="is a directory"),
        new_file(tmp_path / "directory", force=True),
    ):
        pass


def test_output_written_meanwhile_by_another_is_kept(tmp_path):
    target = tmp_path / "out"

    def both():
        with new_file(target) as partial:
            partial.write_text("mine")
            target.write_text("theirs")

    with pytest.raises(LoraportError, match="already exists"):
        both()
    assert target.read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_living_writers_files_are_left_alone(tmp_path):
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.write_text("busy")
    with new_file(tmp_path / "out") as partial:
        partial.write_text("x")
    assert other.read_text() == "busy"


class TestCache:
    def test_filled_once(self, tmp_path):
        def fill(directory):
            (directory / "file").write_text("first")

        def fail(directory):
            pytest.fail(f"{directory} is filled again")

        assert cached_directory(tmp_path / "kept", fill) == tmp_path / "kept"
        assert cached_directory(tmp_path / "kept", fail) == tmp_path / "kept"
        assert (tmp_path / "kept" / "file").read_text() == "first"

    def test_another_process_that_is_ready_first_keeps_its_own(self, tmp_path):
        def fill(directory):
            (directory / "file").write_text("second")
            (tmp_path / "kept").mkdir()
            (tmp_path / "kept" / "file").write_text("first")

        assert cached_directory(tmp_path / "kept", fill) == tmp_path / "kept"
        assert (tmp_path / "kept" / "file").read_text() == "first"
        assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]

    def test_a_failure_is_told_and_leaves_nothing(self, tmp_path):
        def fill(directory):
            (directory / "file").write_text("half")
            raise LoraportError("meant")

        with pytest.raises(LoraportError, match="meant"):
            cached_directory(tmp_path / "kept", fill)
        assert not list(tmp_path.iterdir())
