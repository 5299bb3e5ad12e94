"""Adapters of many modules, as a model's experts have: work grows with them, not their pairs."""

import pytest
import torch
from call_counts import calls

from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import Problems
from loraport.naming import NameIndex
from loraport.peft_layout import read_peft, write_peft
from loraport.peft_layout.expert_keys import wrapped_parameters


def paths_of_experts(count):
    return [f"model.layers.0.mlp.experts.{number}.up_proj" for number in range(count)]


def adapter_of_experts(count):
    """Return an adapter with three ranks and a module whose path is the end of another's."""
    ranks = {path: 1 + number % 3 for number, path in enumerate(paths_of_experts(count))}
    ranks["experts.1.up_proj"] = 4
    return Adapter(
        {
            path: LoraModule(
                ModuleKind.LINEAR, torch.ones(rank, 2), torch.ones(2, rank), alpha=2.0 * rank
            )
            for path, rank in ranks.items()
        }
    )


def test_writing_and_reading_patterns_grows_with_the_modules(tmp_path):
    # The first one also imports what it needs.
    write_peft(adapter_of_experts(1), tmp_path / "1")
    read_peft(tmp_path / "1")
    written, read = {}, {}
    for count in (60, 240):
        adapter = adapter_of_experts(count)
        written[count] = calls(write_peft, adapter, tmp_path / str(count))
        read[count] = calls(read_peft, tmp_path / str(count))
        again = read_peft(tmp_path / str(count)).modules
        assert {path: (m.rank, m.alpha) for path, m in again.items()} == {
            path: (m.rank, m.alpha) for path, m in adapter.modules.items()
        }
    assert written[240] < 5 * written[60]
    assert read[240] < 5 * read[60]


@pytest.mark.parametrize(
    "targets",
    [
        (),
        ("gate_up_proj",),
        tuple(f"layers.{number}.experts.down_proj" for number in range(240)),
    ],
)
def test_telling_bare_parameters_from_modules_grows_with_the_modules(targets):
    def tell(count):
        paths = paths_of_experts(count)
        problems = Problems()
        assert wrapped_parameters(paths, targets[:count], paths, problems).parameters == {}
        assert not problems.found

    assert calls(tell, 240) < 5 * calls(tell, 60)


def test_finding_names_with_another_prefix_grows_with_the_names():
    def find(count):
        paths = [f"{path}.weight" for path in paths_of_experts(count)]
        index = NameIndex([path.removeprefix("model.") for path in paths[: count // 2]])
        longer = NameIndex([f"base.{path}" for path in paths])
        found = [(index.candidates(path), longer.candidates(path)) for path in paths]
        assert found == [
            ([path.removeprefix("model.")] if number < count // 2 else [], [f"base.{path}"])
            for number, path in enumerate(paths)
        ]

    assert calls(find, 240) < 5 * calls(find, 60)


def test_names_that_differ_by_a_prefix_are_all_told():
    names = ["a.h.fc.weight", "h.fc.weight", "fc.weight", "weight", "xfc.weight", "fc.bias"]
    assert NameIndex(names).candidates("b.a.h.fc.weight") == [
        *("a.h.fc.weight", "fc.weight", "h.fc.weight")
    ]
    assert NameIndex(names[:2]).candidates("fc.weight") == ["a.h.fc.weight", "h.fc.weight"]
    assert NameIndex(names).candidates("weight.x") == []
