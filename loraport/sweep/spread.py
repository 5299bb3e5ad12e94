"""Spread a sweep over processes and machines with Ray."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError
from loraport.sweep.observer import SweepObserver
from loraport.sweep.options import Spread
from loraport.sweep.remote import Event, Loaded, RemoteWorker
from loraport.sweep.rounds import Group, Passes
from loraport.sweep.store import Store
from loraport.sweep.trial import Trial
from loraport.sweep.worker import Setting, Trained
from loraport.training.run.interruption import Stopped, stop_requests

# Seconds: between looks at the workers; until a wait is explained; to reach a cluster.
_POLL, _PATIENCE, _REACH = 0.2, 30.0, 5.0
_LIVES = 2  # workers that may die of one group, or one after the other while they load


@dataclass(frozen=True)
class Cluster:
    """Workers that Ray can give.

    Attributes:
        workers: How many.
        cpus: Cores of each.
        gpus: GPUs of each: 1 or 0.
        lasting: Whether Ray is used on afterwards, so that workers have to be ended one by one.
    """

    workers: int
    cpus: int
    gpus: int
    lasting: bool = False

    @contextmanager
    def hired(
        self, setting: Setting, trials: Sequence[Trial], observer: SweepObserver
    ) -> Iterator[Hired]:
        """Let workers train groups; they keep the base from one round to the next.

        Args:
            setting: What the candidates share.
            trials: All candidates.
            observer: Told what happens on all workers.
        """
        import ray

        # A worker's process sees no GPU but its own.
        device = "cuda" if self.gpus else setting.options.loop.device
        loop = replace(setting.options.loop, device=device)
        path = Path(setting.base)
        there = replace(
            setting,
            # Another process may have another working directory.
            base=str(path.resolve()) if path.exists() else setting.base,
            options=replace(setting.options, loop=loop),
        )
        make = ray.remote(
            num_cpus=self.cpus,
            num_gpus=self.gpus,
            max_concurrency=2,  # one trains, one says what happened
            scheduling_strategy="SPREAD",
        )(RemoteWorker)
        shared = ray.put((there, tuple(trials)))
        hired = Hired(partial(_Hand, make, shared), self.workers, trials, observer, setting.base)
        try:
            yield hired
        finally:
            if self.lasting:
                hired.end()


class _Hand:
    """A worker of the sweep: the process it has now, and what that does.

    Attributes:
        call: What it was asked for and has not answered; ``None`` while it is idle.
        group: What it trains; empty while it loads the base.
        deaths: Of its processes while they loaded, one after the other.
    """

    def __init__(self, make: Any, shared: Any) -> None:
        self._make = make
        self._shared = shared
        self.deaths = 0
        self.start()

    def start(self) -> None:
        """Start a process, which loads the base."""
        self._actor = self._make.remote(self._shared)
        self.call: Any = self._actor.load.remote()
        self.group: Group = ()
        self._asked: Any = None

    def train(self, group: Group, until: float, starts: Mapping[str, Trained]) -> None:
        """Train a group."""
        self.group, self.call = group, self._actor.train.remote(group, until, starts)

    def told(self, *, wait: bool = False) -> list[Event]:
        """Return what happened on it; with ``wait``, until now."""
        import ray

        if self._asked is None:
            if wait:
                return []
            self._asked = self._actor.told.remote()
        ready, _ = ray.wait([self._asked], timeout=None if wait else 0)
        if not ready:
            return []
        asked, self._asked = self._asked, None
        try:
            found: list[Event] = ray.get(asked)
        except ray.exceptions.RayError:  # its process is dead, as the call says too
            return []
        return found

    def end(self) -> None:
        """End its process."""
        import ray

        with suppress(Exception):  # Ray may be gone already
            ray.kill(self._actor)


class Hired:
    """Workers to whom groups are handed out; as many are started as there is work for.

    Args:
        start: Starts one.
        workers: How many at most.
        trials: All candidates.
        observer: Told what happens on all of them.
        base: The base as it was named.
    """

    def __init__(
        self,
        start: Callable[[], _Hand],
        workers: int,
        trials: Sequence[Trial],
        observer: SweepObserver,
        base: str,
    ) -> None:
        self._start = start
        self._workers = workers
        self._trials = trials
        self._hands: list[_Hand] = []
        self._waiting: deque[Group] = deque()
        self._observer = observer
        self._base = base
        self._first: Loaded | None = None
        self._noted: set[str] = set()
        self._deaths: Counter[str] = Counter()  # by the names of what was trained
        self._impatient_at = time.monotonic() + _PATIENCE

    def passes(self, groups: Sequence[Group], until: float, store: Store) -> Passes:
        """Train groups, each on the next worker that is free; yield them as they end.

        A worker whose process dies is started again, and its group is trained anew.

        Args:
            groups: Candidates of each pass, all after the same step.
            until: Share of the steps.
            store: Where candidates that paused are.

        Raises:
            LoraportError: If a worker cannot load the base or has other weights than the first
                or than what is in the store was trained on, or if two die of one group.
            Stopped: After SIGINT, SIGTERM or SIGHUP.
        """
        self._waiting.extend(groups)
        while len(self._hands) < min(self._workers, len(groups)):
            self._hands.append(self._start())
        with stop_requests() as request:
            for group, found in self._dealt(until, store):
                if found is not None:
                    yield group, [_renamed(done, self._base) for done in found]
                if request.signal_number is not None:
                    raise Stopped(request.signal_number)

    def end(self) -> None:
        """End all workers."""
        for hand in self._hands:
            hand.end()

    def _dealt(self, until: float, store: Store) -> Iterator[tuple[Group, list[Trained] | None]]:
        """Yield every group that ended, and now and then nothing, so that it can be stopped."""
        import ray

        while self._waiting or any(hand.group for hand in self._hands):
            for hand in self._hands:
                if hand.call is None and self._waiting:
                    group = self._waiting.popleft()
                    hand.train(group, until, store.starts(group))
            called = [hand.call for hand in self._hands if hand.call is not None]
            ready, _ = ray.wait(called, timeout=_POLL)
            self._explain_wait()
            for hand in self._hands:
                if hand.group and hand.call not in ready:
                    self._tell(hand.told())
            for hand in self._hands:
                if hand.call is not None and hand.call in ready:
                    group, found = self._answered(hand, store)
                    if found is not None:
                        yield group, found
            yield (), None

    def _answered(self, hand: _Hand, store: Store) -> tuple[Group, list[Trained] | None]:
        import ray

        group = hand.group
        try:
            answer = ray.get(hand.call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, LoraportError):
                raise error.cause from None
            if isinstance(error.cause, ImportError):
                raise LoraportError(f"a worker of the sweep: {error.cause}") from error
            raise
        except ray.exceptions.RayError as error:
            self._died(hand, error)
            return group, None
        hand.call, hand.group = None, ()
        if isinstance(answer, Loaded):
            hand.deaths = 0
            if self._first is None:
                self._first = answer
                store.require_base(self._trials, answer.weights)
            require_same(answer, self._first, self._base)
            return group, None
        found, told = answer
        self._tell([*hand.told(wait=True), *told])
        return group, found

    def _died(self, hand: _Hand, error: Exception) -> None:
        """Start a worker again whose process died; its group waits for the next that is free."""
        names = ", ".join(trial.name for trial in hand.group)
        if names:
            self._deaths[names] += 1
            self._waiting.appendleft(hand.group)
        else:
            hand.deaths += 1
        during = f"training {names}" if names else "loading"
        died = f"a worker of the sweep died while {during}: {_reason(error)}"
        if max(hand.deaths, self._deaths[names]) >= _LIVES:
            memory = "; if memory ran out, lower --together or --batch-size" if names else ""
            raise LoraportError(
                f"{died}; the one before it too{memory}; candidates that were finished are kept: "
                "continue with --resume"
            ) from error
        self._observer.note(f"{died}; another is started")
        hand.end()
        hand.start()

    def _explain_wait(self) -> None:
        if self._first is None and time.monotonic() > self._impatient_at:
            self._observer.note(
                "no worker is ready yet: they load the base, or wait for cores or GPUs of the "
                "Ray cluster that others use"
            )
            self._impatient_at = float("inf")

    def _tell(self, events: Iterable[Event]) -> None:
        for name, told in events:  # of which all workers note some, of the base
            if name != "note" or told["text"] not in self._noted:
                getattr(self._observer, name)(**told)
            self._noted.add(told.get("text", ""))


def require_same(loaded: Loaded, first: Loaded, base: str) -> None:
    """Refuse a worker that would train something else than the first.

    Args:
        loaded: What the worker has.
        first: What the first had.
        base: The base as it was named.

    Raises:
        LoraportError: If its version of loraport or any weight of its base is another.
    """
    if loaded.version != first.version:
        raise LoraportError(
            f"loraport on {loaded.machine}: expected version {first.version} as on "
            f"{first.machine}, got {loaded.version}; install the same on all machines"
        )
    mine, theirs = loaded.weights.modules, first.weights.modules
    differing = sorted(
        name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)
    )
    if differing:
        raise LoraportError(
            f"base {base} on {loaded.machine}: expected the weights it has on {first.machine}, got "
            f"others in {len(differing)} of {len(theirs)} tensors, {differing[0]} among them; "
            "give all machines the same files"
        )


@contextmanager
def connect(spread: Spread, device: str) -> Iterator[Cluster]:
    """Join a Ray cluster, or start Ray here, and say what it can give.

    Args:
        spread: Which cluster, and how many workers.
        device: As for training: ``auto`` takes GPUs where the cluster has any.

    Raises:
        LoraportError: If Ray is not installed, the cluster cannot be reached, or it has not enough
            GPUs or cores.
    """
    # Before Ray is imported: no telemetry unless it is asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise LoraportError(
            f"--ray: expected the package ray, got {error}; pip install 'loraport[ray]'"
        ) from error
    ours = not ray.is_initialized()
    try:
        if ours:
            _init(spread.address)
        found = _cluster([node for node in ray.nodes() if node["Alive"]], spread, device)
        yield replace(found, lasting=not ours)
    finally:
        if ours:
            ray.shutdown()


def _init(address: str) -> None:
    import ray

    where: dict[str, Any] = {"address": address}
    if address == "local":
        where["include_dashboard"] = False
    try:
        if address not in ("auto", "local"):
            _require_reachable(address)
        ray.init(**where, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise LoraportError(
            f"--ray {address}: expected the address of a Ray cluster that runs (HOST:PORT, or auto "
            f"for the one this machine belongs to), or local, got: {error}; if the cluster wants a "
            "token, set RAY_AUTH_MODE=token"
        ) from error


def _require_reachable(address: str) -> None:
    """Find out at once what Ray would find out after minutes."""
    if "://" in address:
        raise ValueError("one for clients; run the sweep on a machine of the cluster")
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError("no HOST:PORT")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH).close()


def _cluster(nodes: Sequence[dict[str, Any]], spread: Spread, device: str) -> Cluster:
    """Divide what the nodes have: one GPU a worker, or the cores of a node among its workers."""
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    if device.startswith("cuda") or (device == "auto" and gpus):
        _require(spread.workers or 1, gpus, "GPUs")
        return Cluster(spread.workers or gpus, cpus=1, gpus=1)
    cores = [count for node in nodes if (count := int(node["Resources"].get("CPU", 0)))]
    workers = spread.workers or max(1, len(cores))
    _require(workers, min(cores, default=0) * len(cores), "cores")
    return Cluster(workers, cpus=min(cores) // -(-workers // len(cores)), gpus=0)


def _require(workers: int, found: int, what: str) -> None:
    if workers > found:
        raise LoraportError(
            f"--workers: expected at most {found}, for so many {what} has the Ray cluster, got "
            f"{workers}"
        )


def _reason(error: Exception) -> str:
    """Return the sentence of Ray's report that says why a process died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of an actor's the end is worth reading: a fact, or the end of a traceback.
    line = lines[-1] if lines[0].startswith("The actor died") else lines[0]
    return line.removeprefix("The actor is dead because ").split(". ")[0].rstrip(".")


def _renamed(done: Trained, base: str) -> Trained:
    if done.adapter is None:
        return done
    return replace(done, adapter=replace(done.adapter, base_model=base))
