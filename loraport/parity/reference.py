"""The PyTorch side of a comparison, written apart from the training layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from loraport.base.rotation_border import rotation_border
from loraport.base.storage import stores_in_out
from loraport.base.stored_tensors import stored_tensor
from loraport.errors import LoraportError
from loraport.naming import bias_name, weight_name
from loraport.parity.changes import Changes, Term, added_bias, changed_value, merged_matrix
from loraport.update import LowRankUpdate


def torch_outputs(model: nn.Module, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run the model and return its output tensors in order, without caches.

    Args:
        model: In evaluation mode; one in halves is given its inputs in halves.
        inputs: Arguments of ``forward`` by name.
    """
    first = next(model.parameters())
    tensors = {name: torch.from_numpy(array).to(first.device) for name, array in inputs.items()}
    if first.dtype in (torch.float16, torch.bfloat16):
        floats = {name: each for name, each in tensors.items() if each.is_floating_point()}
        tensors |= {name: each.to(first.dtype) for name, each in floats.items()}
    with torch.no_grad():
        result = model(**tensors)
    return [tensor.float().cpu().numpy() for tensor in _tensors(result)]


@contextlib.contextmanager
def adapted(model: nn.Module, changes: Changes) -> Iterator[None]:
    """Run the model with updates beside its modules, and with the replaced parameters."""
    values = {
        name: changed_value(_parameter(model, name), found)
        for name, found in changes.replaced.items()
    }
    handles = []
    with _parameters(model, values):
        try:
            for path, terms in changes.terms.items():
                hook = _hook(terms)
                handles.append(model.get_submodule(path).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def merged(model: nn.Module, changes: Changes) -> Iterator[None]:
    """Run the model with all changes merged into its parameters, which are put back afterwards.

    What no parameter can hold (a grouped convolution's update, one of a weight that is normed in
    every pass, a bias of a module that has none) stays beside.
    """
    values = {
        name: changed_value(_parameter(model, name), found)
        for name, found in changes.replaced.items()
    }
    beside: dict[str, tuple[Term, ...]] = {}
    for path, terms in changes.terms.items():
        module = model.get_submodule(path)
        if not _mergeable(module, terms):
            beside[path] = terms
            continue
        name = weight_name(path)
        weight = values.get(name, _parameter(model, name))
        turned = stores_in_out(module)
        matrix = merged_matrix(weight.detach().flatten(1).T if turned else weight.flatten(1), terms)
        values[name] = (matrix.T if turned else matrix).reshape(weight.shape).to(weight)
        bias = added_bias(terms)
        if bias is not None:
            old = values.get(bias_name(path), _parameter(model, bias_name(path)))
            values[bias_name(path)] = (old.double() + bias.to(old.device)).to(old)
    with _parameters(model, values), adapted(model, Changes(terms=beside)):
        yield


def next_token_logits(
    model: nn.Module, prompt: Sequence[int], following: Sequence[int]
) -> np.ndarray:
    """Return the logits before each of the tokens that follow a prompt, without a cache.

    Where texts beyond a number of tokens are rotated by other factors, the tokens up to there are
    from a run of their own.

    Args:
        model: A causal language model.
        prompt: At least one token.
        following: The ``n`` tokens after it.

    Returns:
        ``[n, vocab]`` float32.
    """
    text = [*prompt, *following[:-1]]
    border = rotation_border(getattr(model, "config", None))
    ends = [border] if border is not None and len(prompt) <= border < len(text) else []
    rows, begin = [], len(prompt)
    for end in (*ends, len(text)):
        array = np.array([text[:end]], np.int64)
        outputs = torch_outputs(model, {"input_ids": array, "attention_mask": np.ones_like(array)})
        rows.append(outputs[0][0, begin - 1 :])
        begin = end + 1
    return np.concatenate(rows)[: len(following)]


def _hook(terms: Sequence[Term]) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], y: torch.Tensor) -> Any:
        bias = getattr(module, "bias", None)
        own = y if bias is None else y - _over(module, bias)
        result = y
        for term in terms:
            change = _low_rank(module, arguments[0], term.update, y)
            if term.update.gain is not None:
                gain = _over(module, term.update.gain.to(y))
                change = (gain - 1) * own + gain * change
            if term.update.bias is not None:
                change = change + _over(module, term.update.bias.to(y))
            result = result + term.strength * change
        return result

    return add


def _low_rank(
    module: nn.Module, x: torch.Tensor, update: LowRankUpdate, y: torch.Tensor
) -> torch.Tensor:
    """Return ``scaling * B (A x)``, shaped like the module's output ``y``."""
    a, b = update.a.to(y), update.b.to(y)
    if isinstance(module, nn.Embedding):
        delta = F.embedding(x, a.T) @ b.T  # [..., dim]
        scale = getattr(module, "embed_scale", None)  # Gemma scales what it looks up
        return delta * update.scaling * (1.0 if scale is None else scale)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kernel = a.reshape(len(a), module.in_channels, *module.kernel_size)
        ones = (1,) * len(module.kernel_size)
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(ones)]
        padded, padding = _padded(module, x.to(y))
        hidden = convolve(padded, kernel, None, module.stride, padding, module.dilation)
        return convolve(hidden, b.reshape(*b.shape, *ones)) * update.scaling
    return (x.to(y) @ a.T) @ b.T * update.scaling


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the input and the padding left to do: zeros, which a convolution adds itself."""
    if module.padding_mode == "zeros":
        return x, module.padding
    amounts = module._reversed_padding_repeated_twice
    return F.pad(x, amounts, mode=module.padding_mode), 0


def _over(module: nn.Module, vector: torch.Tensor) -> torch.Tensor:
    """Shape ``[out]`` so that it broadcasts over the module's output."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return vector.reshape(-1, *(1 for _ in module.kernel_size))
    return vector


def _mergeable(module: nn.Module, terms: Sequence[Term]) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups > 1:
        return False
    if module._parameters.get("weight") is None:
        return False  # it is computed in every pass
    has_bias = getattr(module, "bias", None) is not None
    return has_bias or all(term.update.bias is None for term in terms)


def _parameter(model: nn.Module, name: str) -> torch.Tensor:
    try:
        return stored_tensor(model, name).detach()
    except AttributeError as error:
        raise LoraportError(f"{name}: expected this parameter in the base, got none") from error


@contextlib.contextmanager
def _parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Run the model with other parameters and buffers; each module has its own for a while."""
    kept = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            buffer = leaf in module._buffers
            own: Any = module._buffers if buffer else module._parameters
            kept.append((own, leaf, own[leaf]))
            own[leaf] = value if buffer else nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for own, leaf, tensor in reversed(kept):
            own[leaf] = tensor


def _tensors(result: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's result in order, nested ones too, caches left out."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "items"):
        result = [value for key, value in result.items() if key != "past_key_values"]
    if not isinstance(result, list | tuple):
        return []
    return [tensor for value in result for tensor in _tensors(value)]
