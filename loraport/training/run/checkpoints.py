"""Checkpoints of a run: everything that the next step depends on, without pickle.

A checkpoint is a directory ``checkpoint-STEP`` that appears whole or not at all: the adapter
in PEFT's layout (usable as it is), ``state.safetensors`` (optimizer and random states) and
``state.json`` (position, options, identity of the data).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraport.adapter import Adapter, LoraModule
from loraport.base.checkpoint import Checkpoint
from loraport.errors import LoraportError, Problems
from loraport.output import new_directory
from loraport.peft_layout.read import read_peft
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.safetensors_file import write_safetensors
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.rng import RandomState, require_state

_NAME = re.compile(r"checkpoint-(\d+)")
_OPTIMIZER, _RANDOM, _EPOCH_RANDOM = "optimizer", "random", "epoch_random"
_BEST, _PARAMETERS = "best", "parameters"
# Generators refuse a state in many ways, and so does JSON that holds something else.
_OF_DAMAGE = (
    *(LoraportError, OSError, ValueError, TypeError, LookupError, AttributeError),
    *(RuntimeError, OverflowError),
)
_TENSORS, _DOCUMENT = "state.safetensors", "state.json"
# Options that do not change what a run learns: one that is resumed may have others. (Activations
# are not computed again in recorded passes, whose sums come in another order.)
FREE_OPTIONS = frozenset(
    ("save_every", "keep", "shard_base", "gradient_checkpointing", "checkpointed_layers")
)


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: Optimizer steps taken.
        epoch: Present epoch, the first being 0.
        index: Batches of the epoch consumed.
        tokens: Tokens consumed in all.
        metrics_bytes: Length of ``metrics.jsonl``.
    """

    step: int = 0
    epoch: int = 0
    index: int = 0
    tokens: int = 0
    metrics_bytes: int = 0


@dataclass(frozen=True, eq=False)
class RunState:
    """All that the next step depends on, but for the adapter.

    Attributes:
        position: Where the run stands.
        random: State of the random generators.
        epoch_random: Their state when the epoch began.
        optimizer: Parameter name → the optimizer's tensors.
        identity: What a resumed run must share: options, data, device.
        best: Parameter name → its value at the best validation, where that matters.
        parameters: Name → value of what is trained, where no adapter beside the state says so.
    """

    position: Position
    random: RandomState
    epoch_random: RandomState
    optimizer: Mapping[str, Mapping[str, torch.Tensor]]
    identity: Mapping[str, Any]
    best: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(work: Path, adapter: Adapter, state: RunState, keep: int) -> Path:
    """Write a checkpoint and remove all but the last ``keep``."""
    path = work / _name(state.position.step)
    config, adapter_tensors = peft_contents(adapter)
    with new_directory(path, force=True) as partial:
        save_contents(partial, adapter, config, adapter_tensors)
        save_state(partial, state)
    for old in _checkpoints(work)[:-keep]:
        shutil.rmtree(old)
    return path


def save_state(directory: Path, state: RunState) -> None:
    """Write a state into a directory that is to appear whole."""
    tensors = {
        f"{_OPTIMIZER}/{key}/{name}": tensor.detach().cpu().contiguous()
        for name, entries in state.optimizer.items()
        for key, tensor in entries.items()
    }
    for prefix, random in ((_RANDOM, state.random), (_EPOCH_RANDOM, state.epoch_random)):
        tensors |= {f"{prefix}/{name}": tensor for name, tensor in random.tensors.items()}
    for prefix, named in ((_BEST, state.best), (_PARAMETERS, state.parameters)):
        tensors |= {f"{prefix}/{name}": tensor for name, tensor in named.items()}
    document = {
        "position": asdict(state.position),
        "identity": state.identity,
        _RANDOM: state.random.plain,
        _EPOCH_RANDOM: state.epoch_random.plain,
    }
    write_safetensors(tensors, directory / _TENSORS, {"format": "pt"})
    (directory / _DOCUMENT).write_text(json.dumps(document) + "\n")


def last_checkpoint(work: Path) -> Path | None:
    """Return the newest checkpoint, or ``None``."""
    found = _checkpoints(work)
    return found[-1] if found else None


def load_checkpoint(path: Path) -> tuple[Adapter, RunState]:
    """Read a checkpoint.

    Raises:
        LoraportError: If it is damaged.
    """
    try:
        adapter = read_peft(path)
    except LoraportError as error:
        raise _damaged(path, error) from error
    state = load_state(path)
    if path.name != _name(state.position.step):
        raise _damaged(path, f"one of step {state.position.step}")
    return adapter, state


def load_state(path: Path) -> RunState:
    """Read the state in a directory.

    Raises:
        LoraportError: If it is damaged.
    """
    try:
        document = json.loads((path / _DOCUMENT).read_bytes())
        if not isinstance(document["identity"], dict):
            raise TypeError(f"identity {document['identity']!r}")
        position = Position(**document["position"])
        if not all(isinstance(value, int) and value >= 0 for value in asdict(position).values()):
            raise ValueError(f"position {document['position']}")
        optimizer: dict[str, dict[str, torch.Tensor]] = {}
        randoms: dict[str, dict[str, torch.Tensor]] = {_RANDOM: {}, _EPOCH_RANDOM: {}}
        named: dict[str, dict[str, torch.Tensor]] = {_BEST: {}, _PARAMETERS: {}}
        with (path / _TENSORS).open("rb"):  # or what is wrong with this very file
            tensors = Checkpoint(path / _TENSORS)
        for name in tensors:
            prefix, key, *rest = name.split("/", 2)
            if prefix in named:
                named[prefix][key] = tensors.load(name)
            elif prefix == _OPTIMIZER:
                optimizer.setdefault(rest[0], {})[key] = tensors.load(name)
            else:
                randoms[prefix][key] = tensors.load(name)
        state = RunState(
            position=position,
            random=RandomState(randoms[_RANDOM], document[_RANDOM]),
            epoch_random=RandomState(randoms[_EPOCH_RANDOM], document[_EPOCH_RANDOM]),
            optimizer=optimizer,
            identity=document["identity"],
            best=named[_BEST],
            parameters=named[_PARAMETERS],
        )
        require_state(state.random)
        require_state(state.epoch_random)
    except _OF_DAMAGE as error:
        raise _damaged(path, error) from error
    return state


def _damaged(path: Path, got: Exception | str) -> LoraportError:
    what = got if isinstance(got, str | LoraportError | OSError) else repr(got)
    return LoraportError(
        f"checkpoint {path}: expected what loraport wrote, got {what}; remove this directory to "
        "resume from the one before, or start again with --force"
    )


def require_same_run(path: Path, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to resume with other options or data.

    Args:
        path: The checkpoint, for the message.
        stored: Its identity.
        present: The identity of the run that would resume.

    Raises:
        LoraportError: Naming everything that differs, but for `FREE_OPTIONS`.
    """
    problems = Problems()
    # As JSON has it: tuples become lists.
    present = json.loads(json.dumps(present))
    for name in sorted((stored.keys() | present.keys()) - FREE_OPTIONS):
        if name not in stored or name not in present or stored[name] != present[name]:
            problems.add(name, *(_told(facts, name) for facts in (stored, present)))
    problems.raise_if_any(
        f"cannot resume from {path}: the run was started differently; "
        "resume with the same options and data, or start anew with --force"
    )


def _told(facts: Mapping[str, Any], name: str) -> str:
    return repr(facts[name]) if name in facts else "none (of another version of loraport)"


def restore_adapter(layers: Mapping[str, LoraLayer], adapter: Adapter, path: Path) -> None:
    """Copy a checkpoint's matrices into the model's layers.

    Raises:
        LoraportError: If the modules or ranks differ.
    """
    problems = Problems()
    for name in sorted(layers.keys() | adapter.modules.keys()):
        layer, module = layers.get(name), adapter.modules.get(name)
        if layer is None or module is None:
            problems.add(
                name,
                "it adapted" if module else "it not adapted",
                "the opposite; use the LoRA options the run began with",
            )
            continue
        expected = [matrix.shape for matrix in layer.matrices()]
        if expected != [module.lora_A.shape, module.lora_B.shape]:
            problems.add(name, f"rank {module.rank}", f"rank {expected[0][0]} or another shape")
        if (layer.magnitude is None) is not (module.magnitude is None):
            problems.add(name, "DoRA as it was", "the opposite")
    problems.raise_if_any(f"cannot resume from {path}")
    for name, layer in layers.items():
        _restore_layer(layer, adapter.modules[name])


@torch.no_grad()
def _restore_layer(layer: LoraLayer, module: LoraModule) -> None:
    """Copy back what `lora_module` took from a layer."""
    layer.lora_A.copy_(module.lora_A[: layer.rank])
    layer.lora_B.copy_(module.lora_B[:, : layer.lora_B.shape[1]])
    if layer.initial_A is not None and layer.initial_B is not None:
        # Not those computed anew: another machine decomposes with other roundings.
        layer.initial_A.copy_(module.lora_A[layer.rank :])
        layer.initial_B.copy_(-module.lora_B[:, layer.rank :])
    if layer.magnitude is not None and module.magnitude is not None:
        layer.magnitude.copy_(module.magnitude.flatten())


def _name(step: int) -> str:
    return f"checkpoint-{step:08d}"


def _checkpoints(work: Path) -> list[Path]:
    if not work.is_dir():
        return []
    return sorted(entry for entry in work.iterdir() if _NAME.fullmatch(entry.name))
