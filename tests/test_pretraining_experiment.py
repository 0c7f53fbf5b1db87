"""The pre-training experiment runs on tiny settings and gives what its ``main`` promises."""

import math

import pytest

import experiments.pretraining as experiment

LEARNED = {"learned weights, jointly trained", "learned weights, retrained"}
ROWS = LEARNED | {"no pre-training", "equal weights", "wrong labels left out (oracle)"}


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


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
