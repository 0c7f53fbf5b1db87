"""Kernel ridge regression with a learned bandwidth for every input dimension.

    c*(γ, δ) = argmin_c  ½ cᵀ(K_γ + δI)c − cᵀy              K_γ[i, j] = exp(−Σ_d γ_d (x_id − x_jd)²) on 200 points
    min_{γ, δ}  MSE(c*(γ, δ); 200 other points)

The target depends on five of ten dimensions (Friedman's first function). GridSearchCV searches one δ, and one γ for
all dimensions. hg.minimize learns δ with one γ, and then with a γ for every dimension, from the same training and
validation points. Its second call reuses what the first compiled.

    python examples/12_kernel_ridge.py        # a generated regression, 20 seconds on two cores, 12_kernel_ridge.png
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import make_friedman1
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from threadpoolctl import threadpool_limits

import hypergrad as hg

NOISE = 0.2
x, y = make_friedman1(2400, n_features=10, noise=5 * NOISE, random_state=0)
y = (y - 14.4) / 5.0  # about mean 0, variance 1
train, valid, test = ((x[at], y[at]) for at in (slice(0, 200), slice(200, 400), slice(400, None)))


def kernel(a, b, gamma):
    a, b = a * jnp.sqrt(gamma), b * jnp.sqrt(gamma)
    return jnp.exp(-(jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2.0 * a @ b.T))


def train_loss(c, hyperparams, batch, key):
    x, y = batch
    return 0.5 * c @ (kernel(x, x, hyperparams["gamma"]) @ c + hyperparams["decay"] * c) - c @ y


def mean_squared_error(c, hyperparams, batch, key):
    x, y = batch
    return jnp.mean((kernel(x, train[0], hyperparams["gamma"]) @ c - y) ** 2)


def tune(gamma, max_steps):  # returns the result, the hyperparameters, and the seconds of two calls
    problem = hg.reparameterize(hg.BilevelProblem(train_loss, mean_squared_error), hg.bijectors.exp())
    start = hg.BilevelParams(jnp.zeros(len(train[1])), {"gamma": jnp.log(gamma), "decay": jnp.log(0.1)})
    options = {"method": hg.methods.lbfgs(), "inner_solver": hg.inner_solvers.newton_cg(), "max_steps": max_steps}

    def run():
        begun = time.perf_counter()
        found = hg.minimize(problem, start, train, valid, **options)
        return found, time.perf_counter() - begun

    (_, first), (found, second) = run(), run()
    return found, problem.constrain(found.hyperparams), (first, second)


def main(max_steps=50, grid=12, out="12_kernel_ridge.png"):  # returns the errors
    begun = time.perf_counter()
    both, split = [np.concatenate(pair) for pair in zip(train, valid, strict=True)], np.repeat([-1, 0], 200)
    values = {"alpha": np.geomspace(1e-5, 1e1, grid), "gamma": np.geomspace(1e-2, 1e1, grid)}
    options = {"scoring": "neg_mean_squared_error", "cv": PredefinedSplit(split), "refit": False}
    with threadpool_limits(1):  # for matrices of this size more threads of BLAS can be slower
        search = GridSearchCV(KernelRidge(kernel="rbf"), values, **options).fit(*both)
    seconds, best = time.perf_counter() - begun, KernelRidge(kernel="rbf", **search.best_params_).fit(*train)
    errors = {"GridSearchCV": (-float(search.best_score_), float(np.mean((best.predict(test[0]) - test[1]) ** 2)))}
    row = "{:27} validation MSE {:.4f}, test MSE {:.4f}, {:.2f} s"
    print(row.format(f"GridSearchCV, {grid**2} points", *errors["GridSearchCV"], seconds))

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    with jax.enable_x64(True):
        starts = {"one bandwidth": jnp.asarray(1.0), "ten bandwidths": jnp.ones(10)}
        rows = {name: tune(gamma, max_steps) for name, gamma in starts.items()}
        for name, (found, learned, (first, second)) in rows.items():
            errors[name] = float(found.value), float(mean_squared_error(found.params, learned, test, None))
            print(row.format(f"hg.minimize, {name}", *errors[name], second))
            print(f"  first call, with compilation, {first:.1f} s; {found.message}")
            spent = np.cumsum(found.history.num_gradients + found.history.num_products)
            right.plot(spent, found.history.outer_loss, ".-", label=f"hg.minimize, {name}")
        bandwidths = np.asarray(rows["ten bandwidths"][1]["gamma"])
    left.bar(np.arange(1, 11), bandwidths, color=["tab:orange"] * 5 + ["tab:gray"] * 5)
    left.axhline(search.best_params_["gamma"], color="k", ls="--", lw=1, label="best of the grid, one for all")
    left.set(yscale="log", ylim=(5e-7, 5.0), ylabel="learned γ", xticks=range(1, 11))
    left.set_xlabel("input dimension: 6 to 10 do not matter")
    left.legend(loc="upper right")
    right.axhline(-search.best_score_, color="k", ls="--", lw=1, label="best of the grid")
    right.axhline(NOISE**2, color="gray", ls=":", label="variance of the noise")
    right.set(xlabel="gradients and Hessian products of the inner loss", ylabel="validation MSE", ylim=(0.0, None))
    right.legend()
    figure.savefig(out, dpi=120)
    return {f"{name} {what}": pair[i] for name, pair in errors.items() for i, what in enumerate(("valid", "test"))}


if __name__ == "__main__":
    main()
