"""The elastic net, tuned by cross-validation: two strengths, or two for each group of features.

    w_k(a, b) = argmin_w  ½ MSE(w; all folds but k) + Σⱼ (aⱼ |wⱼ| + ½ bⱼ wⱼ²)
    min_{a, b}  ⅕ Σ_k MSE(w_k(a, b); fold k)

The features are 10 measurements of each patient, with their 55 squares and products. scikit-learn's ElasticNetCV has
one a and one b; it searches a grid on the same folds. hg.minimize follows the gradient: with one a and one b, then with
one of each for the measurements and one of each for the products. Its second call reuses what the first compiled.

    python examples/11_elastic_net.py         # the diabetes data, 40 seconds on two cores, 11_elastic_net.png
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNetCV
from sklearn.model_selection import KFold, train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from threadpoolctl import threadpool_limits

import hypergrad as hg

features, target = load_diabetes(return_X_y=True)
features = PolynomialFeatures(2, include_bias=False).fit_transform(features)  # the measurements are the first ten
split = train_test_split(features, target, test_size=112, random_state=0)
x, x_test, y, y_test = (np.asarray(part) for part in split)
scaler, y, y_test = StandardScaler().fit(x), (y - y.mean()) / y.std(), (y_test - y.mean()) / y.std()
x, x_test = (np.asarray(scaler.transform(part)) for part in (x, x_test))
folds = list(KFold(5, shuffle=True, random_state=0).split(x))  # of 330 rows: folds of one size run together
step_size = 1.0 / float(np.linalg.eigvalsh(x.T @ x / len(x))[-1])
groups = {"one a and b": np.zeros(65, int), "a and b per group": np.repeat([0, 1], [10, 55])}


def squared_error(params, strengths, batch, key):
    return jnp.mean((batch[0] @ params["w"] + params["intercept"] - batch[1]) ** 2)


def tune(group, max_steps):  # returns the result, weights trained on all rows, the path, seconds of two calls
    def prox(params, strengths, step_size):  # w may have a leading axis of folds
        w, threshold = params["w"], step_size * strengths["a"][group]
        shrunk = jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0.0) / (1.0 + step_size * strengths["b"][group])
        return {"w": shrunk, "intercept": params["intercept"]}

    smooth = hg.BilevelProblem(lambda *args: 0.5 * squared_error(*args), squared_error)
    problem = hg.with_residual(smooth, hg.residuals.proximal_gradient(smooth, prox, step_size))
    problem = hg.reparameterize(problem, hg.bijectors.exp())
    folded, data = hg.cross_validation(problem, folds), (jnp.asarray(x), jnp.asarray(y))
    weights = {"w": jnp.zeros((len(folds), 65)), "intercept": jnp.zeros(len(folds))}
    start = hg.BilevelParams(weights, {name: jnp.full(max(group) + 1, jnp.log(0.1)) for name in "ab"})
    options = {"method": hg.methods.lbfgs(), "inner_solver": hg.inner_solvers.proximal(prox), "max_steps": max_steps}

    def run():
        path, begun = [], time.perf_counter()
        found = hg.minimize(folded, start, data, data, callback=lambda at: path.append(at.hyperparams), **options)
        return found, path, time.perf_counter() - begun

    (_, _, first), (found, path, second) = run(), run()
    again = hg.BilevelParams(jax.tree.map(lambda w: w[0], found.params), found.hyperparams)
    return found, hg.diagnostics.solve_inner(problem, again, data).params, path, (first, second)


def main(max_steps=50, ratios=(0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99), out="11_elastic_net.png"):  # returns losses
    begun = time.perf_counter()
    with threadpool_limits(1):  # for matrices of this size more threads of BLAS can be slower
        grid = ElasticNetCV(cv=folds, max_iter=20_000).set_params(l1_ratio=ratios).fit(x, y)
    seconds, losses = time.perf_counter() - begun, grid.mse_path_.mean(axis=-1)
    cv, test = {"grid": float(losses.min())}, {"grid": float(np.mean((grid.predict(x_test) - y_test) ** 2))}
    print(f"ElasticNetCV, one a and b: CV loss {cv['grid']:.4f}, test loss {test['grid']:.4f}, {seconds:.2f} s")
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    a, b = (np.log10(np.asarray(part)[:, None] * grid.alphas_) for part in (ratios, 1 - np.asarray(ratios)))
    levels = np.minimum(losses, 1.3 * losses.min())
    figure.colorbar(left.tricontourf(a.ravel(), b.ravel(), levels.ravel(), 20), label="cross-validated loss")
    best = np.unravel_index(losses.argmin(), losses.shape)
    left.plot(a[best], b[best], "*w", ms=13, mec="k", label="best of the grid")
    with jax.enable_x64(True):
        for shift, (name, group) in zip((-0.2, 0.2), groups.items(), strict=True):
            found, params, path, (first, second) = tune(group, max_steps)
            cv[name], test[name] = float(found.value), float(squared_error(params, None, (x_test, y_test), None))
            print(f"hg.minimize, {name}: CV loss {cv[name]:.4f}, test loss {test[name]:.4f}, {second:.2f} s")
            print(f"  first call, with compilation, {first:.1f} s; {found.message}")
            if len(path[0]["a"]) == 1:
                line = np.array([[h["a"][0], h["b"][0]] for h in path]) / np.log(10)
                left.plot(*line.T, "o-", color="tab:red", ms=4, label="steps of hg.minimize")
            right.bar(np.arange(65) + shift, np.asarray(params["w"]), 0.5, label=f"{name}, test loss {test[name]:.3f}")
    left.set(xlabel="log₁₀ a", ylabel="log₁₀ b")
    left.legend(loc="lower left")
    right.axvline(9.5, color="gray", lw=0.8)
    right.set(xlabel="ten measurements | squares and products", ylabel="weight", xticks=[])
    right.legend()
    figure.savefig(out, dpi=120)
    return {f"{name} {what}": v for what, all in (("cv", cv), ("test", test)) for name, v in all.items()}


if __name__ == "__main__":
    main()
