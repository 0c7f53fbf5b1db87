"""Every example runs on tiny settings and gives what its ``main`` promises."""

import csv
import math
import pathlib
import runpy
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Return a loader of an example's ``main``, with its folder importable as when run as a script."""

    def load(name):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
        return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]

    yield load
    for name in [n for n, m in sys.modules.items() if str(EXAMPLES) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


ROWS = {
    "no decay",
    "grid of 10, equal total budget",
    "train + validation, grid's best",
    *(f"per {what}, {how}" for what in ("layer", "weight") for how in ("jointly trained", "retrained")),
}


def test_weight_decay(example, tmp_path, capsys):
    log = tmp_path / "log.csv"
    tiny = ["--steps", "20", "--seeds", "1", "--hidden", "8", "--out", str(tmp_path), "--log", str(log)]
    results = example("weight_decay.py")(tiny)
    assert set(results) >= ROWS
    assert all(len(row["test_loss"]) == 1 and row["test_loss"][0] > 0 for row in results.values())
    assert results["per weight, jointly trained"]["hyperparams"] == 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    grid, learned = results["grid of 10, equal total budget"], results["per weight, jointly trained"]
    assert grid["gradients"] == pytest.approx(learned["gradients"], rel=0.1)
    assert (tmp_path / "weight_decay.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
    with log.open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert {f"seed 0/{name}" for name in ROWS if "grid of" not in name} < set(rows)
    for name in ("per layer, jointly trained", "per weight, jointly trained"):
        row = rows[f"seed 0/{name}"]
        assert int(row["step"]) == 20
        assert all(math.isfinite(float(row[figure])) for figure in ("loss", "outer_loss", "hypergrad_norm", "residual"))
    assert rows["seed 0/no decay"]["hypergrad_norm"] == ""


@pytest.mark.slow
def test_learned_decays_of_words_hold_when_retrained(example, capsys):
    rows = example("word_decay.py")([])
    (valid, test, together), (single_valid, single_test, single_together) = rows["learned decays"], rows["one decay"]
    assert valid < 0.8 * single_valid
    assert test < 0.87 * single_test
    assert together < 0.93 * single_together
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_weight_decay_says_what_to_set_for_larger_data(example):
    with pytest.raises(SystemExit, match="environment variable HYPERGRAD_DATA"):
        example("weight_decay.py")(["--data", "fashion_mnist", "--steps", "1"])


@pytest.mark.slow
def test_learning_rate(example, tmp_path, capsys):
    tiny = ["--steps", "12", "--outer-steps", "4", "--seeds", "1", "--hidden", "4", "--out", str(tmp_path)]
    results = example("learning_rate.py")(tiny)
    assert set(results) == {
        *("constant, grid of 10", "cosine, grid of 10", "wide grid, equal budget"),
        *("learned, one per step", "learned, one per step and array"),
    }
    for row in results.values():
        assert row["gradients"] > 0
        for name in ("valid_loss", "test_loss", "test_error"):
            assert len(row[name]) == 1
            assert math.isfinite(row[name][0])
    assert (tmp_path / "learning_rate.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
