"""Eight devices, and two processes, give the answer of one; shardings are kept."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hypergrad as hg
from tests import two_processes
from tests.problems import relative_error

ESTIMATORS = {
    "neumann": lambda problem: hg.implicit(problem, hg.solvers.neumann(10)),
    "cg": lambda problem: hg.implicit(problem, hg.solvers.cg(10, damping=1.0, warm_start=True)),
    "unrolled": lambda problem: hg.unrolled(problem, hg.reverse(2)),
}


def sharded_over(mesh, variables, batch):
    """Split the first kernel by columns, the second by rows, batches by examples; biases are copied."""
    specs = {"first": {"kernel": P(None, "d"), "bias": P("d")}, "second": {"kernel": P("d", None), "bias": P()}}
    put = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)  # noqa: E731
    return hg.BilevelParams(put(variables.params), put(variables.hyperparams)), jax.device_put(
        batch, NamedSharding(mesh, P("d"))
    )


@pytest.mark.parametrize(
    ("name", "window"),
    [("neumann", 1), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("cg", 2), ("unrolled", 4)))],
)
def test_eight_devices_give_the_answer_of_one(name, window):
    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()), ("d",))
    problem, variables, batch = two_processes.problem()
    tx = hg.bilevel(
        ESTIMATORS[name](problem),
        inner_optimizer=optax.adam(1e-2, eps_root=1e-8),
        outer_optimizer=optax.adam(1e-1, eps=1e-4),  # smaller, it blows up the rounding of entries that are nearly 0
        window=window,
    )

    def step(variables, state, batch):
        inner = batch if window == 1 else jax.tree.map(lambda x: jnp.stack([x] * window), batch)
        updates, state = tx.update(None, state, variables, inner_batch=inner, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    results = []
    for v, b in ((variables, batch), sharded_over(mesh, variables, batch)):
        state = tx.init(v)
        first, run = state, jax.jit(step)
        before = v
        for _ in range(3):
            v, state = run(v, state, b)
        results.append((v, state))
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), before, v)
        assert jax.tree.all(same)
        kept = jax.tree.map(
            lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), first.estimator, state.estimator
        )
        assert jax.tree.all(kept)
    one, eight = results
    assert relative_error(eight[0], one[0]) < 1e-5
    assert float(eight[1].info.hypergrad_norm) == pytest.approx(float(one[1].info.hypergrad_norm), rel=1e-4)
    kernel = eight[0].params["first"]["kernel"]
    assert len({shard.device for shard in kernel.addressable_shards}) == 8
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 8)


@pytest.mark.slow
def test_self_tuning_on_eight_devices_gives_the_answer_of_one():
    """Examples and a kernel's columns are spread over devices; each example's perturbation stays what it was."""
    mesh = Mesh(np.array(jax.devices()), ("d",))
    net = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(3)])
    x, y = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 3

    def loss(w, rate, batch, key):
        logits = net.apply({"params": w}, hg.noise.dropout(key, batch[0], rate) if key is not None else batch[0])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    plain = hg.BilevelProblem(loss, lambda w, rate, batch, key: loss(w, rate, batch, None))
    problem = hg.reparameterize(plain, hg.bijectors.interval(0.0, 0.9))
    problem = hg.responses.perturbed(hg.responses.self_tuning(problem), scale=0.5)
    tx = hg.bilevel(hg.direct(problem), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(1.0), every=2)
    weights, rate = net.init(jax.random.key(1), x)["params"], jnp.array(-1.0)
    split = jax.tree.map(
        lambda w: jax.device_put(w, NamedSharding(mesh, P(*(None,) * (w.ndim - 1), "d") if w.shape[-1] == 16 else P())),
        weights,
    )
    results = []
    for start, place in ((weights, P()), (split, P("d"))):
        batch = (x, y) if start is weights else jax.device_put((x, y), NamedSharding(mesh, place))
        variables = hg.BilevelParams(hg.responses.init(problem, 0, start, rate, batch), rate)
        state, step = tx.init(variables), jax.jit(tx.update)
        for _ in range(4):
            updates, state = step(None, state, variables, inner_batch=batch, outer_batch=batch)
            variables = optax.apply_updates(variables, updates)
        results.append(variables)
    one, eight = results
    assert relative_error(eight, one) < 1e-5
    assert float(one.hyperparams) != -1.0
    kernel = eight.params.params["layers_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 2)


def test_init_keeps_shardings_in_the_solver_state():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    problem, variables, batch = two_processes.problem()
    variables, _ = sharded_over(mesh, variables, batch)
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.neumann(3)), inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1)
    )
    direction = tx.init(variables).estimator.direction
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), direction, variables.params)
    assert jax.tree.all(same)


@pytest.mark.slow
def test_two_processes_give_the_answer_of_one():
    """Two processes of two devices each, over ``jax.distributed`` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-m", "tests.two_processes", str(port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    workers = [
        subprocess.Popen([*command, str(i)], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors.decode()[-3000:]
    results = [json.loads(out.decode().splitlines()[-1]) for out, _ in outputs]
    want = two_processes.train(two_processes.problem()[1], two_processes.problem()[2])
    for result in results:
        assert result["devices"] == 4
        assert result["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert result["hyperparams"] == pytest.approx(want["hyperparams"], rel=1e-4)
        assert result["residual"] == pytest.approx(want["residual"], rel=1e-3)


@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def test_the_first_step_under_a_mesh_compiles_once(kind):
    """Scalars that ``init`` makes live on the variables' mesh, so that the second step has the same shardings."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))
    problem, variables, batch = two_processes.problem()
    axes = lambda x: P(*[None] * x.ndim) if kind == "Explicit" else P()  # noqa: E731
    variables = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, axes(x))), variables)
    batch = jax.device_put(batch, NamedSharding(mesh, P("d")))
    tx = hg.bilevel(
        hg.implicit(problem, hg.solvers.neumann(2)), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(1e-1)
    )

    @functools.partial(jax.jit, donate_argnums=1)  # placing a scalar must not make two leaves share a buffer
    def step(variables, state, batch):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    with jax.set_mesh(mesh):
        state = tx.init(variables)
        assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(state))
        for _ in range(3):
            variables, state = step(variables, state, batch)
    assert step._cache_size() == 1
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(variables))
