"""Adapters whose initialisation changed the base: PiSSA, OLoRA, CorDA and their like.

Such an initialisation starts with ``B0 A0 != 0`` and takes it out of the base, ``W0 = W - s B0
A0``; the adapter belongs to ``W0``. Relative to ``W`` it is ``s (B A - B0 A0)``, of twice the rank:
``A' = [A; A0]``, ``B' = [B, -B0]``. DoRA's magnitude stays, as ``W0 + s B A`` stays what it is.
"""

from __future__ import annotations

from dataclasses import replace

from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError, Problems
from loraport.scaling import alpha_for


def relative_to_initial(trained: Adapter, initial: Adapter) -> Adapter:
    """Return a trained adapter for the unchanged base.

    Args:
        trained: The adapter after training.
        initial: The same adapter before its first step (PEFT saves it with
            ``save_pretrained`` right after ``get_peft_model``).

    Raises:
        LoraportError: If the two are not the same adapter at two times.
    """
    import torch

    problems = Problems()
    for path in sorted(trained.modules.keys() ^ initial.modules.keys()):
        where = "trained" if path in trained.modules else "initial"
        problems.add(path, "it in both adapters", f"it in the {where} one only")
    modules: dict[str, LoraModule] = {}
    for path in trained.modules.keys() & initial.modules.keys():
        after, before = trained.modules[path], initial.modules[path]
        if after.kind is ModuleKind.EXPERTS or after.groups > 1:
            problems.add(path, "one matrix", "fused experts, or a convolution with groups")
        elif before.lora_B_bias is not None and before.lora_B_bias.any():
            problems.add(path, "an initial adapter without a bias", "one with a bias on lora_B")
        elif _form(after) != _form(before):
            problems.add(path, f"the initial adapter like {_form(after)}", f"{_form(before)}")
        else:
            modules[path] = replace(
                after,
                lora_A=torch.cat([after.lora_A, before.lora_A]),
                lora_B=torch.cat([after.lora_B, -before.lora_B], dim=1),
                alpha=alpha_for(2 * after.rank, after.scaling, use_rslora=after.use_rslora),
            )
    problems.raise_if_any("the initial adapter does not belong to the trained one")
    if all(_equal(trained.modules[path], initial.modules[path]) for path in modules):
        raise LoraportError(
            "the initial adapter: expected the adapter before its training, got the trained one "
            "itself; nothing would be left of it"
        )
    training = {key: value for key, value in trained.training.items() if key != "init_lora_weights"}
    ordered = {path: modules[path] for path in trained.modules}
    return replace(trained, modules=ordered, training=training)


def _form(module: LoraModule) -> tuple[object, ...]:
    return (tuple(module.lora_A.shape), tuple(module.lora_B.shape), module.scaling)


def _equal(first: LoraModule, second: LoraModule) -> bool:
    return first.lora_A.equal(second.lora_A) and first.lora_B.equal(second.lora_B)
