"""Eight devices, and two processes, give the answer of one; shardings are kept."""

import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import hypergrad as hg
from tests import two_processes
from tests.problems import relative_error

ROOT = pathlib.Path(__file__).parent.parent


def _preconditioned(solver, preconditioner):
    return lambda problem: hg.implicit(problem, solver(preconditioner=preconditioner), diagonal=lambda w, decay: decay)


ESTIMATORS = {
    "default": hg.implicit,
    "neumann": lambda problem: hg.implicit(problem, hg.solvers.neumann(10)),
    "neumann_jacobi": _preconditioned(functools.partial(hg.solvers.neumann, 5), hg.preconditioners.jacobi()),
    "cg": lambda problem: hg.implicit(problem, hg.solvers.cg(10, damping=1.0, warm_start=True)),
    "cg_kept": lambda problem: hg.implicit(problem, hg.solvers.cg(5, damping=1.0, reorthogonalize=True)),
    "cg_jacobi": _preconditioned(functools.partial(hg.solvers.cg, 5, damping=1.0), hg.preconditioners.jacobi()),
    "cg_nystrom": _preconditioned(
        functools.partial(hg.solvers.cg, 5, damping=1.0), hg.preconditioners.nystrom(3, every=2)
    ),
    "recycled_cg": lambda problem: hg.implicit(
        problem, hg.solvers.recycled_cg(4, 3, relative_damping=0.1), diagonal=lambda w, decay: decay
    ),
    "richardson": lambda problem: hg.implicit(problem, hg.solvers.richardson(2, momentum=0.5)),
    "gmres": lambda problem: hg.implicit(problem, hg.solvers.gmres(6, 4, warm_start=True)),
    "dense": lambda problem: hg.implicit(problem, hg.solvers.dense(damping=1.0)),
    "unrolled": lambda problem: hg.unrolled(problem, hg.reverse(2)),
    "unrolled_persistent": lambda problem: hg.unrolled(problem, hg.forward(persistent=True)),
    "evolution_persistent": lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=4, persistent=True),
    "evolution": lambda problem: hg.evolution(problem, sigma=0.1, num_pairs=4),
    "partition": lambda problem: hg.partition(
        {"solve": hg.implicit(problem), "roll": hg.unrolled(problem)}, {"first": "solve", "second": "roll"}
    ),
}
WINDOWS = {"cg": 2, "unrolled": 4, "unrolled_persistent": 2, "evolution_persistent": 2, "evolution": 2, "partition": 2}


def sharded_over(mesh, variables, batch):
    """Split the first kernel by columns, the second by rows, batches by examples; biases are copied."""
    specs = {"first": {"kernel": P(None, "d"), "bias": P("d")}, "second": {"kernel": P("d", None), "bias": P(None)}}
    put = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)  # noqa: E731
    explicit = AxisType.Explicit in mesh.axis_types  # one explicit axis cannot split both sides of a product
    batch = jax.device_put(batch, NamedSharding(mesh, P() if explicit else P("d")))
    return hg.BilevelParams(put(variables.params), put(variables.hyperparams)), batch


def same_shardings(a, b):
    """Return whether each leaf lies on the same devices in the same pieces."""
    return jax.tree.all(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), a, b))


def split_like(weights, state):
    """Return how many leaves of a state are vectors, or blocks of them; each is split over devices as its weight is."""
    name = jax.tree_util.keystr
    pieces = {name(path): w.sharding.shard_shape(w.shape) for path, w in jax.tree.leaves_with_path(weights)}
    count = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        for weight, piece in pieces.items():
            if name(path).endswith(weight):
                assert leaf.sharding.shard_shape(leaf.shape)[leaf.ndim - len(piece) :] == piece, name(path)
                count += 1
    return count


@functools.cache
def three_steps(name, kind):
    """Return the variables and the state before and after three joint steps on one device, or on eight of a mesh."""
    explicit = kind == "Explicit"
    problem, variables, batch = two_processes.problem(P(None, None) if explicit else None)
    window = WINDOWS.get(name, 1)
    tx = hg.bilevel(
        ESTIMATORS[name](problem),
        inner_optimizer=optax.adam(1e-2, eps_root=1e-8),
        outer_optimizer=optax.adam(1e-1, eps=1e-4),  # smaller, it blows up the rounding of entries that are nearly 0
        window=window,
        guard=hg.guard(max_residual=math.inf),  # three damped products on far weights
    )

    @jax.jit
    def step(variables, state, batch):
        inner = batch if window == 1 else jax.tree.map(lambda x: jnp.stack([x] * window), batch)
        updates, state = tx.update(None, state, variables, inner_batch=inner, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    context = contextlib.nullcontext()
    if kind is not None:
        mesh = jax.make_mesh((8,), ("d",), axis_types=(getattr(AxisType, kind),))
        variables, batch = sharded_over(mesh, variables, batch)
        context = jax.set_mesh(mesh) if explicit else context
    with context:
        before = variables, tx.init(variables)
        after = before
        for _ in range(3):
            after = step(*after, batch)
    return before, after


CASES = [(name, kind) for name in ESTIMATORS for kind in ("Auto", "Explicit")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case != ("default", "Auto"))) for case in CASES],
)
def test_eight_devices_give_the_answer_of_one(name, kind):
    assert jax.device_count() == 8
    (start, first), (variables, state) = three_steps(name, kind)
    _, (alone, alone_state) = three_steps(name, None)
    assert same_shardings(start, variables)
    assert same_shardings(first.estimator, state.estimator)
    held = state.estimator
    if name == "unrolled_persistent":  # the tangents of the weights are the first rows
        structure = jax.tree.structure(variables.params)
        held = jax.tree.unflatten(structure, held.rows[: structure.num_leaves])
    if jax.tree.leaves(held):
        assert split_like(variables.params, held) > 0
    assert relative_error(variables, alone) < 1e-5
    assert int(state.info.num_skipped) == 0
    assert float(state.info.hypergrad_norm) == pytest.approx(float(alone_state.info.hypergrad_norm), rel=1e-4)
    kernel = variables.params["first"]["kernel"]
    assert len({shard.device for shard in kernel.addressable_shards}) == 8
    assert kernel.addressable_shards[0].data.shape == (kernel.shape[0], kernel.shape[1] // 8)


@pytest.mark.slow
def test_on_explicit_axes_a_state_from_one_device_moves_to_its_weights():
    """As one that was restored; the solver contracts blocks of vectors over the axis that is split."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    weights, batch = jnp.linspace(0.0, 1.0, 16), jnp.linspace(1.0, 2.0, 16)
    problem = hg.BilevelProblem(
        lambda w, h, b, k: (0.5 * jnp.exp(h) * w**2 - b * w).sum(), lambda w, h, b, k: ((w - b) ** 2).sum()
    )
    estimator = hg.implicit(problem, hg.solvers.recycled_cg(3, 2))
    tx = hg.bilevel(estimator, inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.adam(0.1))
    step = jax.jit(lambda v, s: tx.update(None, s, v, inner_batch=batch, outer_batch=batch))
    alone = hg.BilevelParams(weights, weights)
    state = tx.init(alone)
    with jax.set_mesh(mesh):
        split = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("d"))), alone)
        updates, moved = step(split, state)
        _, info = hg.value_and_hypergrad(estimator)(*split, batch, batch, key=None, state=state.estimator)
    wanted, _ = step(alone, state)
    assert relative_error(updates, wanted) < 1e-5
    for found in (moved.estimator, info.state):
        assert found.solution.sharding.spec == moved.outer[0].mu.sharding.spec == P("d")
        assert found.basis.sharding.spec == P(None, "d")


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


def together(*commands):
    """Run Python on arguments as processes that wait for each other, on CPUs; return what they print."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, *map(str, c)], cwd=ROOT, env=environment, **pipes) for c in commands]
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-3000:]
    return [out for out, _ in outputs]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def example(folder, *, steps, model=1, devices=1, processes=1):
    """Train by the example, over processes of so many devices each; it saves, and goes on from what was saved."""
    command = ["examples/frameworks/multi_host.py", "--folder", folder, "--steps", steps, "--model", model]
    command += ["--cpu-devices", devices]
    if processes == 1:
        return together(command)
    shared = ["--address", f"127.0.0.1:{free_port()}", "--processes", processes, "--index"]
    return together(*([*command, *shared, index] for index in range(processes)))


def saved(folder, step):
    """Return the arrays of a checkpoint, by name."""
    with ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), manager.item_metadata(step))
        found = manager.restore(step, args=ocp.args.StandardRestore(like))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(found)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What eight steps on one device end with."""
    folder = tmp_path_factory.mktemp("alone")
    example(folder, steps=8)
    return saved(folder, 8)


def equal_to_rounding(found, wanted):
    """Weights, hyperparameters, both optimizers' states, the solver's, and what is known of the last outer step."""
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        if np.issubdtype(leaf.dtype, np.floating):
            assert np.linalg.norm(found[name] - leaf) <= 1e-5 * np.linalg.norm(leaf), name
        else:
            np.testing.assert_array_equal(found[name], leaf, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("model", [1, 2])
def test_two_processes_give_the_answer_of_one(model, alone, tmp_path):
    """Of two devices each, over ``jax.distributed`` on loopback: split by examples, and by hidden units, too."""
    for index, out in enumerate(example(tmp_path, steps=8, model=model, devices=2, processes=2)):
        assert f"process {index}: steps 0 to 8 on" in out
        assert f"(16, 64), (16, {64 // model}) on each device" in out
    equal_to_rounding(saved(tmp_path, 8), alone)


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_on_one_device_and_on_four(alone, tmp_path):
    begun = tmp_path / "begun"
    example(begun, steps=4, model=2, devices=2, processes=2)
    for devices, model in ((1, 1), (4, 2), (4, 4)):
        folder = tmp_path / f"{devices}_{model}"
        shutil.copytree(begun, folder)
        (out,) = example(folder, steps=8, model=model, devices=devices)
        assert "process 0: steps 4 to 8 on" in out
        assert f"(16, 64), (16, {64 // model}) on each device" in out
        equal_to_rounding(saved(folder, 8), alone)


@pytest.mark.slow
def test_other_drivers_in_two_processes_give_the_answer_of_one():
    """But for stores of one process, which are refused by name."""
    port = free_port()
    outputs = together(*(["-m", "tests.two_processes", port, index] for index in range(2)))
    want = two_processes.drive(*two_processes.convex()[1:])
    for output in outputs:
        found = json.loads(output.splitlines()[-1])
        assert found["devices"] == 4
        for driver, figures in want.items():
            assert found[driver] == pytest.approx(figures, rel=1e-4), driver
        for store in ("host", "directory"):
            assert f"states that one process can keep in the {store}; got" in found["refused"][store]
    assert want["minimize"][2] == 2


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["device", pytest.param("mesh of one", marks=pytest.mark.slow)])
def test_variables_put_on_one_device_compile_once(kind):
    device: object = jax.devices()[1]
    if kind != "device":
        device = NamedSharding(
            jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[1:2]), P()
        )
    loss = lambda w, h, batch, key: jnp.mean((batch @ w) ** 2) + hg.penalties.l2(w, h)  # noqa: E731
    problem = hg.BilevelProblem(loss, loss)
    tx = hg.bilevel(hg.implicit(problem), inner_optimizer=optax.adam(1e-2), outer_optimizer=optax.adam(1e-1))
    variables, batch = jax.device_put((hg.BilevelParams(jnp.ones(3), jnp.ones(3)), jnp.eye(3)), device)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(variables, state, batch):
        updates, state = tx.update(None, state, variables, inner_batch=batch, outer_batch=batch)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _ in range(2):
        variables, state = step(variables, state, batch)
    assert step._cache_size() == 1
