"""The picture of a sweep: equal results have equal ones."""

from dataclasses import replace

import pytest

from loraport.sweep.plot import draw_quality
from loraport.sweep.result import Line, SweepResult

LINE = Line(
    name="r4",
    rank=4,
    alpha=8.0,
    targets="all-linear",
    layers="",
    learning_rate=1e-3,
    parameters=1000,
    adapter_bytes=4000,
    training_loss=1.0,
    validation_loss=1.25,
    best_step=3,
    above_best=0.0,
    standard_error=0.0,
    within_noise=True,
    taken=True,
    ended="",
)
OTHER = replace(LINE, name="r8", adapter_bytes=8000, validation_loss=1.5, taken=False)
RESULT = SweepResult("out", "base", 2.0, "r4", "r4", "the best", True, (LINE, OTHER))


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_equal_results_have_equal_pictures(tmp_path, monkeypatch, kind):
    paths = [tmp_path / f"{name}.{kind}" for name in ("first", "second", "other")]
    further = replace(RESULT, candidates=(LINE, replace(OTHER, validation_loss=1.75)))
    for day, (path, result) in enumerate(zip(paths, (RESULT, RESULT, further), strict=True)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(86_400 * day))
        draw_quality(result, path)
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second
    assert first != other
