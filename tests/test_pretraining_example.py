"""The pre-training example runs on tiny settings and gives what its ``main`` promises."""

import math
import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
LEARNED = {"learned weights, jointly trained", "learned weights, retrained"}
ROWS = LEARNED | {"no pre-training", "equal weights", "wrong labels left out (oracle)"}


@pytest.fixture
def main(monkeypatch):
    """Return the example's ``main``, with its folder importable as when run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield runpy.run_path(str(EXAMPLES / "pretraining.py"), run_name="example")["main"]
    for name in [n for n, m in sys.modules.items() if str(EXAMPLES) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.slow
def test_pretraining(main, tmp_path, capsys):
    (outcomes,) = main(["--steps", "60", "--seeds", "1", "--out", str(tmp_path)])
    assert set(outcomes) == ROWS
    for name, outcome in outcomes.items():
        assert 0 < outcome.test_loss < 3
        assert 0 <= outcome.test_error < 0.9
        assert math.isnan(outcome.auc) == (name not in LEARNED)
    learned = outcomes["learned weights, jointly trained"]
    assert learned.weights.shape == learned.wrong.shape == (1200,)
    assert 0.3 < learned.wrong.mean() < 0.5
    assert learned.auc > 0.6  # eleven outer steps tell right labels from wrong ones better than chance
    assert 10_000 < (tmp_path / "pretraining.png").stat().st_size < 100_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in outcomes)
