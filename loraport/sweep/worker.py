"""Train groups of candidates on one base: what a sweep does in this process or in another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from loraport.adapter import Adapter
from loraport.base.loading import fingerprint_model
from loraport.errors import LoraportError, Problems
from loraport.fingerprint import BaseFingerprint, fingerprint
from loraport.peft_layout.misread import misread_by_peft
from loraport.sweep.groups import halves
from loraport.sweep.isolation import RowsMixedError
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.observer import SilentSweep, SweepObserver
from loraport.sweep.together import train_together
from loraport.sweep.trial import Outcome, Trial
from loraport.training.base.frozen_base import checkpoint_activations, load_base
from loraport.training.data.batches import Row
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement
from loraport.training.distributed.stream import EpochBatches
from loraport.training.kernels.cuda_graphs import (
    NOT_RECORDED,
    asked_to_record,
    why_not_recorded,
)
from loraport.training.kernels.recorder import on_gpu
from loraport.training.kernels.row_attention import use_row_attention
from loraport.training.lora.full_rank import above_full_rank
from loraport.training.lora.targets import select_targets
from loraport.training.options import TrainOptions
from loraport.training.run.checkpoints import RunState
from loraport.training.run.faults import MemoryRanOutError, faults_explained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = "what was trained before is kept"


@dataclass(frozen=True)
class Setting:
    """What all candidates of a sweep share; goes to other processes as it is.

    Attributes:
        base: As `loraport.base.finding.resolve_base` takes it.
        train: Training rows.
        validation: Held-out rows.
        pad: Token id to pad with.
        length: Tokens of a row at most.
        options: How to train.
    """

    base: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    pad: int
    length: int
    options: TrainOptions

    def batches(
        self, model: nn.Module, *, few_lengths: bool = False
    ) -> tuple[EpochBatches, EpochBatches]:
        """Return batches to train on and to validate with, as ``loraport train`` has them.

        Args:
            model: The model they are for.
            few_lengths: Train on few shapes, which are recorded.
        """

        def batches(rows: tuple[Row, ...], seed: int | None) -> EpochBatches:
            return make_batches(
                model,
                rows,
                self.options.batch_size,
                self.pad,
                seed,
                packing=self.options.packing,
                max_length=self.length,
                few_lengths=few_lengths and seed is not None,
            )

        return batches(self.train, self.options.loop.seed), batches(self.validation, None)


@dataclass(frozen=True, eq=False)
class Trained:
    """A candidate that was trained, to its end or until it paused.

    Attributes:
        trial: What it was.
        outcome: What came of it, but for matrices and state.
        adapter: Those matrices; ``None`` if it failed before it could be measured.
        state: Where it paused; ``None`` if it ended.
    """

    trial: Trial
    outcome: Outcome
    adapter: Adapter | None
    state: RunState | None = None


# Puts candidates where they outlast the process.
Keep = Callable[[Sequence[Trained]], None]


class Worker:
    """A base in memory, on which groups of candidates train one after the other.

    Args:
        setting: What they share.
        trials: All candidates of the sweep, so that a bad one is known before any is trained.
        observer: Told what happens.

    Attributes:
        adapted: Fingerprint of the modules that any candidate adapts.

    Raises:
        LoraportError: If the base cannot be loaded or a candidate's modules cannot be selected.
    """

    def __init__(
        self, setting: Setting, trials: Sequence[Trial], observer: SweepObserver | None = None
    ) -> None:
        self._setting = setting
        self._observer = observer or SilentSweep()
        loop, asked = setting.options.loop, setting.options.cuda_graphs
        self._placement = choose_placement(loop.device, loop.dtype)
        recorded = asked_to_record(self._placement.device, setting.options)
        with faults_explained(lambda: f"loading {setting.base}", lambda: _KEPT):
            device = str(self._placement.device)
            self._model: PreTrainedModel = load_base(setting.base, self._placement, device)
        selected = _select_targets(self._model, trials)
        misread = misread_by_peft(self._model.config.model_type, selected)
        ranks = above_full_rank(self._model, [trial.lora for trial in trials])
        for said in filter(None, (ranks, misread)):
            self._observer.note(said)
        if setting.options.gradient_checkpointing:
            checkpoint_activations(self._model)
        longest = max(len(row.tokens) for row in setting.train)
        if recorded and (reason := why_not_recorded(self._model, longest)):
            if asked:
                raise LoraportError(f"--cuda-graphs: {reason}; use --no-cuda-graphs")
            recorded = False
            self._observer.note(f"{NOT_RECORDED} {reason}")
        self._recorder = on_gpu(self._model) if recorded else None
        if recorded:
            use_row_attention(self._model, self._placement, longest)
        self.adapted = fingerprint_model(self._model, selected)
        self._rows_mix = False

    def base_fingerprint(self) -> BaseFingerprint:
        """Return a hash of every parameter of the base, adapted or not, by module."""
        names = {name.removesuffix(".weight"): name for name, _ in self._model.named_parameters()}
        return fingerprint(names, lambda path: self._model.get_parameter(names[path]))

    def train(
        self,
        trials: Sequence[Trial],
        until: float = 1.0,
        starts: Mapping[str, Trained] | None = None,
        keep: Keep | None = None,
    ) -> list[Trained]:
        """Train a group in one pass; where that cannot be, in smaller groups.

        Args:
            trials: The candidates; those with dropout come alone.
            until: The share of the steps after which they pause.
            starts: Name → those that paused, to go on from there; all after one step.
            keep: Given the candidates as they stand, every ``save_every`` steps.

        Raises:
            LoraportError: If memory runs out for a single candidate.
            Stopped: After SIGINT, SIGTERM or SIGHUP, where candidates are kept.
        """
        if self._rows_mix and len(trials) > 1:
            return [done for one in trials for done in self.train([one], until, starts, keep)]
        try:
            return self._one_pass(trials, until, starts or {}, keep)
        except RowsMixedError:
            self._rows_mix = True
            self._observer.note("this model mixes the rows of a batch: candidates train one by one")
        except MemoryRanOutError as error:
            if len(trials) == 1:
                raise
            self._observer.note(f"{error}; {len(trials)} candidates train in two groups")
        # Only now, out of reach of the error's traceback, is what did not fit released.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = halves(trials)
        return [done for part in parts for done in self.train(part, until, starts, keep)]

    def _one_pass(
        self,
        trials: Sequence[Trial],
        until: float,
        starts: Mapping[str, Trained],
        keep: Keep | None,
    ) -> list[Trained]:
        def trained(outcomes: Mapping[str, Outcome]) -> list[Trained]:
            return [self._trained(trial, outcomes[trial.name]) for trial in trials]

        few_lengths = self._recorder is not None
        batches, validation = self._setting.batches(self._model, few_lengths=few_lengths)
        what = trials[0].name if len(trials) == 1 else f"{len(trials)} candidates together"
        with faults_explained(lambda: what, lambda: _KEPT):
            found = train_together(
                self._model,
                trials,
                batches,
                grouped_language_model_loss,
                self._setting.options.loop,
                validation=validation,
                until=until,
                starts={t.name: _start(starts[t.name]) for t in trials if t.name in starts},
                keep=None if keep is None else lambda outcomes: keep(trained(outcomes)),
                observer=self._observer,
                recorder=self._recorder,
            )
        return trained(found)

    def _trained(self, trial: Trial, outcome: Outcome) -> Trained:
        plain = replace(outcome, modules=None, state=None)
        if not outcome.modules:
            return Trained(trial, plain, None, outcome.state)
        adapter = Adapter(
            modules=dict(outcome.modules),
            base_model=self._setting.base,
            base_fingerprint=self.adapted.restricted_to(outcome.modules),
            training={"task_type": "CAUSAL_LM", "lora_dropout": trial.lora.dropout},
        )
        return Trained(trial, plain, adapter, outcome.state)


def _start(paused: Trained) -> Outcome:
    """Return what a candidate goes on from."""
    return replace(paused.outcome, state=paused.state)


def _select_targets(model: PreTrainedModel, trials: Sequence[Trial]) -> list[str]:
    """Return the modules that any candidate adapts, or say all that cannot be selected."""
    seen, selected, problems = set(), dict[str, None](), Problems()
    for trial in trials:
        kind = (trial.lora.targets, trial.lora.layers)
        if kind in seen:
            continue
        seen.add(kind)
        try:
            selected |= dict.fromkeys(select_targets(model, trial.lora))
        except LoraportError as error:
            if len({(t.lora.targets, t.lora.layers) for t in trials}) == 1:
                raise
            problems.add(trial.name, "modules to adapt", str(error).replace("\n", " "))
    problems.raise_if_any("the sweep cannot be run")
    return list(selected)
