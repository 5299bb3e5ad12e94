"""Sweeps on the workers of Ray: what one process finds, also when they are killed and stopped."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from warm_programs import WarmProgram

from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.sweep.options import Spread
from loraport.sweep.remote import Loaded
from loraport.sweep.spread import Cluster, _cluster, connect, require_same

pytest.importorskip("ray")

# Long enough to be killed in the midst of it.
GRID = ("--rank", "2,4,8", "--lr", "3e-3,1e-2", "--steps", "80", "--together", "2")
GRID += ("--device", "cpu", "--max-length", "32", "--validate-every", "40", "--keep-all", "--json")
PATIENCE = 240


class Run:
    """A command in a process group of its own, like one in a terminal.

    Its processes, and those they start, are known by a mark in their environment. Of ``loraport``
    its arguments alone are given, and it is a `WarmProgram`.
    """

    def __init__(self, directory, *command, **environment):
        self.mark = uuid.uuid4().hex
        directory.mkdir()
        self._out, self._err = directory / "stdout.log", directory / "stderr.log"
        # Ray's own warnings are not ours.
        environment = {"PYTHONWARNINGS": "ignore", "LORAPORT_TEST": self.mark} | environment
        others = {key: value for key, value in os.environ.items() if key[:4] != "RAY_"}
        environment = others | environment
        if command[0] == "sweep":
            self.process = WarmProgram(command, directory, environment=environment)
            return
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    def said(self):
        return self._err.read_text()

    def shown(self):
        return self._out.read_text()

    def wait(self):
        return self.process.wait(PATIENCE)

    def wait_for(self, what, there, running=True):
        until = time.monotonic() + PATIENCE
        while not there():
            assert not running or self.process.poll() is None, f"no {what}: {self.said()}"
            assert time.monotonic() < until, f"no {what}: {self.said()}"
            time.sleep(0.02)

    def processes(self, word=""):
        """Return process number → command line of those that live, its own but for the first."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if self.mark.encode() in (path / "environ").read_bytes() and word in line:
                    found[int(path.name)] = line
        found.pop(self.process.pid, None)
        return found

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        for number in (self.process.pid, *self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Begin commands; what is left of them is ended."""
    begun, logs = [], tmp_path_factory.mktemp("logs")

    def run(*command, **environment):
        begun.append(Run(logs / str(len(begun)), *command, **environment))
        return begun[-1]

    # Background jobs are told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield run
    signal.signal(signal.SIGINT, before)
    for each in reversed(begun):
        each.end()


@pytest.fixture(scope="module")
def sweep(start):
    def run(*arguments, home):
        """Sweep, with a home directory where Ray may keep its token."""
        home.mkdir(exist_ok=True)
        return start("sweep", *arguments, HOME=str(home))

    return run


class Machines:
    """A cluster of two machines with a core each, whose home directories are others."""

    def __init__(self, start, homes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.homes = f"127.0.0.1:{port}", homes
        self._start = start
        self._nodes = [self._node("one", "--head", f"--port={port}", "--include-dashboard=false")]

    def _node(self, name, *more):
        ray = (sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start")
        few = ("--block", "--num-cpus=1", "--num-gpus=0", "--disable-usage-stats")
        (self.homes / name).mkdir()
        return self._start(*ray, *more, *few, HOME=str(self.homes / name))

    def workers(self):
        """Return the processes in which workers of sweeps live."""
        return [number for node in self._nodes for number in node.processes("ray::RemoteWorker")]

    def wait(self):
        """Wait until both are there."""
        self._there()
        if len(self._nodes) == 1:
            self._nodes.append(self._node("two", f"--address={self.address}"))
            self._there()

    def _there(self):
        node = self._nodes[-1]
        node.wait_for("node", lambda: "Ray runtime started" in node.shown())


@pytest.fixture(scope="module")
def machines(start, tmp_path_factory):
    return Machines(start, tmp_path_factory.mktemp("homes"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_killed_stopped_and_resumed_a_spread_sweep_finds_what_one_process_finds(
    sweep, machines, tiny_base, data, tmp_path
):
    """All workers are killed once; Ctrl-C comes when some candidates are done."""
    few = (tiny_base, data, "-o", tmp_path / "out", *GRID)
    run = sweep(*few, "--ray", "local", "--workers", 2, home=tmp_path / "home")
    run.wait_for("step", lambda: "step 8/80" in run.said())
    killed = run.processes("ray::RemoteWorker")
    assert killed
    for process in killed:
        os.kill(process, signal.SIGKILL)
    others = run.processes("raylet")
    assert others
    for process in others:
        environment = Path(f"/proc/{process}/environ").read_bytes()
        assert b"RAY_USAGE_STATS_ENABLED=0" in environment  # no telemetry
    machines.wait()
    kept = tmp_path / "out.sweep" / "candidates"
    run.wait_for("candidate", lambda: list(kept.glob("*/outcome.json")))
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT
    assert "died while training r" in run.said()
    assert "continue with --resume" in run.said()
    assert run.said().endswith("stopped by SIGINT\n")
    assert "Traceback" not in run.said()
    assert not run.shown()
    assert not run.processes()
    done = len(list(kept.glob("*/outcome.json")))
    assert done in (2, 4)
    # On a cluster that runs already, and in one process.
    shutil.copytree(tmp_path / "out.sweep", tmp_path / "here.sweep")
    one = machines.homes / "one"
    resumed = sweep(*few, "--resume", "--ray", machines.address, home=one)
    here = run_here(tiny_base, data, "-o", tmp_path / "here", *GRID, "--resume")
    alone = run_here(tiny_base, data, "-o", tmp_path / "alone", *GRID)
    assert resumed.wait() == 0, resumed.said()
    # Two workers share two candidates; one process trains them together.
    for said, passes in ((resumed.said(), 2), (here.stderr, 3 - done // 2)):
        assert f"6 candidates, {done} finished before" in said
        assert len(re.findall("^training ", said, re.MULTILINE)) == passes
        assert said.count("step 80/80") == passes  # what was told last is not lost
    assert not (tmp_path / "out.sweep").exists()
    resumed.wait_for("end of workers", lambda: not machines.workers(), running=False)
    expected, *found = (
        {line["name"]: line for line in json.loads(shown)["candidates"]}
        for shown in (alone.stdout, resumed.shown(), here.stdout)
    )
    losses = sorted(line["validation_loss"] for line in expected.values())
    assert losses[-1] - losses[0] > 0.1 * losses[0]
    for out, lines in zip(("out", "here"), found, strict=True):
        require_equal(tmp_path / out, lines, tmp_path / "alone", expected)


def run_here(*arguments):
    from click.testing import CliRunner

    from loraport.cli.sweep import sweep

    result = CliRunner().invoke(sweep, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def require_equal(out, lines, true_out, true_lines):
    """In float32, on other numbers of threads, sums differ in their last digits."""
    from loraport.peft_layout import read_peft

    assert lines.keys() == true_lines.keys()
    for name, line in true_lines.items():
        assert lines[name]["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-4)
        one, true = (read_peft(each / "candidates" / name) for each in (out, true_out))
        assert one.base_fingerprint == true.base_fingerprint
        assert one.base_model == true.base_model
        assert one.modules.keys() == true.modules.keys()
        for path, module in one.modules.items():
            for letter in ("lora_A", "lora_B"):
                mine, theirs = getattr(module, letter), getattr(true.modules[path], letter)
                assert mine.sub(theirs).abs().le(1e-5 + 1e-3 * theirs.abs()).all(), name


def test_machines_with_other_bases_are_refused(sweep, machines, data, tmp_path):
    from tiny_llm import save_base

    machines.wait()
    for seed, name in enumerate(("one", "two")):
        save_base(machines.homes / name / "base", seed=seed)
    few = ("~/base", data, "-o", tmp_path / "out", *GRID, "--steps", 300)
    run = sweep(*few, "--ray", machines.address, home=machines.homes / "one")
    assert run.wait() == 2, run.said()
    assert "error: base ~/base on" in run.said()
    assert "give all machines the same files" in run.said()
    assert "Traceback" not in run.said()
    assert not (tmp_path / "out").exists()


def test_workers_do_not_add_to_candidates_of_another_base(
    sweep, machines, tiny_base, data, tmp_path
):
    from safetensors.torch import load_file, save_file

    from loraport.sweep.store import Store

    base = shutil.copytree(tiny_base, tmp_path / "base")
    few = (base, data, "-o", tmp_path / "out", "--rank", "2,4", "--lr", "1e-2", "--steps", "2")
    few = (*few, "--device", "cpu", "--apart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "add", added_once(Store.add))
        with pytest.raises(LoraportError, match="one is kept"):
            run_here(*few)
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    machines.wait()
    ray = ("--ray", machines.address, "--workers", 1)
    run = sweep(*few, "--resume", *ray, home=machines.homes / "one")
    assert run.wait() == 2, run.said()
    assert "candidate r2-" in run.said()
    assert "1 of 14 base weights differ" in run.said()
    assert not (tmp_path / "out").exists()


def added_once(add):
    """Return what keeps candidates as ``add`` does, then ends the sweep."""

    def once(store, trained):
        add(store, trained)
        raise LoraportError("one is kept")

    return once


def test_what_is_the_same():
    weights = BaseFingerprint({"a.weight": "1", "b.weight": "2"})
    first = Loaded("one", "1.0", weights)
    require_same(replace(first, machine="two"), first, "base")
    other = BaseFingerprint({"a.weight": "1", "b.weight": "3"})
    with pytest.raises(LoraportError, match=r"base BASE on two.* 1 of 2 tensors, b\.weight among"):
        require_same(Loaded("two", "1.0", other), first, "BASE")
    with pytest.raises(LoraportError, match=r"loraport on two: expected version 1\.0 as on one"):
        require_same(Loaded("two", "1.1", weights), first, "BASE")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "one for clients"),
        ("nonsense", "no HOST:PORT"),
    ],
)
def test_addresses_where_no_cluster_is(address, reason):
    """Ray alone would try for minutes."""
    with (
        pytest.raises(LoraportError, match=f"--ray {address}: expected .* got: .*{reason}"),
        connect(Spread(address), "cpu"),
    ):
        pass


def nodes(*counts):
    return [{"Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in counts]


def test_how_a_cluster_is_divided():
    several = nodes((8, 0), (4, 0))
    assert _cluster(several, Spread("auto"), "auto") == Cluster(2, cpus=4, gpus=0)
    assert _cluster(several, Spread("auto", 3), "auto") == Cluster(3, cpus=2, gpus=0)
    assert _cluster(nodes((8, 2), (8, 4)), Spread("auto"), "auto") == Cluster(6, cpus=1, gpus=1)
    assert _cluster(nodes((8, 2)), Spread("auto", 1), "cuda") == Cluster(1, cpus=1, gpus=1)
    assert _cluster(nodes((8, 2)), Spread("auto"), "cpu") == Cluster(1, cpus=8, gpus=0)
    with pytest.raises(LoraportError, match="at most 0, for so many GPUs"):
        _cluster(several, Spread("auto"), "cuda")
    with pytest.raises(LoraportError, match="at most 8, for so many cores"):
        _cluster(several, Spread("auto", 9), "cpu")
    with pytest.raises(LoraportError, match="workers: expected at least 1"):
        Spread("auto", 0)


def test_workers_without_ray(data, tmp_path):
    from click.testing import CliRunner

    from loraport.cli.sweep import sweep

    few = ["base", str(data), "-o", str(tmp_path / "out"), "--workers", "2"]
    result = CliRunner().invoke(sweep, few)
    assert result.exit_code == 2
    assert "--workers is for --ray" in result.output


def test_without_ray(monkeypatch, tiny_base, data, tmp_path):
    from loraport.sweep.options import SweepOptions
    from loraport.sweep.run import run_sweep

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LoraportError, match=r"pip install 'loraport\[ray\]'"):
        run_sweep(str(tiny_base), data, tmp_path / "out", SweepOptions(spread=Spread()))


def test_halved_on_workers_as_in_one_process(sweep, machines, tiny_base, data, tmp_path):
    """Candidates go on in other company, on other workers than those they began on."""
    machines.wait()
    few = (tiny_base, data, *GRID, "--halving", "2")
    spread = sweep(
        *few, "-o", tmp_path / "out", "--ray", machines.address, home=machines.homes / "one"
    )
    alone = run_here(*few, "-o", tmp_path / "alone")
    assert spread.wait() == 0, spread.said()
    expected, found = (
        {line["name"]: line for line in json.loads(shown)["candidates"]}
        for shown in (alone.stdout, spread.shown())
    )
    ends = {name: line["ended"][:7] for name, line in expected.items()}
    assert sorted(ends.values()) == ["", "", "step 20", "step 20", "step 20", "step 40"]
    assert {name: line["ended"][:7] for name, line in found.items()} == ends
    assert spread.said().count("from step 20") == 2
    require_equal(tmp_path / "out", found, tmp_path / "alone", expected)
