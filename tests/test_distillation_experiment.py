"""What the distillation experiment is for: warm weights know what their points do not, cold ones do not."""

import csv
import math

import pytest

import experiments.distillation as experiment


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


@pytest.mark.slow
def test_warm_weights_remember_points_that_are_gone(main, tmp_path, capsys):
    log = tmp_path / "log.csv"
    results = main(["--steps", "400", "--seeds", "1", "--out", str(tmp_path), "--log", str(log)])
    (warm,), (cold,) = results["warm start"], results["cold start"]
    assert float(warm.jointly_trained) > 0.65  # the three points have taught ten classes one after the other
    assert warm.retrained.max() < 0.25  # and near chance, 0.1, is what they teach now
    assert abs(float(cold.jointly_trained) - cold.retrained.mean()) < 0.12  # two starts of one and the same training
    assert cold.retrained.mean() > 0.3  # which teaches more than chance
    assert 10_000 < (tmp_path / "distillation.png").stat().st_size < 100_000
    assert "not in the values" in capsys.readouterr().out
    rows = list(csv.DictReader(log.read_text().splitlines()))
    assert {row["run"] for row in rows} == {"seed 0/warm start", "seed 0/cold start"}
    assert all(math.isfinite(float(row["outer_loss"])) and float(row["hypergrad_norm"]) > 0 for row in rows)
