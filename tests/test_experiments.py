"""The experiments run on tiny settings and give what their ``main`` promises."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from experiments import learned_optimizer, learning_rate, short_horizon, weight_decay
from experiments.metagradient import distillation, documents, schedule

ROWS = {
    "no decay",
    "grid of 10, equal total budget",
    "train + validation, grid's best",
    *(f"per {what}, {how}" for what in ("layer", "weight") for how in ("jointly trained", "retrained")),
}


@pytest.mark.slow
def test_weight_decay(tmp_path, capsys):
    log = tmp_path / "log.csv"
    tiny = ["--steps", "20", "--seeds", "1", "--hidden", "8", "--out", str(tmp_path), "--log", str(log)]
    results = weight_decay.main(tiny)
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


def test_weight_decay_says_what_to_set_for_larger_data(monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    with pytest.raises(SystemExit, match="environment variable HYPERGRAD_DATA"):
        weight_decay.main(["--data", "fashion_mnist", "--steps", "1"])


@pytest.mark.slow
def test_learning_rate(tmp_path, capsys):
    tiny = ["--steps", "12", "--outer-steps", "4", "--seeds", "1", "--hidden", "4", "--out", str(tmp_path)]
    results = learning_rate.main(tiny)
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


@pytest.mark.slow
def test_learned_optimizer(tmp_path):
    record = learned_optimizer.main(["--quick", "--out", str(tmp_path)])
    for trained in record["meta"].values():
        assert len(trained["log_losses"]) == trained["episodes"]
        assert trained["log_losses"][-1] < trained["log_losses"][0]
    first, wide = (
        {name: np.asarray(losses) for name, losses in record["tasks"][task]["losses"].items()}
        for task in ("meta-training", "8 × width")
    )
    assert set(first) == {
        *("Adam, best constant rate", "Adam, cosine, best rate"),
        *("learned, unrolled", "learned, evolution"),
    }
    divided = {f"{name}, μP" for name in ("learned, unrolled", "learned, evolution", "Adam, rate of meta-training")}
    assert set(wide) == {*first, "Adam, rate of meta-training", *divided}
    for losses in [*first.values(), *wide.values()]:
        assert losses.shape == (2, 20)
        assert (losses[:, -1] < 0.5 * losses[:, 0]).all()
    assert first["learned, unrolled"][:, -1].mean() < first["Adam, best constant rate"][:, -1].mean()
    assert json.loads((tmp_path / "learned_optimizer.json").read_text()) == record
    assert all(name in (tmp_path / "learned_optimizer.md").read_text() for name in wide)
    assert (tmp_path / "learned_optimizer.png").stat().st_size > 10_000


@pytest.mark.slow
def test_short_horizon(tmp_path, capsys):
    record = short_horizon.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert set(record["rows"]) == {"PES", "truncated reverse", "grid", "start"}
    for row in record["rows"].values():
        assert len(row["valid"]) == len(row["test"]) == len(row["rates"]) == 1
        assert math.isfinite(row["valid"][0])
        assert row["gradients"] <= short_horizon.QUICK.budget
    learned, start = record["rows"]["truncated reverse"], record["rows"]["start"]
    assert learned["valid"][0] < start["valid"][0]
    assert (tmp_path / "short_horizon.png").stat().st_size > 10_000
    assert "Validation loss of PES" in capsys.readouterr().out
    assert "| PES |" in (tmp_path / "short_horizon.md").read_text()


def test_the_schedule_goes_from_the_first_rate_to_the_last():
    tx = short_horizon.optimizer(jnp.log(jnp.array([0.4, 0.1])))
    updates = jax.jit(lambda count: tx.update(jnp.ones(()), _at(tx, count))[0])
    found = [-float(updates(count)) for count in (0, 9, 10, 289, 290, 299)]
    assert found == pytest.approx([0.4, 0.4, 0.4 * 0.25 ** (1 / 29), 0.1 * 4 ** (1 / 29), 0.1, 0.1], rel=1e-5)


@pytest.mark.slow
def test_metagradient_schedule(tmp_path):
    record = schedule.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    rows = record["rows"]
    assert set(rows) == {*schedule.LEARNED, "cosine, one run", "cosine, four runs", "start"}
    assert all(np.isfinite(row["other"]).all() for row in rows.values())
    start = rows["start"]["own"][0][1]
    assert max(rows["one run"]["own"][0][1], rows["windows of 10"]["own"][0][1]) < start
    assert rows["one run"]["values"][0] == pytest.approx(start, rel=1e-4), "judged by the run that it was learned on"
    text = (tmp_path / "metagradient_schedule.md").read_text()
    assert all(f"| {name} |" in text for name in rows)
    assert (tmp_path / "metagradient_schedule.png").stat().st_size > 10_000


def test_a_row_that_starts_from_a_grid_pays_for_the_grid():
    record = {"size": schedule.Size()._asdict(), "runs_per_metagradient": 2.0}
    found = [schedule.training_runs(record, name) for name in ("one run", "one run, from cosine", "cosine, one run")]
    assert found == ["120", "408", "768"]


@pytest.mark.slow
def test_windows_of_the_whole_length_see_what_a_metagradient_sees(monkeypatch):
    monkeypatch.setattr(schedule, "WINDOW", 20)
    data = schedule.load("digits", 0, 100)
    key, log_rates = jax.random.key(0), schedule.cosine(jnp.array([0.3, 0.1]), 20)
    value, gradient = schedule.window_gradient(log_rates, key, data)
    problem = hg.BilevelProblem(schedule.drawn_loss, schedule.loss)
    fn = hg.metagradient(problem, schedule.optimizer, batch_at=lambda _: data.train, num_steps=20, segment=20)
    (whole, exact), _ = fn(schedule.fresh(key), log_rates, data.valid, key=key)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, exact, rtol=1e-3, atol=1e-5 * float(jnp.abs(exact).max()))


@pytest.mark.slow
def test_metagradient_documents(tmp_path, monkeypatch):
    monkeypatch.delenv("HYPERGRAD_DATA", raising=False)
    record = documents.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert len(record["rows"]) == 9
    for row in record["rows"].values():
        assert 1.0 < row[0]["held_out"] < 4.0
    equal, learned = (record["rows"][name][0] for name in ("equal weights", "metagradient"))
    assert equal["effective"] == pytest.approx(24)
    assert learned["effective"] < 24
    assert len(record["first"]["metagradient"]) == 24
    assert "| alignment, weights |" in (tmp_path / "metagradient_documents.md").read_text()
    assert (tmp_path / "metagradient_documents.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_score_of_a_document_is_the_product_of_two_gradients():
    with jax.enable_x64(True):
        first = documents.fresh(jax.random.key(0), 5)
        texts = jax.random.randint(jax.random.key(1), (3, documents.CONTEXT + 1), 0, 5)  # one window each
        windows = jax.random.randint(jax.random.key(2), (4, documents.CONTEXT + 1), 0, 5)
        found = documents.scores(first, texts, windows, jax.random.key(3))
        slopes = [jax.grad(lambda w, x=x: documents.losses(w, x).mean())(first) for x in (*texts[:, None], windows)]
        exact = [optax.tree.vdot(slope, slopes[-1]) for slope in slopes[:-1]]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.slow
def test_metagradient_distillation(tmp_path):
    record = distillation.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    rows = {name: curves[0] for name, curves in record["curves"]["1"].items()}
    assert set(rows) == {*distillation.ROWS, "class means", "random images", "all images"}
    at = distillation.MARKS.index(distillation.STEPS)
    assert all(curve[0] < 0.3 < curve[at] for curve in rows.values())
    assert rows["all images"][at] > 0.9
    assert np.shape(record["points"]["through 500 steps"]) == (10, 64)
    assert "| through 500 steps |" in (tmp_path / "metagradient_distillation.md").read_text()
    assert (tmp_path / "metagradient_distillation.png").stat().st_size > 10_000


def test_points_are_in_the_order_of_their_labels():
    train = distillation.load("digits", 0, 200).train
    images = distillation.real_images(train, 3, np.random.default_rng(0))
    labels = [int(train.y[jnp.flatnonzero((train.x == image).all(1))[0]]) for image in images]
    assert labels == distillation.labelled(images).y.tolist() == [*range(10)] * 3


def _at(tx, count):
    return optax.tree.set(tx.init(jnp.zeros(())), count=count)
