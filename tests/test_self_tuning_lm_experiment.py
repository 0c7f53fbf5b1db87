"""The self-tuning language model runs on tiny settings and gives what its ``main`` promises."""

import math

import pytest

import experiments.self_tuning_lm as experiment


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


@pytest.mark.slow
def test_self_tuning_lm(main, tmp_path, capsys):
    sizes = {"steps": 40, "words": 1000, "vocabulary": 50, "width": 8, "batch": 4, "looks": 4}
    runs = main([*(f"--{name}={value}" for name, value in sizes.items()), "--out", str(tmp_path)])
    tuned, first, learned = runs["self-tuned"], runs["fixed at the start"], runs["fixed at the learned end"]
    for run in runs.values():
        assert len(run.valid) == 4
        assert all(0 < loss < 1.1 * math.log(50) for loss in [*run.valid, run.test])
        assert run.valid[-1] < run.valid[0]  # it learns
        assert run.gradients == pytest.approx(tuned.gradients, rel=0.01)
    assert all(len(run.history) == 4 for run in runs.values())
    assert set(tuned.history[0]) == {"input", "hidden", "output", "embedding", "weights", "alpha", "beta"}
    for name in tuned.history[0]:
        values = [look[name] for look in tuned.history]
        (start,) = {look[name] for look in first.history}
        assert start == (0.5 if name in ("alpha", "beta") else 0.1)
        assert values[0] == pytest.approx(start, rel=1e-5)  # the warm-up
        assert values[-1] != pytest.approx(start, rel=1e-3)  # every hyperparameter moves
        assert 0 < values[-1] < 0.9
        assert [look[name] for look in learned.history] == [values[-1]] * 4
    assert 10_000 < (tmp_path / "self_tuning_lm.png").stat().st_size < 100_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*runs, *tuned.history[0]])
