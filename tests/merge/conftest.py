import pytest

from converters.merge import MergeOptions, make_plan, merge


@pytest.fixture
def merge_into():
    """Merge adapters into a base directory; returns the plan."""

    def run(base, output, *adapters, **options):
        pairs = tuple(one if isinstance(one, tuple) else (one, 1.0) for one in adapters)
        chosen = MergeOptions(base=str(base), adapters=pairs, output=output, **options)
        plan = make_plan(chosen)
        written = []
        merge(chosen, plan, written.append)
        assert sum(written) == plan.nbytes
        return plan

    return run
