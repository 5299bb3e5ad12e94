"""Several processes train what one does: gloo on the CPU, as torchrun starts them."""

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import command

from loraport.errors import LoraportError
from loraport.training.distributed.processes import Processes, joined, processes_now
from loraport.training.distributed.sharing import Idle, own_part, share

HERE = Path(__file__).parent
# The address, since otherwise torchrun asks the network for this machine's name, and may wait long.
TWO = [
    *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
    *("--nproc-per-node", "2"),
]
# float64 up to the logits, whose loss is computed in float32: sums in another order there, which
# Adam's division by the gradient's own size passes on to every step of 0.01.
ATOL = 2e-5


def load_worker():
    spec = importlib.util.spec_from_file_location("two_processes", HERE / "two_processes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


def torchrun(*arguments, directory):
    return subprocess.run(
        [sys.executable, *TWO, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        timeout=240,
    )


def work_at(step, source, target):
    """Leave a work directory as a run that was killed after a step does."""
    target.mkdir()
    shutil.copytree(source / f"checkpoint-{step:08d}", target / f"checkpoint-{step:08d}")
    shutil.copy(source / "metrics.jsonl", target)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process trains, never stopped."""
    work = tmp_path_factory.mktemp("one") / "work"
    model, result = worker.lm(work)
    return work, *worker.facts(model, result)


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """Everything that two processes train, from both of them."""
    directory = tmp_path_factory.mktemp("two")
    work_at(2, one[0], directory / "resumed")
    work_at(4, one[0], directory / "resumed sharded")
    first = ["plain", "sharded", "mean of each", "resumed", "resumed sharded", "dropout"]
    done = torchrun(
        HERE / "two_processes.py", directory, json.dumps([*first, "list", "loader"]),
        directory=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return directory


def found(directory, name, rank=0):
    return torch.load(directory / f"{name}.{rank}.pt")


def assert_same(got, expected, atol=ATOL):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=name)


def assert_same_told(got, expected, tolerance):
    for what in ("losses", "validations"):
        assert [step for step, _ in got[what]] == [step for step, _ in expected[what]]
        values = [value for _, value in expected[what]]
        assert [value for _, value in got[what]] == pytest.approx(values, rel=tolerance)
    assert got["tokens"] == expected["tokens"]


@pytest.mark.parametrize("name", ["plain", "sharded", "resumed", "resumed sharded"])
def test_two_processes_train_what_one_does(one, two, name):
    _, expected, told = one
    got, got_told = found(two, name)
    assert_same(got, expected)
    assert_same_told(got_told, told, 1e-4)
    # The tolerance means something: training moved every matrix far more.
    for key, tensor in worker.facts(*worker.lm(steps=1))[0].items():
        assert (tensor - expected[key]).abs().max() > 50 * ATOL
    assert got_told["shards"] == (["DTensor"] if "sharded" in name else ["Parameter"])


def test_all_processes_end_with_the_very_same_bits(two):
    for name in ("plain", "sharded", "resumed", "dropout", "list", "loader"):
        (first, told), (second, told_too) = found(two, name, 0), found(two, name, 1)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert told == told_too


def test_the_mean_of_the_processes_means_would_be_another_adapter(one, two):
    """The control: rows have unlike numbers of tokens that count."""
    got, told = found(two, "mean of each")
    assert max((got[key] - one[1][key]).abs().max() for key in got) > 100 * ATOL
    value = one[2]["losses"][0][1]
    assert abs(told["losses"][0][1] - value) > 4 * 1e-4 * value  # the other test's tolerance


@pytest.mark.parametrize(("kind", "accumulate"), [("list", 3), ("loader", 2)])
def test_whole_batches_are_dealt_where_nothing_divides_them(two, kind, accumulate):
    model, result = worker.images(kind, accumulate=accumulate)
    expected, told = worker.facts(model, result)
    got, got_told = found(two, kind)
    assert_same(got, expected, atol=1e-10)  # float64 throughout
    assert_same_told(got_told, told, 1e-10)


def test_one_process_resumes_what_two_began(one, two, tmp_path):
    work_at(4, two / "plain", tmp_path / "work")
    got, told = worker.facts(*worker.lm(tmp_path / "work", resume=True))
    assert_same(got, one[1])
    assert_same_told(told, one[2], 1e-4)


def test_only_the_first_process_writes(two):
    """Equal bytes of two writers would hide it: the second one's were removed at the first's."""
    names = sorted(entry.name for entry in (two / "plain").iterdir())
    assert names == [
        "checkpoint-00000002", "checkpoint-00000004", "checkpoint-00000006", "metrics.jsonl"
    ]  # fmt: skip
    lines = (two / "plain" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_dropout_resumes_bit_for_bit_on_as_many_and_one_failing_ends_all(two):
    """Both at once, to start processes only once."""
    work_at(2, two / "dropout", two / "dropout resumed")
    done = torchrun(
        HERE / "two_processes.py", two, json.dumps(["dropout resumed", "failing"]), directory=two
    )
    (expected, told), (got, got_told) = found(two, "dropout"), found(two, "dropout resumed")
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
    assert told == got_told
    # Two masks, not one twice: another adapter than that of one process.
    alone, _ = worker.facts(*worker.lm(lora=worker.DROPOUT))
    assert max((got[key] - alone[key]).abs().max() for key in got) > 100 * ATOL
    assert done.returncode != 0
    assert done.stderr.count("error: the second process has had enough") == 1
    assert done.stderr.count("error: ") - done.stderr.count("exitcode") <= 1
    assert "another process of this run" not in done.stderr


class TestTheCommand:
    """``torchrun -m loraport train``."""

    def run(self, base, data, out, *more):
        command = ["-m", "loraport", "train", base, data, "-o", out, "--device", "cpu", *more]
        return torchrun(*command, directory=out.parent)

    def test_prints_once_and_writes_one_adapter(self, base_directory, chat_data, tmp_path):
        arguments = ("--steps", 3, "--rank", 2, "--json")
        done = self.run(base_directory, chat_data, tmp_path / "two", *arguments)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["steps"] == 3
        assert done.stderr.count("step 3/3") == 1
        assert sorted(entry.name for entry in tmp_path.glob("two*")) == ["two"]

        from safetensors.torch import load_file

        from loraport.training import train_language_model
        from loraport.training.options import TrainOptions

        options = TrainOptions(
            lora=worker.LoraOptions(rank=2), loop=worker.LoopOptions(steps=3, device="cpu")
        )
        alone = train_language_model(str(base_directory), chat_data, tmp_path / "one", options)
        assert summary["validation_loss"] == pytest.approx(alone.validation_loss, rel=1e-5)
        got, expected = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one")
        )
        assert_same(got, expected)

    def test_a_mistake_is_told_once(self, base_directory, chat_data, tmp_path):
        done = self.run(base_directory, chat_data, tmp_path / "out", "--targets", "q_prj")
        assert done.returncode != 0
        assert done.stderr.count("did you mean q_proj") == 1
        assert "another process" not in done.stderr
        assert not (tmp_path / "out").exists()


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with joined("cpu") as processes:
        assert processes == Processes(0, 1) == processes_now()
    assert processes.sums(1.5, 2.0) == [1.5, 2.0]
    assert processes.from_first(lambda: "x") == "x"
    assert processes.from_all(3) == [3]


@pytest.mark.parametrize("rank", ["0", "2", "x"], ids=["port taken", "no such rank", "no number"])
def test_processes_that_cannot_meet_say_so(rank, monkeypatch):
    """torch's own error ended it with a traceback, or it waited for ever."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        told = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LoraportError) as raised, joined("cpu"):
            pass
    got = ", ".join(f"{name}={value}" for name, value in told.items())
    assert str(raised.value).startswith("the processes of this run cannot meet: ")
    assert f"got {got}; start them with torchrun, with another --master-port" in str(raised.value)


@pytest.mark.parametrize(
    ("torchs", "ours"),
    [
        (
            "[gloo/transport/tcp/pair.cc:547] Connection closed by peer",
            "ended or cannot be reached",
        ),
        ("Timed out waiting 1800000ms for recv operation", "did not answer in time"),
    ],
)
def test_what_torch_says_of_another_process_is_said_in_our_words(torchs, ours, monkeypatch):
    def fail(_):
        raise RuntimeError(torchs)

    monkeypatch.setattr("loraport.training.distributed.processes.dist.all_reduce", fail)
    with pytest.raises(LoraportError) as raised:
        Processes(0, 2).wait()
    assert str(raised.value) == (
        f"another process of this run {ours}; look at what it said (torchrun tells which one "
        "failed first), then continue with --resume"
    )


def test_where_the_first_is_killed_another_tells_what_it_found(monkeypatch):
    """torchrun asks that one to end while it waits for the first to tell: it said that alone."""

    class Store:
        failed = 0

        def add(self, _, count):
            self.failed += count
            return self.failed

        def check(self, _):
            return False

    def asked_to_end(_):
        raise KeyboardInterrupt("stopped by SIGTERM")

    at = "loraport.training.distributed.processes."
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_ADDR", "x"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    store = Store()
    monkeypatch.setattr(at + "rendezvous", lambda _: iter([(store, 1, 2)]))
    monkeypatch.setattr(at + "dist.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(at + "time.sleep", asked_to_end)
    with pytest.raises(LoraportError, match=r"^another process of this run ended$"), joined("cpu"):
        raise LoraportError("another process of this run ended")
    with pytest.raises(SystemExit), joined("cpu"):  # which another has told by now
        raise LoraportError("another process of this run ended")


def test_a_command_that_shares_no_work_is_left_to_the_first(base_directory, chat_data, monkeypatch):
    """Of ``eval``, every process printed its own table, and one JSON document followed another."""
    typed = ("eval", base_directory, chat_data, "--generations", 0, "--json")
    said = {}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for size, rank in (("1", "0"), ("2", "0"), ("2", "1")):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("RANK", rank)
        said[size, rank] = command(*typed)
    code, alone = said["1", "0"]
    first = "the first of 2 processes that torchrun started"
    note = f"note: loraport eval is done by {first}; the others end"
    assert said["2", "0"] == (code, f"{note} {alone}")
    assert (code, "note: " in alone) == (0, False)
    assert said["2", "1"] == (0, f"note: loraport eval is left to {first}: this one ends")
    # Controls: what shares its work runs in all, and a cluster's own ranks end nothing.
    assert "Missing option -o" in command("train", base_directory, chat_data)[1]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert command(*typed) == (code, alone)


def test_every_process_has_as_many_batches_and_something_to_do():
    second = Processes(1, 3)
    batches = ["a", "b", "c", "d"]
    assert own_part(batches, batches, second) == ["b", Idle("a")]
    assert own_part(batches, batches, Processes(0, 3)) == ["a", "d"]
    with pytest.raises(LoraportError, match=r"accumulate: expected at least 3, .* got 2"):
        share(batches, second, accumulate=2)
    rows = worker.RowBatches(worker.rows(4), 2, 0, seed=None)
    shared = list(share(rows, second, accumulate=1).epoch(0))
    assert len(shared) == len(rows)
    assert all(isinstance(batch, Idle) for batch in list(share(rows, Processes(2, 3), 1).epoch(0)))
