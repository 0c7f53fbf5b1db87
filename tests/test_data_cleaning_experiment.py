"""The data-cleaning experiment runs on tiny settings and gives what its ``main`` promises."""

import numpy as np
import pytest

import experiments.data_cleaning as experiment


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


@pytest.mark.slow
def test_data_cleaning(main, tmp_path, capsys):
    arguments = ["--seeds", "1", "--steps", "60", "--train", "300", "--valid", "100", "--noise", "0.5"]
    (result,) = main([*arguments, "--out", str(tmp_path), "--log", str(tmp_path / "log.csv")])
    assert len(result.networks) == 11
    for outcome in result.networks.values():
        assert 0 < outcome.test_loss < 3
        assert 0 <= outcome.test_error < 0.9
    assert result.weights.shape == result.wrong.shape == (300,)
    assert 0.4 < result.wrong.mean() < 0.6
    kept, joined = (result.networks[f"weight ≥ ½{more}"].examples for more in (", retrained", " and validation"))
    assert kept == (result.weights >= 0.5).sum()
    assert joined == kept + 100

    found = result.searches["learned weight < ½"]
    suspected = result.weights < 0.5
    assert found.precision == pytest.approx(result.wrong[suspected].mean())
    assert found.recall == pytest.approx(suspected[result.wrong].mean())
    pairs = result.weights[~result.wrong][:, None] - result.weights[result.wrong]
    assert found.auc == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    assert found.auc > 0.7  # twelve outer steps tell wrong labels from right ones better than chance

    assert 10_000 < (tmp_path / "data_cleaning.png").stat().st_size < 100_000
    assert "seed 0/learned,60," in (tmp_path / "log.csv").read_text()
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*result.networks, *result.searches])
