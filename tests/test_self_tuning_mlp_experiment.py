"""The self-tuning MLP runs on tiny settings and gives what its ``main`` promises."""

import math

import pytest

import experiments.self_tuning_mlp as experiment


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


@pytest.mark.slow
def test_self_tuning_mlp(main, tmp_path, capsys):
    results = main(["--steps", "90", "--hidden", "8", "--out", str(tmp_path)])
    assert set(results) == {
        *("tuned while training", "no regularisation"),
        *("its first values, held fixed", "its last values, held fixed"),
    }
    for row in results.values():
        assert row["gradients"] == 3 * 90 + 2 * (90 // 5 - 9 // 5)
        assert 0 < row["test_error"] < 1
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in ("valid_loss", "test_loss"))
    tuned, first = (
        results["tuned while training"]["last_values"],
        results["its first values, held fixed"]["last_values"],
    )
    assert len(tuned) == 5
    assert all(tuned[name] != first[name] for name in tuned)  # every hyperparameter has moved
    assert results["its last values, held fixed"]["last_values"] == pytest.approx(tuned)
    assert set(results["no regularisation"]["last_values"].values()) == {0.0}
    assert 10_000 < (tmp_path / "self_tuning_mlp.png").stat().st_size < 100_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
