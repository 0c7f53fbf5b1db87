"""Comparisons, horizons, ends of the spectrum, the retraining test and Newton's method, against closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import hypergrad as hg
from hypergrad import tree
from hypergrad.diagnostics._base import readable
from hypergrad.inner_solvers._newton_cg import newton
from hypergrad.solvers import Status
from tests import problems

D = hg.diagnostics


@pytest.mark.usefixtures("x64")
def test_compare_gives_cosine_norm_ratio_and_error_of_a_truncated_series():
    example = problems.ridge()
    point = example.variables, example.inner_batch, example.outer_batch
    methods = {
        "neumann": hg.implicit(example.problem, hg.solvers.neumann(3, 0.3)),
        "cg": hg.value_and_hypergrad(hg.implicit(example.problem, hg.solvers.cg(50, 1e-10))),
        "function": hg.value_and_hypergrad(hg.implicit(example.problem, hg.solvers.neumann(3, 0.3))),
    }
    by_gradient = D.compare(methods, example.exact, *point, key=None)
    again = {name: methods[name] for name in ("function", "cg")}
    by_estimator = D.compare(again, hg.implicit(example.problem, hg.solvers.dense()), *point, key=None)
    few, right, same = by_gradient.rows
    got, want = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(each)])
        for each in (methods["function"](*example.variables, *point[1:], key=None)[0][1], example.exact)
    )
    assert few.cosine == pytest.approx(got @ want / np.linalg.norm(got) / np.linalg.norm(want), rel=1e-9)
    assert few.norm_ratio == pytest.approx(np.linalg.norm(got) / np.linalg.norm(want), rel=1e-9)
    assert few.error == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want), rel=1e-9)
    assert few[1:6] == pytest.approx(same[1:6], rel=1e-12)
    assert right.error < 1e-8
    assert right.residual < 1e-10 < few.residual
    assert [row.error for row in by_estimator.rows] == pytest.approx([few.error, right.error], abs=1e-7)
    assert set(few.leaves) == {"['a']", "['b'][0]", "['b'][1]['c']"}
    assert [line.split()[0] for line in str(by_gradient).splitlines()[2:]] == list(methods)


def test_compare_refuses_what_cannot_be_compared():
    example = problems.ridge()
    point = example.variables, example.inner_batch, example.outer_batch
    method = {"cg": hg.implicit(example.problem, hg.solvers.cg(5))}
    with pytest.raises(TypeError, match="by name"):
        D.compare(method["cg"], example.exact, *point, key=None)
    with pytest.raises(TypeError, match="an estimator or a function"):
        D.compare({"cg": 3}, example.exact, *point, key=None)
    with pytest.raises(TypeError, match=r"\(\(value, hypergrad\), info\)"):
        D.compare({"cg": hg.hypergrad(method["cg"])}, example.exact, *point, key=None)
    with pytest.raises(ValueError, match="structure of the hyperparameters"):
        D.compare(method, {"a": jnp.ones(2)}, *point, key=None)
    with pytest.raises(ValueError, match="finite hypergradient other than zero"):
        D.compare(method, optax.tree.zeros_like(example.exact), *point, key=None)


def test_names_of_leaves_are_readable():
    names = ["['a']['b']", "['a'][0].c", "['conv']['kernel'].value", ".w", ""]
    assert [readable(name) for name in names] == ["a.b", "a.0.c", "conv.kernel", "w", ""]
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert [readable(name) for name in tree.leaf_names(state)] == ["bias", "kernel"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_short_horizons_push_a_learning_rate_the_other_way():
    """w ← w − r(c w + noise): derivatives in closed form for one step, by the recursion itself for all."""
    curved, noise = jnp.array([1.0, 0.02]), jnp.tile(jnp.array([0.5, -0.5]), 32)
    inner = lambda w, rate, batch, key: 0.5 * jnp.sum(curved * w**2) + batch * w[0]  # noqa: E731
    outer = lambda w, rate, batch, key: 0.5 * jnp.sum(curved * w**2)  # noqa: E731
    at = hg.BilevelParams(jnp.array([0.0, 10.0]), jnp.array(0.7))
    estimator, options = hg.unrolled(hg.BilevelProblem(inner, outer)), {"inner_optimizer": optax.sgd, "key": None}
    found = D.horizon_bias(estimator, at, noise, (), horizons=[16, 1], **options)
    assert found.horizons == (1, 16, 64)
    assert [round(row.cosine) for row in found.rows] == [-1, 1, 1]
    one = 0.7 * 0.5**2 - 0.02 * 0.2 * 10 * (1 - 0.7 * 0.02) * 10 * 0.1  # Σ c w₁ dw₁/dr

    def after(rate):
        w = at.params
        for n in noise:
            w = w - rate * (curved * w + jnp.array([n, 0.0]))
        return outer(w, rate, (), None)

    slope = float(jax.grad(after)(0.7))
    assert found.rows[0].norm_ratio == pytest.approx(abs(one / slope), rel=1e-9)
    assert "opposed to it, with their cosine: 1 (-1)" in str(found)
    with pytest.raises(ValueError, match="differentiates steps"):
        D.horizon_bias(hg.implicit(estimator.problem, hg.solvers.cg(5)), at, noise, (), **options)
    with pytest.raises(TypeError, match="horizons as a sequence"):
        D.horizon_bias(estimator, at, noise, (), horizons=4, **options)
    with pytest.raises(ValueError, match="horizons of at most 64"):
        D.horizon_bias(estimator, at, noise, (), horizons=[100], **options)


@pytest.mark.usefixtures("x64")
def test_lanczos_finds_both_ends_of_an_indefinite_hessian():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))
    matrix = jnp.asarray(matrix + matrix.T)
    point = jnp.asarray(rng.normal(size=6))

    def inner(w, h, batch, key):
        v = problems.vector_of(w)
        return 0.5 * v @ batch @ v + jnp.sum(v**4) / 12

    problem, at = hg.BilevelProblem(inner, inner), hg.BilevelParams(problems.tree_of(point), jnp.ones(1))
    exact = jnp.linalg.eigvalsh(matrix + jnp.diag(point**2))
    look = jax.jit(
        lambda at, steps: D.extreme_eigenvalues(problem, at, matrix, key=None, num_steps=steps), static_argnums=1
    )
    found, few = look(at, 30), look(at, 3)
    assert float(found.largest) == pytest.approx(float(exact[-1]), rel=1e-8)
    assert float(found.smallest) == pytest.approx(float(exact[0]), rel=1e-8)
    assert found.smallest < 0
    assert float(found.safe_step) == pytest.approx(1 / float(jnp.abs(exact).max()), rel=1e-8)
    assert int(found.num_steps) == 6
    assert "cg needs damping" in str(found)
    for value, error in ((few.largest, few.largest_error), (few.smallest, few.smallest_error)):
        assert float(jnp.abs(exact - value).min()) <= float(error) + 1e-12
        assert exact[0] - 1e-12 <= value <= exact[-1] + 1e-12
    assert few.largest_error > 1e-6


def test_lanczos_of_small_and_of_definite_hessians():
    inner = lambda w, h, batch, key: 1.5 * jnp.sum(w**2)  # noqa: E731
    problem = hg.BilevelProblem(inner, inner)
    found = D.extreme_eigenvalues(problem, hg.BilevelParams(jnp.ones(5), jnp.ones(1)), (), key=0)
    assert int(found.num_steps) == 1  # every vector is an eigenvector of 3 I
    assert float(found.largest) == float(found.smallest) == pytest.approx(3.0)
    assert float(found.negative_share) == 0.0
    assert "positive definite as far as seen" in str(found)
    flat = hg.BilevelProblem(lambda w, h, batch, key: jnp.sum(w**2) - w @ w + jnp.sum(w) ** 2, inner)
    singular = D.extreme_eigenvalues(flat, hg.BilevelParams(jnp.ones(5), jnp.ones(1)), (), key=0)
    assert "singular to rounding" in str(singular)
    nothing = hg.BilevelProblem(lambda w, h, batch, key: jnp.sum(w**2) * jnp.nan, inner)
    broken = D.extreme_eigenvalues(nothing, hg.BilevelParams(jnp.ones(2), jnp.ones(1)), (), key=None, num_steps=2)
    assert not float(broken.largest) > 0
    assert "not finite" in str(broken)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_lanczos_tells_the_safe_step_of_a_neumann_series():
    example = problems.ridge(spread=3.0)
    step = float(D.extreme_eigenvalues(example.problem, example.variables, example.inner_batch, key=None).safe_step)
    for factor, sound in ((0.98, True), (1.02, False)):  # of the step from which on the series diverges
        solver = hg.solvers.neumann(2000, step_size=2 * step * factor)
        fn = hg.value_and_hypergrad(hg.implicit(example.problem, solver))
        _, info = fn(*example.variables, example.inner_batch, example.outer_batch, key=None)
        assert bool(info.solver.converged) == sound


def mean_estimation():
    """w* = λ: what is learned is where λ is, whatever the jointly trained weights."""
    inner = lambda w, h, batch, key: jnp.sum((w["w"] - h["h"] - batch) ** 2)  # noqa: E731
    outer = lambda w, h, batch, key: jnp.sum((w["w"] - batch) ** 2)  # noqa: E731
    return hg.BilevelProblem(inner, outer)


def test_retrain_scores_jointly_trained_and_fresh_weights_with_minibatches():
    problem, target = mean_estimation(), jnp.array([1.0, 2.0])
    variables = hg.BilevelParams({"w": target}, {"h": target + 1})
    found = D.retrain(
        problem,
        variables,
        lambda key: {"w": jax.random.normal(key, (2,))},
        lambda step, key: 0.1 * jnp.where(step % 2 == 0, 1.0, -1.0) + 0.0 * jax.random.normal(key),
        target,
        inner_optimizer=optax.sgd(0.01),
        num_steps=2001,
        key=0,
        num_starts=2,
        score=lambda w, batch: {"distance": jnp.sum(jnp.abs(w["w"] - batch))},
        baseline={"h": target + 2},
    )
    assert found.baseline["distance"] == pytest.approx(4.0, abs=0.02)
    assert str(found).splitlines()[2].split()[0] == "distance"
    assert float(found.jointly_trained["distance"]) == 0.0
    assert found.retrained["distance"] == pytest.approx(2.0, abs=0.02)  # λ is one off in both entries
    assert found.params["w"].shape == (2, 2)
    assert found.finite.all()
    assert "not in the values" in str(found)
    cold = D.retrain(
        problem,
        variables._replace(params={"w": target + 1}),
        lambda key: {"w": jnp.zeros(2)},
        jnp.zeros(()),
        target,
        inner_optimizer=optax.sgd(0.5),
        num_steps=5,
        key=jax.random.key(0),
    )
    assert float(cold.jointly_trained) == pytest.approx(2.0)
    assert cold.baseline == ()
    assert "jointly trained and retrained weights are equal" in str(cold)


def test_retrain_draws_weights_batches_and_losses_from_keys_of_their_own():
    """Linear in what is drawn, with steps of 1: weights end at the start less the sum of all draws."""
    problem = hg.BilevelProblem(
        lambda w, h, batch, key: w * (batch + 10 * jax.random.uniform(key)), lambda w, h, batch, key: w + h
    )
    found = D.retrain(
        problem,
        hg.BilevelParams(jnp.zeros(()), jnp.zeros(())),
        lambda key: 100 * jax.random.uniform(key),
        lambda step, key: step + jax.random.uniform(key),
        (),
        inner_optimizer=optax.sgd(1.0),
        num_steps=3,
        key=7,
        num_starts=2,
    )
    wanted, uniform = [], lambda key, i: float(jax.random.uniform(jax.random.fold_in(key, i)))
    for key in jax.random.split(jax.random.fold_in(jax.random.key(7), 1), 2):
        start, batch, loss = jax.random.split(key, 3)
        drawn = sum(i + uniform(batch, i) + 10 * uniform(loss, i) for i in range(3))
        wanted.append(100 * float(jax.random.uniform(start)) - drawn)
    np.testing.assert_allclose(found.retrained, wanted, rtol=1e-5)


def test_retrain_follows_model_state_responses_and_optimizers_of_hyperparameters():
    problem, variables, model_state, batch = problems.batch_norm()
    model = problems._Normalized()

    def init(key):
        start = model.init(key, batch[0], train=False)
        return start["params"], start["batch_stats"]

    options = {"inner_optimizer": optax.sgd(0.5), "num_steps": 40, "key": 0, "num_starts": 2}
    found = D.retrain(problem, variables, init, batch, batch, model_state=model_state, **options)
    assert (found.retrained < float(found.jointly_trained)).all()  # the weights given were not trained at all

    rated = hg.reparameterize(mean_estimation(), hg.bijectors.exp())
    at = hg.BilevelParams({"w": jnp.zeros(1)}, {"h": jnp.zeros(1)})
    options |= {"inner_optimizer": lambda h: optax.sgd(0.5 * h["h"][0])}
    found = D.retrain(rated, at, lambda key: {"w": jnp.ones(1) * 5}, jnp.zeros(()), jnp.zeros(()), **options)
    assert found.retrained.tolist() == [1.0, 1.0]  # a step of rate 1/2 goes all the way to exp(0)

    learned = hg.responses.with_response(mean_estimation(), hg.responses.linear())
    response = hg.responses.init(learned, 0, {"w": jnp.ones(1)}, {"h": jnp.ones(1)}, jnp.zeros(()))
    at = hg.BilevelParams(response, {"h": jnp.ones(1)})
    options |= {"inner_optimizer": optax.sgd(0.5)}
    found = D.retrain(learned, at, lambda key: {"w": jnp.zeros(1)}, jnp.zeros(()), jnp.zeros(()), **options)
    assert (float(found.jointly_trained), *found.retrained.tolist()) == (1.0, 1.0, 1.0)


def test_retrain_says_which_starts_diverged_and_refuses_other_weights():
    problem, at = mean_estimation(), hg.BilevelParams({"w": jnp.zeros(2)}, {"h": jnp.zeros(2)})
    options = {"inner_optimizer": optax.sgd(3.0), "num_steps": 200, "key": 0}
    found = D.retrain(problem, at, lambda key: {"w": jnp.ones(2)}, jnp.zeros(()), jnp.zeros(()), **options)
    assert not found.finite.any()
    assert "all 3 starts diverged" in str(found)
    half = found._replace(finite=np.array([True, True, False]), retrained=np.array([1.0, 1.2, np.inf]))
    assert "1 of the starts diverged" in str(half)
    assert "1.1" in str(half).splitlines()[2].split()  # the mean of those that did not
    assert "may be chance" in str(half._replace(jointly_trained=np.array(1.3)))
    with pytest.raises(ValueError, match="score to return scalars"):
        D.retrain(problem, at, lambda key: at.params, jnp.zeros(()), (), score=lambda w, _: w["w"], **options)
    with pytest.raises(ValueError, match=r"init\(key\)"):
        D.retrain(problem, at, lambda key: {"w": jnp.ones(3)}, jnp.zeros(()), jnp.zeros(()), **options)
    with pytest.raises(ValueError, match="baseline with the structure of the hyperparameters"):
        D.retrain(problem, at, lambda key: at.params, (), (), baseline={"g": jnp.zeros(2)}, **options)
    with pytest.raises(TypeError, match="init to be callable"):
        D.retrain(problem, at, at.params, jnp.zeros(()), jnp.zeros(()), **options)
    with pytest.raises(ValueError, match="num_steps"):
        D.retrain(problem, at, lambda key: at.params, (), (), **(options | {"num_steps": 0}))


@pytest.mark.usefixtures("x64")
def test_newton_reaches_the_rounding_of_float64_also_from_afar():
    valley = lambda w: (1 - w["a"]) ** 2 + 100 * (w["b"][0] - w["a"] ** 2) ** 2  # noqa: E731           Rosenbrock
    found = jax.jit(lambda w: newton(valley, w))({"a": jnp.array(-1.2), "b": jnp.array([1.0])})
    assert found.converged
    assert float(found.params["a"]) == pytest.approx(1.0, abs=1e-10)
    saddle = lambda w: 0.25 * jnp.sum(w**4) - 0.5 * jnp.sum(w**2)  # noqa: E731   indefinite at the start; minima at ±1
    found = newton(saddle, jnp.array([0.1, -0.3]))
    assert found.converged
    assert found.params.tolist() == pytest.approx([1.0, -1.0], abs=1e-9)


def test_newton_tells_where_it_did_not_arrive():
    kink = newton(lambda w: jnp.sum(jnp.abs(w - 0.3)), jnp.ones(2))
    endless = newton(lambda w: jnp.sum(jnp.exp(-w)), jnp.zeros(2), max_steps=5)
    lost = newton(lambda w: jnp.sum(w) * jnp.nan, jnp.ones(2))
    assert not kink.converged
    assert not endless.converged
    assert int(endless.num_steps) == 5
    assert not lost.converged
    assert jnp.isfinite(lost.params).all()


def test_newton_knows_the_precision_in_which_a_loss_works():
    with jax.enable_x64(True):
        narrow = lambda w: jnp.sum(jnp.cosh((w - 0.3).astype(jnp.float32))).astype(jnp.float64)  # noqa: E731
        found = newton(narrow, jnp.ones(3))
        assert found.converged
        assert found.params.tolist() == pytest.approx([0.3] * 3, abs=1e-3)


def snapshots():
    rng = np.random.default_rng(0)
    return [{"rate": 0.1 * i, "decay": {"w": np.exp(rng.normal(size=(3, 4)))}, "shift": 1.0 - i} for i in range(4)]


def test_pictures_show_what_they_are_given(tmp_path):
    figure = D.plot_trajectories(
        [0, 10, 20, 30], snapshots(), losses={"valid": [4, 3, 2, 1]}, title="a run", xlabel="gradients"
    )
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["in [0, 1]", "positive", "value", "loss"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert figure.axes[1].get_yscale() == "log"
    assert figure.axes[1].get_legend().get_texts()[0].get_text() == "decay.w"
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 5_000

    for axes in figure.axes:  # drawn above the axes, no legend covers a curve
        assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())

    solve = hg.SolveInfo(*map(jnp.asarray, (5, 0.1, 0.1, 0.0, int(Status.INDEFINITE))))
    info = hg.HypergradInfo(*map(jnp.asarray, (7, 1.0, 0.5, 2.0, int(hg.SkipReason.SOLVE), 1)), method=solve)
    figure = D.plot_solver([info._replace(step=jnp.array(-1)), info])
    assert [axes.get_ylabel() for axes in figure.axes] == ["outer loss", "|hypergrad|", "residual of the solve"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [7]
    assert {t.get_text() for t in figure.axes[2].get_legend().get_texts()} == {"broke down"}
    assert len(D.plot_solver([info._replace(method=())]).axes) == 2
    stacked = jax.tree.map(lambda *x: jnp.stack(x), info, info._replace(step=jnp.array(9)))
    assert D.plot_solver(stacked).axes[0].lines[0].get_xdata().tolist() == [7, 9]
    functional = info._replace(step=jnp.array(-1))
    assert D.plot_solver([functional, functional]).axes[0].lines[0].get_xdata().tolist() == [0, 1]


@pytest.mark.parametrize(("count", "names"), [(5, 5), (20, 20), (45, 0)])
def test_a_picture_of_many_leaves_stays_readable(count, names):
    """A legend above, one beside the curves, a heat map with some names."""
    snapshots = [{f"leaf_{i}": np.full(2, 0.1 + 0.01 * i * step) for i in range(count)} for step in range(3)]
    figure = D.plot_trajectories([0, 1, 2], snapshots)
    panel = figure.axes[0]
    legend = panel.get_legend()
    assert (0 if legend is None else len(legend.get_texts())) == names
    if names:
        assert len(panel.lines) == count
        styles = {(line.get_color(), line.get_linestyle()) for line in panel.lines}
        assert len(styles) == count
    else:
        assert len(panel.get_yticklabels()) == 15
        assert len(figure.axes) == 2  # the colour bar


def test_retrained_points_are_drawn_beside_the_outer_loss():
    info = hg.HypergradInfo(*map(jnp.asarray, (10, 1.0, 0.5, 2.0, 0, 0)), method=())
    figure = D.plot_solver([info, info._replace(step=jnp.array(20))], retrained={10: 1.5, 20: 1.4})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["new weights"]
    assert list(figure.axes[0].lines[-1].get_ydata()) == [1.5, 1.4]


def test_pictures_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match="one snapshot per step"):
        D.plot_trajectories([0, 1], [{"a": 1.0}])
    with pytest.raises(ValueError, match="a later snapshot"):
        D.plot_trajectories([0, 1], [{"a": 1.0}, {"b": 1.0}])
    blank = hg.HypergradInfo(*map(jnp.asarray, (-1, 0.0, 0.0, 0.0, 0, 0)), method=())
    for infos in ([], [blank]):
        with pytest.raises(ValueError, match="infos of estimates"):
            D.plot_solver(infos)


def test_pictures_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hypergrad-jax\[plot\]"):
        D.plot_trajectories([0], [{"a": 1.0}])


@pytest.mark.slow
def test_networks_of_flax_are_looked_at_too():
    """Through a module with dropout: all products share the key, so two runs agree to the last bit."""
    model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dropout(0.5, deterministic=False), nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (8, 3))
    params = model.init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)["params"]
    inner = lambda w, h, batch, key: jnp.mean(model.apply({"params": w}, batch, rngs={"dropout": key}) ** 2)  # noqa: E731
    at, problem = hg.BilevelParams(params, jnp.ones(1)), hg.BilevelProblem(inner, inner)
    look = jax.jit(lambda key: D.extreme_eigenvalues(problem, at, x, key=key, num_steps=8))
    first, again, other = (look(jax.random.key(seed)) for seed in (0, 0, 1))
    assert first.largest == again.largest != other.largest
