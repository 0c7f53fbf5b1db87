"""The hypernetwork experiment runs on tiny settings and gives what its ``main`` promises."""

import pytest

import experiments.hypernetwork as experiment

LEARNED = {"one decay, global": 1, "a decay per input, local": 65, "a decay per weight, local": 650}
FIXED = {"one decay, the first": 1, "one decay, best of the grid": 1}
DECAYS = FIXED | LEARNED | {f"{name}, retrained": count for name, count in LEARNED.items()}


@pytest.fixture
def main(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    return experiment.main


@pytest.mark.slow
def test_hypernetwork(main, tmp_path, capsys):
    results = main(["--steps", "200", "--seeds", "1", "--grid", "3", "--out", str(tmp_path)])
    assert {name: row["hyperparams"] for name, row in results.items()} == DECAYS
    for row in results.values():
        for name in ("valid_loss", "test_loss"):
            assert 0 < row[name][0] < 2.3  # below chance, log 10
        assert 0 <= row["test_error"][0] < 0.5
    start = results["one decay, the first"]["valid_loss"]
    for name in LEARNED:
        assert results[f"{name}, retrained"]["valid_loss"] != start  # decays moved
    assert results["one decay, best of the grid"]["gradients"] == 3 * 200
    assert 10_000 < (tmp_path / "hypernetwork.png").stat().st_size < 100_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_hypernetwork_says_what_to_set_for_larger_data(main):
    with pytest.raises(SystemExit, match="environment variable HYPERGRAD_DATA"):
        main(["--data", "mnist", "--steps", "1"])
