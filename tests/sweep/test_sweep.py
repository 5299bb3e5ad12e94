"""``loraport sweep`` on a tiny Llama: the same results together and apart, resumed and not."""

import errno
import json
import os
import re
import shutil
import signal
import time

import pytest
from click.testing import CliRunner
from warm_programs import WarmProgram, run_program

from loraport.cli.sweep import sweep
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft

GRID = ("--rank", "2,4,8", "--lr", "3e-3,1e-2", "--targets", "all-linear", "--targets")
GRID += ("q_proj,v_proj", "--epochs", 2, "--device", "cpu", "--max-length", 32)


def run(*arguments, code=0):
    result = CliRunner().invoke(sweep, [str(each) for each in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_together_and_apart_agree(tiny_base, data, tmp_path):
    """In float32 the order of sums differs, by far less than what sets candidates apart."""
    found = {}
    for mode in ("--together=16", "--apart"):
        out = tmp_path / mode.strip("-")
        found[mode] = json.loads(run(tiny_base, data, "-o", out, *GRID, mode, "--json").stdout)
        for name in ("results.json", "results.csv", "quality.png", "quality.svg"):
            assert (out / name).stat().st_size
        assert read_peft(out).modules
        assert not out.with_name(f"{out.name}.sweep").exists()
    one, other = ({c["name"]: c for c in f["candidates"]} for f in found.values())
    assert len(one) == 12
    for name, line in one.items():
        for key in ("validation_loss", "training_loss"):
            assert line[key] == pytest.approx(other[name][key], rel=1e-4), name
    losses = sorted(line["validation_loss"] for line in one.values())
    assert losses[-1] - losses[0] > 1e-3 * losses[0]


def test_a_stopped_sweep_does_not_train_again(tiny_base, data, tmp_path, monkeypatch):
    from loraport.sweep import worker

    trained = []
    real = worker.Worker.train

    def train(self, trials, *more):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(trials)
        return real(self, trials, *more)

    monkeypatch.setattr(worker.Worker, "train", train)
    few = (tiny_base, data, "-o", tmp_path / "out", "--rank", "2,4", "--steps", 2, "--together", 1)
    assert CliRunner().invoke(sweep, [str(each) for each in few]).exit_code
    assert not (tmp_path / "out").exists()
    trained.clear()
    shown = run(*few, "--resume")
    assert len(trained) == 2
    assert "take r" in shown.stdout
    assert "4 candidates, 2 finished before" in shown.stderr


def test_a_cpu_gets_no_more_in_one_pass_than_makes_it_faster(tiny_base, write_jsonl, tmp_path):
    long = write_jsonl([{"text": f"{n} red green blue grey" * 20} for n in range(17)])
    few = (tiny_base, long, "--rank", "2,4", "--steps", 1, "--device", "cpu", "--max-length", 64)
    for rows, more, passes in ((16, (), 4), (2, (), 1), (16, ("--together", 4), 1)):
        out = ("-o", tmp_path / f"{rows}{len(more)}", "--batch-size", rows)
        shown = run(*few, *out, *more)
        assert f"4 candidates, 0 finished before; passes to train: {passes}\n" in shown.stderr


def test_bad_values(tiny_base, data, tmp_path):
    out = ("-o", tmp_path / "out")
    shown = run(tiny_base, data, *out, "--rank", "four", code=2)
    assert "expected numbers separated by commas, got 'four'" in shown.output
    for more, reason in (
        (("--rank", "0"), "rank: expected at least 1"),
        (("--validation-share", "0"), "give --validation"),
        (("--targets", "nonsense"), "nonsense"),
        (("--together", "0"), "together: expected at least 1"),
    ):
        with pytest.raises(LoraportError, match=reason):
            run(tiny_base, data, *out, "--force", *more)
        assert not (tmp_path / "out").exists()


def test_a_sweep_that_failed_before_its_first_step_leaves_nothing_to_resume(
    tiny_base, data, tmp_path, monkeypatch
):
    """With the name put right, the same command trains. Control: what was kept stays kept."""
    few = (tiny_base, data, "-o", tmp_path / "out", "--rank", 2, "--steps", 1, "--device", "cpu")
    for _ in range(2):
        with pytest.raises(LoraportError, match="targets 'q_prj'"):
            run(*few, "--targets", "q_prj")
        assert list(tmp_path.iterdir()) == [data]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("loraport.sweep.run.write_result", full)
    with pytest.raises(LoraportError, match="keeps what was trained"):
        run(*few, "--targets", "q_proj")
    with pytest.raises(LoraportError, match="targets 'q_prj'"):
        run(*few, "--targets", "q_prj", "--resume")
    assert len(list(tmp_path.glob("out.sweep/candidates/*/outcome.json"))) == 2


def test_what_cannot_be_recorded_is_refused_before_an_unfinished_sweep_is_discarded(
    tiny_base, data, tmp_path
):
    unfinished = tmp_path / "out.sweep/kept"
    unfinished.parent.mkdir()
    unfinished.write_text("of hours")
    arguments = [str(tiny_base), str(data), "-o", str(tmp_path / "out"), "--device", "cpu"]
    result = CliRunner().invoke(sweep, [*arguments, "--cuda-graphs", "--force"])
    assert isinstance(result.exception, LoraportError)
    assert "--cuda-graphs: expected a CUDA GPU, got cpu" in str(result.exception)
    assert unfinished.read_text() == "of hours"


@pytest.mark.usefixtures("interruptible")
def test_stopped_or_killed_in_the_midst_of_a_pass_it_goes_on(tiny_base, data, tmp_path):
    """A signal loses no step, `kill -9` those since the last time candidates were kept."""

    def command(out):
        few = ["--rank", "2,4", "--lr", "3e-3,1e-2", "--steps", 40, "--save-every", 5]
        few += ["--together", 4, "--max-length", 32, "--keep-all", "--json", "--resume"]
        return ["sweep", tiny_base, data, *few, "-o", tmp_path / out]

    whole = run_program(command("whole"), tmp_path)
    assert whole.poll() == 0, whole.stderr
    true = json.loads(whole.stdout)
    seen = 0
    for number, at in ((signal.SIGINT, 4), (signal.SIGKILL, 24)):
        process = WarmProgram(command("out"), tmp_path)
        while process.poll() is None and f"\nstep {at}/40" not in process.stderr:
            time.sleep(0.002)
        process.send_signal(number)
        code, said = process.wait(), process.stderr
        require_goes_on(said, seen)
        seen = at
        if number is signal.SIGKILL:
            assert code == -number
            continue
        assert code == 128 + number, said
        assert "continue with --resume" in said
        assert said.endswith(f"stopped by {number.name}\n")
        assert not (tmp_path / "out").exists()
    resumed = run_program(command("out"), tmp_path)
    assert resumed.poll() == 0, resumed.stderr
    require_goes_on(resumed.stderr, seen - 4)  # kept every five steps, last after 20
    found = json.loads(resumed.stdout)
    assert found["candidates"] == true["candidates"]
    for line in true["candidates"]:
        files = (tmp_path / out / "candidates" / line["name"] for out in ("whole", "out"))
        one, other = ((path / "adapter_model.safetensors").read_bytes() for path in files)
        assert one == other


def require_goes_on(said, seen):
    """The one pass there is goes on after a step that was seen before, or a later one."""
    steps = [int(step) for step in re.findall(r"from step (\d+)\n", said)]
    assert not steps if not seen else seen <= steps[0] < 40, said


def test_a_full_disk_loses_nothing_that_was_kept(tiny_base, data, tmp_path, monkeypatch):
    from loraport.sweep import store

    few = (tiny_base, data, "--rank", "2,4", "--steps", 9, "--save-every", 2, "--device", "cpu")
    few = (*few, "--max-length", 32, "--keep-all", "--json")
    whole = json.loads(run(*few, "-o", tmp_path / "whole").stdout)
    real, room = store.save_contents, 10

    def full(directory, *more):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        real(directory, *more)

    monkeypatch.setattr(store, "save_contents", full)
    out = tmp_path / "out"
    with pytest.raises(LoraportError, match=r"No space left on device; .* kept; .*--resume"):
        run(*few, "-o", out)
    room = 7  # of ten that are left to write
    with pytest.raises(LoraportError, match=r"No space left on device; .* kept; .*--resume"):
        run(*few, "-o", out, "--resume")
    monkeypatch.undo()
    resumed = run(*few, "-o", out, "--resume")
    assert re.search(r"from step [468]\n", resumed.stderr)
    assert json.loads(resumed.stdout)["candidates"] == whole["candidates"]


def test_activations_computed_again_after_a_resume_change_nothing(
    tiny_base, data, tmp_path, monkeypatch
):
    few = (tiny_base, data, "--rank", "2,4", "--steps", 6, "--save-every", 2, "--device", "cpu")
    few = (*few, "--max-length", 32, "--keep-all", "--json")
    whole = json.loads(run(*few, "-o", tmp_path / "whole").stdout)
    calls, out = [], tmp_path / "out"
    from loraport.sweep import store

    real = store.Store.add

    def stopping(self, trained):
        real(self, trained)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "add", stopping)
        with pytest.raises((KeyboardInterrupt, AssertionError)):
            run(*few, "-o", out)
    assert calls
    resumed = run(*few, "-o", out, "--resume", "--gradient-checkpointing")
    assert "from step 2" in resumed.stderr
    assert json.loads(resumed.stdout)["candidates"] == whole["candidates"]


def test_candidates_of_two_bases_are_not_compared(tiny_base, data, tmp_path, monkeypatch):
    """The one that ended adapts other modules than the one that is left."""
    from safetensors.torch import load_file, save_file

    from loraport.sweep import worker

    base = shutil.copytree(tiny_base, tmp_path / "base")
    few = (base, data, "-o", tmp_path / "out", "--rank", "2", "--lr", "1e-2", "--steps", 2)
    few = (*few, "--targets", "q_proj", "--targets", "v_proj", "--apart", "--device", "cpu")
    real, trained = worker.Worker.train, []

    def train(self, trials, *more):
        if trained:
            raise KeyboardInterrupt
        trained.append(trials)
        return real(self, trials, *more)

    monkeypatch.setattr(worker.Worker, "train", train)
    assert CliRunner().invoke(sweep, [str(each) for each in few]).exit_code
    monkeypatch.undo()
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(LoraportError, match=r"candidate r2-.*1 of 2 base weights differ"):
        run(*few, "--resume")
    assert not (tmp_path / "out").exists()
    save_file(tensors, weights, {"format": "pt"})
    assert "2 candidates, 1 finished before" in run(*few, "--resume").stderr


def test_on_another_base_it_does_not_go_on(tiny_base, data, tmp_path, monkeypatch):
    """Control: the same base by another spelling of its path."""
    from safetensors.torch import load_file, save_file

    from loraport.sweep import store

    base = shutil.copytree(tiny_base, tmp_path / "base")
    few = (base, data, "-o", tmp_path / "out", "--rank", "2", "--steps", 6, "--save-every", 2)
    real, kept = store.Store.add, []

    def add(self, trained):
        if kept:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, trained)
        kept.append(trained)

    monkeypatch.setattr(store.Store, "add", add)
    with pytest.raises(LoraportError, match="--resume"):
        run(*few)
    monkeypatch.undo()
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(LoraportError, match=r"candidate r2-.*the base at hand"):
        run(*few, "--resume")
    assert not (tmp_path / "out").exists()
    save_file(tensors, weights, {"format": "pt"})
    assert "from step 2" in run(f"{tmp_path}/./base/", *few[1:], "--resume").stderr


def test_a_finished_sweep_is_what_it_was(tiny_base, data, tmp_path, monkeypatch):
    """As where it was killed when its result stood, before what it kept was removed."""
    from safetensors.torch import load_file, save_file

    from loraport.sweep import run as sweep_run

    base, out = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "out"
    few = (base, data, "-o", out, "--rank", "2", "--lr", "1e-2,1e-3", "--device", "cpu", "--json")

    write = sweep_run.write_result

    def killed(*arguments, **options):
        write(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_run, "write_result", killed)
    assert CliRunner().invoke(sweep, [str(each) for each in (*few, "--steps", 2)]).exit_code
    monkeypatch.undo()
    work, before = tmp_path / "out.sweep", {path: path.read_bytes() for path in out.iterdir()}
    assert work.is_dir()
    with pytest.raises(LoraportError, match=r"cannot resume from .*\n  - steps: expected 2, got 3"):
        run(*few, "--steps", 3, "--resume")
    with pytest.raises(LoraportError, match=r"same candidates, .* one that differs in r2-.*lr0.1;"):
        run(*few, "--lr", "1e-2,1e-3,1e-1", "--steps", 2, "--resume")
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(LoraportError, match="the base at hand"):
        run(*few, "--steps", 2, "--resume")
    assert work.is_dir()
    save_file(tensors, weights, {"format": "pt"})
    shown = json.loads(run(*few, "--steps", 2, "--resume").stdout)
    assert shown == json.loads(before[out / "results.json"])
    assert not work.exists()
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "sweep.json").unlink()
    with pytest.raises(LoraportError, match="already exists and is not a sweep's result"):
        run(*few, "--steps", 2, "--resume")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signals", [1, 2])
def test_stopped_while_its_result_is_written_it_is_complete(
    tiny_base, data, tmp_path, monkeypatch, capsys, signals
):
    """Python itself ignores an interrupt where objects are removed, as here; a second one stops."""
    from loraport.cli import main
    from loraport.sweep import output

    class Removed:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    out, draw, drawn = tmp_path / "out", output.draw_quality, []

    def interrupted(result, path):
        drawn.append(path)
        if len(drawn) == 1:
            Removed()
        elif signals == 2:
            signal.raise_signal(signal.SIGINT)
        draw(result, path)

    monkeypatch.setattr(output, "draw_quality", interrupted)
    few = ("--rank", "2", "--lr", "1e-2", "--steps", 2, "--device", "cpu", "--max-length", 32)
    with pytest.raises(SystemExit) as ended:
        main([str(each) for each in ("sweep", tiny_base, data, "-o", out, *few)])
    said = capsys.readouterr().err
    assert ended.value.code == 128 + signal.SIGINT, said
    assert said.endswith("stopped by SIGINT\n")
    assert out.exists() == (signals == 1) != (tmp_path / "out.sweep").exists()
    if signals == 1:
        assert f"{out} is complete" in said
        assert read_peft(out).modules
        assert all((out / name).stat().st_size for name in ("quality.png", "quality.svg"))
    else:
        assert "continue with --resume" in said


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_a_damaged_identity_is_named(tmp_path, content):
    """Control: the identity that was written."""
    from loraport.sweep.store import Store

    Store(tmp_path, {"seed": 0})
    Store(tmp_path, {"seed": 0})
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(LoraportError, match=r"sweep.json: expected what .* start anew with --for"):
        Store(tmp_path, {"seed": 0})


SOUND = {
    "losses": [[1, 2.0], [2, 1]],
    "validations": [[0, 3.0], [2, 2.5]],
    "best": [2, 2.5],
    "row_losses": [4.0, 1.0],
    "row_weights": [1, 1],
    "ended": "",
    "failed": False,
    "steps": 2,
    "paused": False,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("losses", [["1", 2.0]]),
        ("losses", [[1, None]]),
        ("losses", [[2, 1.0], [1, 2.0]]),
        ("validations", [[0, "3"], [2, 2.5]]),
        ("best", [1, 2.5]),
        ("best", []),
        ("row_losses", [4.0, "x"]),
        ("row_losses", [4.0]),
        ("row_weights", [1, 1.5]),
        ("ended", None),
        ("failed", "no"),
        ("steps", True),
        ("paused", 0),
        (None, [SOUND]),
    ],
)
def test_a_damaged_outcome_is_named(tmp_path, key, value):
    """Control: the same, sound."""
    from loraport.sweep.store import Store
    from loraport.sweep.trial import Outcome, Trial
    from loraport.sweep.worker import Trained
    from loraport.training import LoraOptions

    trial = Trial("r2", LoraOptions(rank=2), 1e-3)
    store = Store(tmp_path, {"seed": 0})
    store.add([Trained(trial, Outcome("r2"), None)])
    (path,) = tmp_path.glob("candidates/*/outcome.json")
    path.write_text(json.dumps(SOUND))
    assert store.outcomes([trial])["r2"].best == (2, 2.5)
    path.write_text(json.dumps(value if key is None else SOUND | {key: value}))
    with pytest.raises(LoraportError, match=r"expected what loraport wrote, got .* remove this"):
        store.outcomes([trial])
