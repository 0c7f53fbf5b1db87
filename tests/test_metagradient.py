"""Metagradients: the gradient of a whole run equals one unroll of it, whatever is kept, killed or damaged."""

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hypergrad as hg
from hypergrad.drivers import _metagradient, _revolve
from tests.problems import batch_norm

T = 24
X = jax.random.normal(jax.random.key(0), (30, 4), float)
Y = jnp.sin(X @ jnp.arange(4.0))
ROWS = jax.random.randint(jax.random.key(1), (T, 6), 0, 30)
WEIGHTS = {"w": jax.random.normal(jax.random.key(2), (4,)), "b": jnp.zeros(())}
HYPERPARAMS = {"decay": jnp.array(-3.0), "rate": jnp.full(T, -3.0), "examples": jnp.zeros(30)}


def error(w, batch):
    return (jnp.tanh(batch[0] @ w["w"] + w["b"]) - batch[1]) ** 2


def inner_loss(w, h, batch, key):
    x, y, weights = batch[0], batch[1], jax.nn.sigmoid(h["examples"])[batch[2]]
    x = x if key is None else x + 0.1 * jax.random.normal(key, x.shape)
    return jnp.mean(weights * error(w, (x, y))) + hg.penalties.l2(w, jnp.exp(h["decay"]))


def outer_loss(w, h, batch, key):
    return jnp.mean(error(w, batch)) + 0.01 * jnp.sum(h["rate"] ** 2)


PROBLEM = hg.BilevelProblem(inner_loss, outer_loss)
RATE = lambda h: lambda count: jnp.exp(h["rate"][count])  # noqa: E731
OPTIMIZERS = {
    "momentum": lambda h: optax.sgd(RATE(h), momentum=0.9),
    "Adam": lambda h: optax.adam(RATE(h), eps_root=1e-8),
    "clipping": lambda h: optax.chain(hg.optimizers.clip_by_global_norm(0.1), optax.sgd(RATE(h))),
    "schedule": lambda h: optax.sgd(
        lambda count: jnp.exp(h["rate"][count]) * optax.cosine_decay_schedule(1.0, T)(count)
    ),
    "copy of the first weights": lambda h: optax.chain(optax.sgd(RATE(h)), towards_start(h)),
}


def towards_start(h):
    """Pull weights back to where they began: the optimizer's first state depends on weights and λ."""
    pull = jnp.exp(h["decay"])

    def update(updates, state, params):
        return jax.tree.map(lambda u, s, w: u + 0.1 * (s - w), updates, state, params), state

    return optax.GradientTransformation(lambda params: jax.tree.map(lambda w: w * (1 + pull), params), update)


STATE_BYTES = sum(x.nbytes for x in jax.tree.leaves((WEIGHTS, OPTIMIZERS["Adam"](HYPERPARAMS).init(WEIGHTS))))


def batch_at(step):
    return hg.IndexedBatch((X, Y, jnp.arange(30)), ROWS[step])


def run_of(store, *, segment=5, optimizer="Adam", **options):
    settings = {"batch_at": batch_at, "num_steps": T, "segment": segment, "store": store, **options}
    return hg.metagradient(PROBLEM, OPTIMIZERS[optimizer], **settings)


def call(fn, *, hyperparams=HYPERPARAMS, key=7):
    return fn(WEIGHTS, hyperparams, (X, Y), key=key)


@functools.cache
def unrolled(optimizer="Adam"):
    fn = hg.value_and_hypergrad(hg.unrolled(PROBLEM), OPTIMIZERS[optimizer])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(float), (WEIGHTS, HYPERPARAMS))
        batches = hg.IndexedBatch((X.astype(float), Y.astype(float), jnp.arange(30)), ROWS)
        return fn(*wide, batches, (X.astype(float), Y.astype(float)), key=7)[0]


def bits(result):
    (value, grad), info = result
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((value, grad, info.params, info.cotangent_norms))]


@functools.cache
def reference():
    return call(run_of(hg.stores.host(3)))


def test_the_schedule_is_the_best_possible():
    @functools.cache
    def best(segments, slots):
        if slots == 1:
            return segments * (segments - 1) // 2
        return min(
            (middle + best(segments - middle, slots - 1) + best(middle, slots) for middle in range(1, segments)),
            default=0,
        )

    for segments, slots in itertools.product(range(1, 50), range(1, 7)):
        actions = list(_revolve.schedule(segments, slots))
        run = sum(action.to - action.at for action in actions if action.kind == "forward")
        assert run == best(segments, slots) == _revolve.num_forward(segments, slots)
        assert [a.at for a in actions if a.kind == "reverse"] == list(range(segments))[::-1]
        kept, most, here = {0}, 1, 0
        for kind, at, to in actions:
            assert kind not in ("forward", "reverse", "keep") or at == here
            assert kind != "restore" or at in kept
            kept = kept | {at} if kind == "keep" else kept - {at} if kind == "drop" else kept
            here, most = (to if kind in ("forward", "restore") else here), max(most, len(kept))
        assert most <= slots
        assert kept == {0}


@pytest.mark.parametrize("segments", [66, 286, 1001])
def test_the_binomial_numbers_of_ten_slots(segments):
    repeats = {66: 2, 286: 3, 1001: 4}[segments]
    assert _revolve.num_repeats(segments, 10) == repeats
    assert _revolve.num_repeats(segments + 1, 10) == repeats + 1


@pytest.mark.parametrize(
    "optimizer", ["Adam", *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name != "Adam")]
)
def test_equals_one_unroll(optimizer):
    value, grad = unrolled(optimizer)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(float), (WEIGHTS, HYPERPARAMS, (X, Y)))
        fn = run_of(hg.stores.host(3), optimizer=optimizer)
        (found, hypergrad), info = fn(*wide, key=7)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(hypergrad), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())
    assert info.status == hg.MetagradientStatus.FINISHED
    assert info.num_forward == _revolve.num_forward(5, 3)


@pytest.mark.slow
@pytest.mark.parametrize("segment", [1, 7, 24])
@pytest.mark.parametrize("store", ["device", "host", "directory"])
def test_equals_one_unroll_for_every_store_and_segment(segment, store, tmp_path):
    made = hg.stores.directory(tmp_path / "run", 2) if store == "directory" else getattr(hg.stores, store)(2)
    value, grad = unrolled()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(float), (WEIGHTS, HYPERPARAMS, (X, Y)))
        (found, hypergrad), _ = run_of(made, segment=segment)(*wide, key=7)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(hypergrad), jax.tree.leaves(grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["momentum, clipping and noise", "BatchNorm and Adam"])
def test_equals_one_unroll_of_200_steps(case):
    """In float64: keys and model state reach every step as in one unroll of the whole run."""
    steps = 200
    with jax.enable_x64(True):
        wide = lambda part: jax.tree.map(lambda x: x.astype(float) if x.dtype.kind == "f" else x, part)  # noqa: E731
        model_state = None
        if case == "BatchNorm and Adam":
            problem, *parts = batch_norm()
            variables, model_state, arrays = map(wide, parts)
            rule, outer_batch = optax.adam(1e-2, eps_root=1e-8), arrays
        else:
            problem, variables = PROBLEM, wide((WEIGHTS, {**HYPERPARAMS, "rate": jnp.full(steps, -3.0)}))
            arrays, outer_batch = wide((X, Y, jnp.arange(30))), wide((X, Y))
            rule = lambda h: optax.chain(  # noqa: E731
                hg.optimizers.clip_by_global_norm(0.5), optax.sgd(RATE(h), momentum=0.9)
            )
        rows = jax.random.randint(jax.random.key(5), (steps, 8), 0, len(arrays[0]))
        unroll = hg.value_and_hypergrad(hg.unrolled(problem), rule)
        batches = hg.IndexedBatch(arrays, rows)
        (value, grad), _ = unroll(*variables, batches, outer_batch, key=3, model_state=model_state)
        fn = hg.metagradient(
            problem, rule, batch_at=lambda i: hg.IndexedBatch(arrays, rows[i]), num_steps=steps, segment=30
        )
        (found, hypergrad), info = fn(*variables, outer_batch, key=3, model_state=model_state)
    assert info.status == hg.MetagradientStatus.FINISHED
    np.testing.assert_allclose(found, value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(hypergrad), jax.tree.leaves(grad), strict=True):
        assert np.linalg.norm(a - b) <= 1e-12 * np.linalg.norm(b)


@pytest.mark.slow
def test_a_call_may_have_a_store_of_its_own(tmp_path):
    """Two directories for two λ, one compiled function; the result is that of the function's own store."""
    fn = run_of(hg.stores.device(2), segment=8, optimizer="momentum")
    moved = {**HYPERPARAMS, "decay": jnp.array(-2.0)}
    for number, hyperparams in enumerate((HYPERPARAMS, moved)):
        own = fn(WEIGHTS, hyperparams, (X, Y), key=7, store=hg.stores.directory(tmp_path / str(number), 2))
        assert bits(own) == bits(fn(WEIGHTS, hyperparams, (X, Y), key=7))
    again = fn(WEIGHTS, moved, (X, Y), key=7, store=hg.stores.directory(tmp_path / "1", 2))
    assert bits(again) == bits(own)
    assert again[1].num_forward == 0
    with pytest.raises(TypeError, match="store to be a Store"):
        fn(WEIGHTS, HYPERPARAMS, (X, Y), key=7, store=str(tmp_path))


@pytest.mark.slow
def test_it_runs_where_nan_is_refused():
    with jax.debug_nans(True):
        _, info = call(run_of(hg.stores.device(2), segment=12, optimizer="momentum"))
    assert info.status == hg.MetagradientStatus.FINISHED
    assert np.isfinite(info.cotangent_norms).all()


def test_a_second_call_traces_nothing():
    traced = []

    def inner_loss(w, target, batch, key):
        traced.append(1)
        return 0.5 * jnp.sum((w - target) ** 2)

    problem = hg.BilevelProblem(inner_loss, lambda w, target, batch, key: jnp.sum(w))
    fn = hg.metagradient(problem, optax.sgd(0.5), batch_at=lambda i: (), num_steps=3, segment=1)
    fn(jnp.zeros(1), jnp.ones(1), (), key=None)
    assert traced
    traced.clear()
    (value, _), _ = fn(jnp.zeros(1), 2.0 * jnp.ones(1), (), key=None)
    assert float(value) == 1.75
    assert not traced


def test_a_schedule_of_as_many_slots_as_segments():
    assert sum(action.kind == "forward" for action in _revolve.schedule(3000, 3000)) == 2999


def test_an_optimizer_that_sees_a_hyperparameter_a_step_late():
    """Its rate acts from the second step on: nothing is refused with segments of one step."""

    def late(h):
        def update(updates, state, params=None):
            return jax.tree.map(lambda s: -h * s, state), updates

        return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)

    problem = hg.BilevelProblem(lambda w, h, b, k: 0.5 * jnp.sum(w**2), lambda w, h, b, k: jnp.sum(w))
    fn = hg.metagradient(problem, late, batch_at=lambda i: (), num_steps=3, segment=1)
    (_, grad), _ = fn(jnp.ones(1), jnp.array(0.1), (), key=None)  # w₃ = 1 − h − h = 1 − 2 h: the third gradient is late
    np.testing.assert_allclose(grad, -2.0, rtol=1e-6)


@pytest.mark.slow
def test_equals_differences():
    """Of the mean of two evaluations, along one direction of everything: λ, and the weights at the start."""
    with jax.enable_x64(True):
        weights, hyperparams, data = jax.tree.map(lambda x: x.astype(float), (WEIGHTS, HYPERPARAMS, (X, Y)))
        fn = run_of(hg.stores.device(2), evaluate_at=(9, 20))
        (_, grad), info = fn(weights, hyperparams, data, key=7)
        along = jax.tree.map(
            lambda x: jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape), (weights, hyperparams)
        )

        def value(step):
            moved = jax.tree.map(lambda x, d: x + step * d, (weights, hyperparams), along)
            return fn(*moved, data, key=7)[0][0]

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        exact = sum(map(jnp.vdot, jax.tree.leaves((info.params_grad, grad)), jax.tree.leaves(along)))
    np.testing.assert_allclose(slope, exact, rtol=1e-6)
    assert info.boundaries.tolist() == [0, 5, 9, 10, 15, 20]
    assert info.outer_losses.shape == (2,)
    assert info.cotangent_norms[-1] > 0


def test_several_evaluations_by_hand():
    """w_t = w_0 − t h, the j-th outer loss is z_j w_t with z_j drawn from the j-th key: dL/dh = mean_j −t_j z_j."""
    problem = hg.BilevelProblem(lambda w, h, b, k: h * w, lambda w, h, b, k: jax.random.normal(k, ()) * w)
    settings = {"batch_at": lambda i: (), "num_steps": 4, "segment": 2}
    fn = hg.metagradient(problem, optax.sgd(1.0), evaluate_at=(1, 3), **settings)
    (value, grad), info = fn(jnp.array(1.0), jnp.array(0.5), (), key=7)
    second = jax.random.split(jax.random.key(7), 5)[1]
    z = np.array([jax.random.normal(jax.random.fold_in(second, j), ()) for j in range(2)])
    np.testing.assert_allclose(info.outer_losses, z * [0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(value, np.mean(z * [0.5, -0.5]), rtol=1e-6)
    np.testing.assert_allclose(grad, np.mean(z * [-1.0, -3.0]), rtol=1e-6)
    np.testing.assert_allclose(info.params_grad, np.mean(z), rtol=1e-6)
    assert info.params == -0.5
    assert info.at_step == 3


def test_the_host_counts_the_bytes_it_moves():
    actions = list(_revolve.schedule(5, 3))
    moves = sum(action.kind == "keep" or (action.kind == "restore" and action.at > 0) for action in actions)
    assert moves > 0
    assert reference()[1].bytes_moved == moves * STATE_BYTES


class _StopError(Exception):
    pass


CHOSEN = {"folder": "", "after": 0}


@functools.cache
def stoppable(optimizer="Adam"):
    """A run in ``CHOSEN["folder"]`` that stops at its n-th note or file, as a kill would: before it or after it."""
    left = [0]

    def open_(about):
        left[0] = CHOSEN["after"]
        kept = hg.stores.directory(CHOSEN["folder"], 3).open(about)

        def counted(fn, *args):
            left[0] -= 1
            if left[0] == 0:
                raise _StopError
            result = fn(*args)
            left[0] -= 1
            if left[0] == 0:
                raise _StopError
            return result

        for name in ("put", "record", "drop"):
            setattr(kept, name, functools.partial(counted, getattr(kept, name)))
        return kept

    return run_of(hg.stores.Store(3, open_, "directory"), optimizer=optimizer)


def stopped(folder, after, **options):
    CHOSEN.update(folder=folder, after=after)
    return call(stoppable(**options))


ENDS = 29  # the first of ``after`` at which nothing is left to stop


AROUND_A_NOTE = (21, 22)  # of a state kept after some segments are differentiated


@pytest.mark.parametrize(
    "after", [n if n in AROUND_A_NOTE else pytest.param(n, marks=pytest.mark.slow) for n in range(1, ENDS)]
)
def test_a_run_stopped_anywhere_goes_on_and_ends_with_the_same_bits(after, tmp_path):
    with pytest.raises(_StopError):
        stopped(tmp_path, after)
    again = stopped(tmp_path, 0)
    assert bits(again) == bits(reference())
    assert again[1].num_forward <= reference()[1].num_forward
    assert not [file for file in tmp_path.iterdir() if "state" in file.name]


def test_a_run_that_nobody_stops_ends(tmp_path):
    assert bits(stopped(tmp_path, ENDS)) == bits(reference())


@pytest.mark.parametrize("what", ["state", "progress"])
def test_a_damaged_file_is_named_and_computed_again(what, tmp_path):
    with pytest.raises(_StopError):
        stopped(tmp_path, 12)
    files = [file for file in tmp_path.iterdir() if file.name.startswith(what)]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=rf"{what}_\d+ is damaged: (it is computed|the run begins) again"):
        again = stopped(tmp_path, 0)
    assert bits(again) == bits(reference())


def test_what_was_gathered_before_damage_is_not_taken_up_again(tmp_path, monkeypatch):
    """Its name is used again: a kill just before the new position must not pair it with an old one."""
    for after in range(1, ENDS):
        folder = tmp_path / str(after)
        with pytest.raises(_StopError):
            stopped(folder, after)
        if files := list(folder.glob("progress_*")):
            break
    (file,) = files
    file.write_bytes(file.read_bytes()[:-1])
    write = hg.stores._write

    def stops(at, parts):
        if at.name == "position.json" and file.name in str(parts):
            raise _StopError
        write(at, parts)

    monkeypatch.setattr("hypergrad.stores._write", stops)
    with pytest.raises(_StopError), pytest.warns(UserWarning, match="the run begins again"):
        stopped(folder, 0)
    monkeypatch.undo()
    assert file.exists()
    assert bits(stopped(folder, 0)) == bits(reference())


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    """The fifth file is the second note of the position; a damaged one would be refused."""
    sync, left = os.fsync, [5]

    def fails(file):
        left[0] -= 1
        if left[0] == 0:
            os.ftruncate(file, 2)
            raise OSError("no space left")
        sync(file)

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        stopped(tmp_path, 0)
    assert (tmp_path / "position.json").exists()
    assert bits(stopped(tmp_path, 0)) == bits(reference())


def test_what_a_kill_left_behind_is_removed(tmp_path):
    with pytest.raises(_StopError):
        stopped(tmp_path, 12)
    (tmp_path / "progress_1").write_bytes(b"as if killed between a note and the removal of what was noted before")
    (tmp_path / "progress_2.part").write_bytes(b"as if killed while it was written")
    assert bits(stopped(tmp_path, 0)) == bits(reference())
    assert len(list(tmp_path.iterdir())) == 3


def test_files_of_others_stay(tmp_path):
    names = "progress_report.csv", "state_of_the_art.txt", "progress_1.csv"
    for name in names:
        (tmp_path / name).write_text("mine")
    assert bits(stopped(tmp_path, 0)) == bits(reference())
    assert {*names} < {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["state_1", "position.json", "state_1.part"])
def test_files_of_our_names_are_refused_where_there_is_no_run(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"expected a directory without {re.escape(name)}, or with .*; got .*another"):
        stopped(tmp_path, 0)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


def test_a_position_of_another_run_is_refused(tmp_path):
    """Without run.json, or with a changed number: what is left is not taken for a part of this run."""
    with pytest.raises(_StopError):
        stopped(tmp_path, 12)
    description, position = (tmp_path / "run.json").read_text(), (tmp_path / "position.json").read_text()
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"expected a directory without position\.json, or with the run\.json"):
        stopped(tmp_path, 0)
    (tmp_path / "run.json").write_text(description)
    number = json.loads(position)[0]
    (tmp_path / "position.json").write_text(position.replace(f"[{number},", f"[{number + 1},"))
    with pytest.raises(ValueError, match=r"position\.json as this run wrote it; got a damaged file, or one of another"):
        stopped(tmp_path, 0)
    (tmp_path / "position.json").write_text(position)
    assert bits(stopped(tmp_path, 0)) == bits(reference())


@pytest.mark.parametrize(
    "rules",
    [
        (lambda rate: optax.inject_hyperparams(optax.sgd)(learning_rate=rate), 0.05, 0.1),
        pytest.param(
            (lambda seed: optax.chain(optax.add_noise(0.1, 0.5, seed), optax.sgd(0.1)), 1, 2), marks=pytest.mark.slow
        ),
    ],
    ids=["inject_hyperparams", "noise"],
)
def test_a_directory_knows_what_the_optimizer_begins_with(rules, tmp_path):
    """A rate or a key that is in its state alone."""
    make, one, other = rules
    loss = lambda w, h, batch, key: jnp.exp(h) * jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731
    problem, store = hg.BilevelProblem(loss, loss), hg.stores.directory(tmp_path, 2)

    def run(value):
        fn = hg.metagradient(problem, make(value), batch_at=batch_at, num_steps=4, segment=2, store=store)
        return fn(jnp.zeros(4), jnp.zeros(()), (X, Y), key=None)

    assert run(one)[1].num_forward == 1
    assert run(one)[1].num_forward == 0
    with pytest.raises(ValueError, match="got one with different values of the optimizer state"):
        run(other)


@pytest.mark.parametrize("where", [pytest.param("inner", marks=pytest.mark.slow), "outer"])
def test_a_directory_knows_derivatives_that_a_loss_defines(where, tmp_path):
    """A ``custom_vjp`` of another backward pass, and the same value."""

    def run(factor):
        @jax.custom_vjp
        def same(x):
            return x

        same.defvjp(lambda x: (x, None), lambda _, g: (factor * g,))
        loss = lambda w, h, batch, key: jnp.exp(h) * jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731
        changed = lambda w, *rest: loss(same(w), *rest)  # noqa: E731
        problem = hg.BilevelProblem(changed, loss) if where == "inner" else hg.BilevelProblem(loss, changed)
        store = hg.stores.directory(tmp_path, 2)
        fn = hg.metagradient(problem, optax.sgd(0.1), batch_at=batch_at, num_steps=4, segment=2, store=store)
        return fn(jnp.zeros(4), jnp.zeros(()), (X, Y), key=None)

    assert run(1.0)[1].num_forward == 1
    assert run(1.0)[1].num_forward == 0
    with pytest.raises(ValueError, match="got one with different losses, batch_at and optimizer"):
        run(5.0)


def test_a_finished_directory_returns_its_result(tmp_path):
    first, second = stopped(tmp_path, 0), stopped(tmp_path, 0)
    assert first[1].num_forward == reference()[1].num_forward
    assert second[1].num_forward == 0
    assert bits(first) == bits(second) == bits(reference())


@pytest.mark.parametrize(
    ("named", "options", "arguments"),
    [
        ("num_steps", {"num_steps": T - 1}, {}),
        pytest.param("segment", {"segment": 6}, {}, marks=pytest.mark.slow),
        pytest.param("evaluate_at", {"evaluate_at": (5, T)}, {}, marks=pytest.mark.slow),
        pytest.param("losses, batch_at and optimizer", {"optimizer": "schedule"}, {}, marks=pytest.mark.slow),
        ("values of hyperparams", {}, {"hyperparams": {**HYPERPARAMS, "decay": jnp.array(-2.0)}}),
        pytest.param("key", {}, {"key": 8}, marks=pytest.mark.slow),
    ],
)
def test_the_directory_of_another_run_is_refused_by_name(named, options, arguments, tmp_path):
    begun = {"optimizer": "clipping"} if named.startswith("losses") else {}  # has a state of the same shape
    with pytest.raises(_StopError):
        stopped(tmp_path, 1, **begun)
    with pytest.raises(ValueError, match=rf"got one with (different )?{named}"):
        call(run_of(hg.stores.directory(tmp_path, 3), **options), **arguments)
    with pytest.raises(ValueError, match="slots 3, not 4"):
        call(run_of(hg.stores.directory(tmp_path, 4), **begun))


@pytest.mark.parametrize("what", ["batches", "loss"])
def test_a_directory_knows_the_data_that_functions_close_over(what, tmp_path):
    def run(scale):
        data, constant = (X * scale, Y) if what == "batches" else (X, Y), jnp.full(3, scale if what == "loss" else 1.0)
        loss = lambda w, h, batch, key: jnp.exp(h) * jnp.mean((batch[0] @ w - batch[1]) ** 2) + constant.sum()  # noqa: E731
        problem = hg.BilevelProblem(loss, loss)
        store = hg.stores.directory(tmp_path, 2)
        at = lambda i: hg.IndexedBatch(data, ROWS[i])  # noqa: E731
        fn = hg.metagradient(problem, optax.sgd(0.1), batch_at=at, num_steps=4, segment=2, store=store)
        return fn(jnp.zeros(4), jnp.zeros(()), (X, Y), key=None)

    assert run(1.0)[1].num_forward == 1
    assert run(1.0)[1].num_forward == 0
    with pytest.raises(
        ValueError, match=r"got one with different (data, and other constants|losses, batch_at and optimizer)"
    ):
        run(0.3)


@pytest.mark.parametrize("file", ["run.json", "position.json"])
def test_a_damaged_description_is_named(file, tmp_path):
    with pytest.raises(_StopError):
        stopped(tmp_path, 12)
    (tmp_path / file).write_text("{")
    with pytest.raises(ValueError, match=rf"{file} as .* wrote it; got .*damaged"):
        stopped(tmp_path, 0)


def test_a_directory_that_cannot_be_written_or_is_too_small_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / ("a" * 300)):
        with pytest.raises(OSError, match=r"expected a directory to keep states in; got .*(file|aaa)"):
            call(run_of(hg.stores.directory(path, 3)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"bytes of space in .*; got 100"):
        call(run_of(hg.stores.directory(tmp_path / "run", 3)))


def test_a_finished_directory_needs_no_space(tmp_path, monkeypatch):
    stopped(tmp_path, 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    assert bits(stopped(tmp_path, 0)) == bits(reference())


@pytest.mark.parametrize(
    "placed", ["anywhere", *(pytest.param(x, marks=pytest.mark.slow) for x in ("device", "mesh", "outer batch"))]
)
@pytest.mark.parametrize("store", [hg.stores.host(3), pytest.param(hg.stores.device(3), marks=pytest.mark.slow)])
def test_segments_of_one_length_compile_once(store, placed):
    """Forward, and differentiated with and without an outer loss at the end; λ is weakly typed at first."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    places = {"device": jax.devices()[0], "mesh": NamedSharding(mesh, PartitionSpec())}
    variables, outer_batch = (WEIGHTS, HYPERPARAMS), (X, Y)
    if placed in places:
        variables = jax.device_put(variables, places[placed])
    elif placed == "outer batch":
        outer_batch = jax.device_put(outer_batch, jax.devices()[0])
    run = _metagradient.Run(PROBLEM, OPTIMIZERS["Adam"], batch_at, T, 4, store, (4, 12, 16, 24))
    for given in (variables, jax.tree.map(jnp.array, jax.tree.map(np.asarray, variables))):
        given = given if placed not in places else jax.device_put(given, places[placed])
        _, info = _metagradient.Call(run, *given, outer_batch, 7, None).result()
        assert info.status == hg.MetagradientStatus.FINISHED
        assert np.isfinite(info.outer_losses).all()
    assert run.forward._cache_size() == 1
    assert run.reverse._cache_size() == 2


@pytest.mark.slow
def test_a_model_state_on_a_device_compiles_once():
    problem, variables, statistics, batch = batch_norm()
    at, rule = lambda i: batch, optax.sgd(0.01)
    run = _metagradient.Run(problem, rule, at, 8, 2, hg.stores.host(2), None)
    placed = jax.device_put(statistics, jax.devices()[0])
    _metagradient.Call(run, *variables, batch, 0, placed).result()
    assert (run.forward._cache_size(), run.reverse._cache_size()) == (1, 2)


def test_what_is_not_finite_has_a_status():
    high = {**HYPERPARAMS, "rate": jnp.full(T, 200.0)}
    (value, grad), info = call(run_of(hg.stores.host(3), optimizer="momentum"), hyperparams=high)
    assert info.status == hg.MetagradientStatus.TRAINING
    assert info.at_step == 5
    assert np.isnan(value)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grad))

    loss = lambda w, h, b, k: 0.5 * jnp.sum(h * w**2)  # noqa: E731
    rough = hg.metagradient(
        hg.BilevelProblem(loss, lambda w, h, b, k: jnp.sum(jnp.tanh(w))),
        optax.sgd(1.0),
        batch_at=lambda i: (),
        num_steps=60,
        segment=10,
    )
    (_, grad), info = rough(jnp.zeros(1), jnp.full(1, 1e4), (), key=None)  # w stays at 0, and d w_T / d w_0 = 1e240
    assert info.status == hg.MetagradientStatus.COTANGENT
    assert 0 < info.at_step < 60
    assert np.isnan(grad).all()

    steep = hg.BilevelProblem(lambda w, h, b, k: 1e20 * jnp.sum(h * w**2), lambda w, h, b, k: jnp.sum(w))
    adam = optax.adam(0.1, eps_root=1e-8)  # its second moment overflows, and its updates are then zero
    _, info = hg.metagradient(steep, adam, batch_at=lambda i: (), num_steps=4)(jnp.ones(2), 1.0, (), key=None)
    assert info.status == hg.MetagradientStatus.TRAINING

    hidden = hg.metagradient(
        hg.BilevelProblem(loss, lambda w, h, b, k: jnp.sum(jnp.log(w - 2.0))),
        optax.sgd(0.1),
        batch_at=lambda i: (),
        num_steps=4,
    )
    _, info = hidden(jnp.ones(1), jnp.ones(1), (), key=None)
    assert info.status == hg.MetagradientStatus.OUTER_LOSS


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "batch_at to be callable", lambda: run_of(hg.stores.host(), batch_at=3)),
        (
            TypeError,
            "jnp.asarray",
            lambda: call(run_of(hg.stores.host(), batch_at=lambda i: hg.IndexedBatch((X, Y), np.asarray(ROWS)[i]))),
        ),
        (TypeError, "slice", lambda: call(run_of(hg.stores.host(), batch_at=lambda i: (X[i : i + 3], Y[i : i + 3])))),
        (TypeError, "traced", lambda: call(run_of(hg.stores.host(), batch_at=lambda i: batch_at(i if i else 0)))),
        (TypeError, "store to be a Store", lambda: run_of("here")),
        (IndexError, "out of range", lambda: call(run_of(hg.stores.host(), batch_at=lambda i: ([X][3], Y)))),
        (TypeError, "evaluate_at to be a sequence", lambda: run_of(hg.stores.host(), evaluate_at=12)),
        (TypeError, "an entry of evaluate_at", lambda: run_of(hg.stores.host(), evaluate_at=[1, [2, 3]])),
        (ValueError, "num_steps", lambda: run_of(hg.stores.host(), num_steps=0)),
        (ValueError, "evaluate_at to be increasing", lambda: run_of(hg.stores.host(), evaluate_at=(5, 30))),
        (ValueError, "slots", lambda: hg.stores.host(0)),
        (
            ValueError,
            "eps_root",
            lambda: call(hg.metagradient(PROBLEM, optax.adam(0.1), batch_at=batch_at, num_steps=T)),
        ),
        (
            TypeError,
            "concrete arguments",
            lambda: jax.jit(lambda: call(run_of(hg.stores.host()), key=jnp.arange(2)[0]))(),
        ),
    ],
)
def test_refusals(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_a_hyperparameter_without_effect_is_refused():
    unused = {**HYPERPARAMS, "unused": jnp.zeros(2)}
    with pytest.raises(ValueError, match="unused"):
        call(run_of(hg.stores.host()), hyperparams=unused)


@pytest.mark.slow
def test_model_state_is_carried_and_differentiated():
    """A running mean of the inputs, which the outer loss uses: as of BatchNorm."""

    def inner(w, h, batch, key, mean):
        new = 0.9 * mean + 0.1 * (batch[0] * h).mean(0)
        return jnp.mean(((batch[0] - new) @ w - batch[1]) ** 2), new

    def outer(w, h, batch, key, mean):
        return jnp.mean(((batch[0] - mean) @ w - batch[1]) ** 2), mean

    problem = hg.BilevelProblem(inner, outer, stateful=True)
    batches = hg.IndexedBatch((X, Y), ROWS)
    given = {"key": None, "model_state": jnp.ones(4)}
    (value, grad), _ = hg.value_and_hypergrad(hg.unrolled(problem), optax.sgd(0.1))(
        WEIGHTS["w"], jnp.ones(4), batches, (X, Y), **given
    )
    at = lambda i: hg.IndexedBatch((X, Y), ROWS[i])  # noqa: E731
    fn = hg.metagradient(problem, optax.sgd(0.1), batch_at=at, num_steps=T, segment=7)
    (found, hypergrad), _ = fn(WEIGHTS["w"], jnp.ones(4), (X, Y), **given)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    np.testing.assert_allclose(hypergrad, grad, rtol=1e-4)


def test_a_plan_counts_what_is_then_done(tmp_path):
    settings = {"batch_at": batch_at, "num_steps": T, "segment": 5, "store": hg.stores.directory(tmp_path / "run", 3)}
    settings["evaluate_at"] = 5, 10, 15, 20, 24
    plan = hg.metagradient_plan(PROBLEM, OPTIMIZERS["Adam"], **settings)(WEIGHTS, HYPERPARAMS, (X, Y), key=7)
    info = reference()[1]
    assert plan.num_segments == len(info.boundaries) - 1 == 5
    assert plan.num_forward == info.num_forward
    assert not (tmp_path / "run").exists()
    assert plan.disk_bytes > 2 * STATE_BYTES
    assert plan.host_bytes == 0
    assert plan.device_bytes > 3 * STATE_BYTES
    # The last segment has four steps in place of five, and is not run forward; each ends with an outer loss.
    seconds = plan.num_forward * plan.forward_seconds + 4.8 * plan.reverse_seconds
    assert plan.seconds == pytest.approx(seconds)
    assert plan.forward_equivalents == pytest.approx(seconds / plan.forward_seconds)
    assert str(plan).startswith(f"5 segments of up to 5 steps, 3 slots: {plan.num_forward} segments run forward")


@pytest.mark.slow
def test_a_short_last_segment_does_not_stand_for_the_others():
    """200 steps by 100, and one more: all is at least what it was."""
    error = lambda w, h, batch, key: jnp.mean(jnp.tanh(jnp.eye(200) @ w) ** 2) + h * jnp.sum(w**2)  # noqa: E731
    problem = hg.BilevelProblem(error, lambda w, h, batch, key: jnp.sum(w**2))

    def planned(steps):
        fn = hg.metagradient_plan(problem, optax.sgd(0.1), batch_at=lambda i: (), num_steps=steps, segment=100)
        return fn(jnp.ones((200, 100)), jnp.array(0.1), (), key=None)

    one, even, more = planned(100), planned(200), planned(201)
    assert one.device_bytes <= even.device_bytes - 4 * 200 * 100  # the first state is the one that is differentiated
    assert more.num_segments == even.num_segments + 1 == 3
    assert more.device_bytes >= even.device_bytes
    assert more.reverse_seconds > 0.3 * even.reverse_seconds  # on a shared machine; of the last segment: 0.04


@pytest.mark.slow
def test_half_a_segment_takes_less_memory():
    """Also from 50 steps to 25: both have two levels of checkpoints."""
    wide = {"kernel": jnp.ones((400, 100))}
    loss = lambda w, h, batch, key: jnp.mean((w["kernel"] - h) ** 4)  # noqa: E731
    problem, rule = hg.BilevelProblem(loss, loss), optax.adam(1e-2, eps_root=1e-8)
    sizes = []
    for segment in (64, 50, 32, 25, 16, 8, 4):
        fn = hg.metagradient_plan(problem, rule, batch_at=lambda i: (), num_steps=200, segment=segment)
        sizes.append(fn(wide, jnp.array(0.5), (), key=None).device_bytes)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_a_plan_takes_fewer_slots_of_the_device_where_that_fits():
    def planned(slots, segment=2, **budget):
        settings = {"num_steps": T, "segment": segment, "store": hg.stores.device(slots)}
        fn = hg.metagradient_plan(PROBLEM, OPTIMIZERS["Adam"], batch_at=batch_at, **settings)
        return fn(WEIGHTS, HYPERPARAMS, (X, Y), key=7, **budget)

    three = planned(3)
    assert three.slots == 3
    found = planned(200, device_bytes=three.device_bytes)
    assert found.device_bytes <= three.device_bytes < planned(200).device_bytes
    assert found.segment * found.num_forward <= three.segment * three.num_forward
    again = planned(found.slots, segment=found.segment)
    assert again.device_bytes == found.device_bytes
    assert again.num_forward == found.num_forward
    with pytest.raises(ValueError, match="device_bytes"):
        planned(3, device_bytes=-5)
    with pytest.raises(ValueError, match=r"one step and one slot"):
        planned(3, device_bytes=100)


@pytest.mark.slow
def test_a_plan_fits_the_memory_or_says_that_nothing_does():
    make = hg.metagradient_plan(PROBLEM, OPTIMIZERS["Adam"], batch_at=batch_at, num_steps=T, segment=8)
    fn = functools.partial(make, WEIGHTS, HYPERPARAMS, (X, Y), key=7)
    whole = fn()
    less = fn(device_bytes=whole.device_bytes - 1)
    assert whole.host_bytes == 2 * STATE_BYTES  # of three segments; the first state is the one given
    assert (whole.segment, less.segment) in {(8, 4), (8, 2), (8, 1)}
    assert less.device_bytes < whole.device_bytes
    with pytest.raises(ValueError, match=r"expected a metagradient in 10 bytes; got .* of one step and one slot"):
        fn(device_bytes=10)


@pytest.mark.slow
def test_a_plan_on_a_mesh_counts_what_is_kept_on_one_device():
    """Each slot more of the device's store takes a quarter of weights and momenta."""
    mesh, size = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]), 4096
    variables = jax.device_put((jnp.ones(size), jnp.ones(size)), NamedSharding(mesh, PartitionSpec("d")))
    problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum((w - h) ** 2), lambda w, h, b, k: jnp.sum(w**2))

    def peak(slots):
        store = hg.stores.device(slots)
        settings = {"batch_at": lambda i: (), "num_steps": 20, "segment": 2, "store": store}
        plan = hg.metagradient_plan(problem, optax.sgd(0.1, momentum=0.9), **settings)
        return plan(*variables, (), key=None).device_bytes

    assert 0 <= peak(3) - peak(2) - 2 * variables[0].nbytes // 4 < 256  # the state has scalars, too


@pytest.mark.slow
def test_the_time_of_a_plan_is_that_of_the_run():
    """On a matrix that takes a millisecond a step: within 20 %, in the best of three."""
    size = 400
    loss = lambda w, h, batch, key: jnp.mean(jnp.square(jnp.tanh(batch @ w) - 1.0)) + jnp.exp(h) * jnp.sum(w**2)  # noqa: E731
    settings = {"batch_at": lambda i: jnp.full((size, size), 1e-3) * (1 + i), "num_steps": 300, "segment": 10}
    problem, at = hg.BilevelProblem(loss, loss), (0.1 * jnp.eye(size), jnp.array(-9.0), jnp.eye(size))
    fn = hg.metagradient(problem, optax.sgd(0.1), **settings)
    fn(*at, key=None)
    ratios = []
    for _ in range(3):
        plan = hg.metagradient_plan(problem, optax.sgd(0.1), **settings)(*at, key=None)
        ratios.append(fn(*at, key=None)[1].seconds / plan.seconds)
    assert min(abs(ratio - 1) for ratio in ratios) < 0.2


KILLED = """
import functools, os, signal, sys, threading, time
sys.path.insert(0, {root!r})
from tests import test_metagradient as m
import hypergrad as hg
store, left = hg.stores.directory({folder!r}, 3), [{after}]

def open_(about):
    kept = store.open(about)

    def counted(fn, *args):
        left[0] -= 1
        if left[0] == 0:
            threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if left[0] == -3:  # however short the calls, three at most are made until the kill
            time.sleep(60)
        fn(*args)

    for name in ("put", "record", "drop"):
        setattr(kept, name, functools.partial(counted, getattr(kept, name)))
    return kept

result = m.call(m.run_of(store._replace(open=open_), segment=2, num_steps=300))
print([x.hex() for x in m.bits(result)], left[0])
"""


@pytest.mark.slow
def test_a_process_killed_ten_times_goes_on_and_ends_with_the_same_bits(tmp_path):
    """150 segments with three slots. Each kill is up to 20 ms after the start of some call of the store."""
    root = str(os.path.dirname(os.path.dirname(__file__)))

    def started(folder, after, delay=0.0):
        code = KILLED.format(root=root, after=after, delay=delay, folder=str(tmp_path / folder))
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)

    whole = started("whole", -10)
    assert whole.returncode == 0, whole.stderr[-2000:]
    values, _, left = whole.stdout.rpartition(" ")
    calls, rng = -10 - int(left), np.random.default_rng(0)
    for _ in range(10):
        killed = started("killed", rng.integers(1, calls // 20), rng.uniform(0.0, 0.02))
        assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    done = started("killed", -10)
    assert done.returncode == 0, done.stderr[-2000:]
    again, _, left = done.stdout.rpartition(" ")
    assert again == values
    assert calls // 4 < -10 - int(left) < calls
    assert [file.name for file in sorted((tmp_path / "killed").iterdir())] == [
        file.name for file in sorted((tmp_path / "whole").iterdir())
    ]
