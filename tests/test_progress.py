"""What the experiments show and log while they run: a bar, a CSV file, TensorBoard's event files."""

import csv
import math
import struct

import jax.numpy as jnp
import optax
import pytest
from tensorboardX.proto import event_pb2

import hypergrad as hg
from experiments.common import progress


def info(step=4, *, solver=(), skipped=False, outside=False):
    """Return what an outer step at call ``step`` tells; figures are exact in float32."""
    size, reason = jnp.array(0.125 if outside or step >= 0 else 0.0), jnp.array(int(skipped))
    return hg.HypergradInfo(jnp.array(step), jnp.array(2.5), jnp.array(1.0), size, reason, reason, solver)


SOLVE = hg.SolveInfo(jnp.array(3), jnp.array(0.25), jnp.array(0.25), jnp.array(0.0), jnp.array(1))


def look_at_two_runs(log):
    """Look at two runs and return how far the bar has moved."""
    with progress.progress(10, log=log) as shown:
        shown.look("seed 0/learned", 2, info(-1, solver=SOLVE), advance=2, loss=jnp.array(0.5))
        shown.look("seed 0/learned", 4, info(solver=SOLVE), advance=2, loss=0.375)
        shown.look("seed 0/tuned", 6, info(skipped=True), advance=2)
        shown.look("seed 0/learned", 8, None, advance=4)
        return shown.bar.n


LOGGED = {
    ("seed 0/learned", 2): {"loss": 0.5},
    ("seed 0/learned", 4): {"loss": 0.375, "outer_loss": 2.5, "hypergrad_norm": 0.125, "residual": 0.25, "skipped": 0},
    ("seed 0/tuned", 6): {"outer_loss": 2.5, "hypergrad_norm": 0.125, "skipped": 1},
}


def test_a_csv_file_has_a_row_a_look(tmp_path):
    log = tmp_path / "logs" / "log.csv"
    assert look_at_two_runs(log) == 10
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "step", "loss", "outer_loss", "hypergrad_norm", "residual", "skipped"]
    found = {
        (row.pop("run"), int(row.pop("step"))): {name: float(value) for name, value in row.items() if value}
        for row in rows
    }
    assert found == LOGGED | {("seed 0/learned", 8): {}}


def test_rows_are_there_while_the_run_goes_on(tmp_path):
    log = tmp_path / "log.csv"
    with progress.progress(None, log=log) as shown:
        shown.look("a", 1, loss=1.0)
        assert len(log.read_text().splitlines()) == 2


def events(folder):
    """Yield the events of a folder's one file: each a length, its checksum, that many bytes, their checksum."""
    (path,) = folder.glob("*tfevents*")
    raw = path.read_bytes()
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        yield event_pb2.Event.FromString(raw[12 : 12 + length])
        raw = raw[16 + length :]


def test_tensorboard_gets_a_folder_a_run(tmp_path):
    assert look_at_two_runs(tmp_path / "runs") == 10
    found = {}
    for name in ("seed 0/learned", "seed 0/tuned"):
        for event in events(tmp_path / "runs" / name):
            for value in event.summary.value:
                found.setdefault((name, event.step), {})[value.tag] = value.simple_value
    assert found == LOGGED
    assert {path.name for path in (tmp_path / "runs").rglob("*") if path.is_dir()} == {"seed 0", "learned", "tuned"}


@pytest.mark.parametrize(
    ("info", "shown"),
    [
        (None, "loss=1"),
        (info(-1, solver=SOLVE), "loss=1"),
        (info(solver=SOLVE), "loss=1, outer loss=2.5, |hypergrad|=0.125, residual=0.25"),
        (info(), "loss=1, outer loss=2.5, |hypergrad|=0.125"),
        (info(skipped=True), "loss=1, outer loss=2.5, |hypergrad|=0.125, skipped=1"),
        (info(-1, outside=True), "loss=1, outer loss=2.5, |hypergrad|=0.125"),
    ],
    ids=["no info", "before the first outer step", "with a solve", "without a solve", "skipped", "outside a loop"],
)
def test_the_bar_shows_what_there_is(info, shown):
    with progress.progress(None) as opened:
        opened.look("a", 1, info, loss=1)
        assert opened.bar.postfix == shown


def test_a_learned_response_has_no_residual():
    plain = hg.BilevelProblem(lambda w, h, b, k: 0.5 * (w - h) ** 2, lambda w, h, b, k: 0.5 * (w - 1.0) ** 2)
    problem, zero = hg.responses.with_response(plain, hg.responses.linear()), jnp.zeros(())
    problem = hg.responses.perturbed(problem, scale=0.1)
    tx = hg.bilevel(hg.direct(problem), inner_optimizer=optax.sgd(0.0), outer_optimizer=optax.sgd(0.1), every=2)
    variables = hg.BilevelParams(hg.responses.init(problem, 0, zero, zero), zero)
    state = tx.init(variables)
    for _ in range(2):
        assert progress._figures(state.info) == {}
        _, state = tx.update(None, state, variables, inner_batch=zero, outer_batch=zero)
    found = progress._figures(state.info)
    assert set(found) == {"outer_loss", "hypergrad_norm", "skipped"}
    assert found["outer_loss"] == 0.5
    assert math.isfinite(found["hypergrad_norm"])
