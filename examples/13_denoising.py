"""A regulariser for images, learned by MAID: how much each of eight filters counts.

    u*(λ) = argmin_u  ½ ‖u − noisy‖² + Σ_k exp(λ_k) Σ_pixels φ(f_k ∗ u)          φ(x) = √(x² + ν²) − ν
    min_λ  mean (u*(λ) − clean)²                                                  on four images of 48 × 48 pixels

The f_k are the 3 × 3 cosine filters. The inner Hessian is at least 1, which MAID uses to choose its tolerances; the
other constants are estimated. Two runs begin with tolerances that differ by a factor of 1,000, and end alike. A third
has one weight for all filters.

    python examples/13_denoising.py           # photographs of scikit-learn, 40 seconds on two cores, 13_denoising.png
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

import hypergrad as hg

SIZE, NOISE, NU = 48, 0.1, 0.01
photographs = [np.asarray(photograph, np.float32).mean(-1) / 255 for photograph in load_sample_images().images]
places = [(0, 20, 200), (0, 200, 420), (1, 10, 20), (1, 200, 400), (1, 90, 230), (0, 110, 30)]  # two to test on
clean = np.stack([photographs[n][i : i + 4 * SIZE : 4, j : j + 4 * SIZE : 4] for n, i, j in places])
noisy = clean + NOISE * np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
train, test = (jnp.asarray(noisy[:4]), jnp.asarray(clean[:4])), (jnp.asarray(noisy[4:]), jnp.asarray(clean[4:]))
waves = np.cos(np.pi * np.outer(np.arange(3), np.arange(3) + 0.5) / 3)
waves /= np.linalg.norm(waves, axis=1, keepdims=True)
filters = jnp.asarray(np.einsum("ai,bj->abij", waves, waves).reshape(9, 1, 3, 3)[1:], jnp.float32)  # all but the mean


def energy(u, log_weights, batch, key):
    answers = jax.lax.conv(u[:, None], filters, (1, 1), "VALID")
    penalty = jnp.sum(jnp.exp(log_weights)[:, None, None] * (jnp.sqrt(answers**2 + NU**2) - NU))
    return 0.5 * jnp.sum((u - batch[0]) ** 2) + penalty


def error(u, log_weights, batch, key):
    return jnp.mean((u - batch[1]) ** 2)


problem = hg.BilevelProblem(energy, error)


def learn(num_weights, tolerance, max_steps):
    """Return the result of MAID with this tolerance to begin with."""
    # The Hessian of ½‖u − noisy‖² is the identity; that of the error 2/pixels.
    method = hg.methods.maid(1.0, outer_smoothness=2 / train[0].size, tolerance=tolerance, uncertified=True)
    start = hg.BilevelParams(train[0], jnp.full(num_weights, jnp.log(0.01)))
    return hg.minimize(problem, start, train, train, method=method, max_steps=max_steps, tol=3e-5)


def denoised(log_weights, batch):
    return hg.diagnostics.solve_inner(problem, hg.BilevelParams(batch[0], log_weights), batch).params


def psnr(images, batch):
    return float(-10 * jnp.log10(jnp.mean((images - batch[1]) ** 2)))


def main(max_steps=60, tolerances=(1.0, 1e-3), out="13_denoising.png"):
    """Print peak signal-to-noise ratios, save a picture; return the ratios."""
    runs = {f"eight weights, tolerance {first:g} at first": learn(8, first, max_steps) for first in tolerances}
    runs["one weight"] = learn(1, tolerances[0], max_steps)
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1)).flat
    loss, bars = bottom.subplots(1, 2)
    for name, found in runs.items():
        spent = np.cumsum(found.history.num_gradients + found.history.num_products)
        print(f"{name}: error {float(found.value):.6f}; {found.message}")
        loss.plot(spent, found.history.outer_loss, ".-", label=name)
    eight, one = next(iter(runs.values())).hyperparams, runs["one weight"].hyperparams
    images = {"clean": test[1], "noisy": test[0], "one weight": denoised(one, test), "eight": denoised(eight, test)}
    ratios = {name: psnr(image, test) for name, image in images.items() if name != "clean"}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f} dB on two other images")
    for axes, (name, image) in zip(top.subplots(1, 4), images.items(), strict=True):
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=name)
        axes.set_xlabel(f"{ratios[name]:.2f} dB" if name in ratios else "")
    loss.set(xlabel="gradients and Hessian products", ylabel="mean squared error")
    loss.legend(fontsize="small")
    bars.bar(np.arange(1, 9), np.exp(eight))
    bars.axhline(np.exp(one[0]), color="k", ls="--", label="one weight for all")
    bars.legend()
    bars.set(
        xlabel="filter, from low to high frequency",
        ylabel="learned weight",
        xticks=range(1, 9),
        ylim=(0, 1.4 * np.exp(eight).max()),
    )
    figure.savefig(out, dpi=120)
    return ratios


if __name__ == "__main__":
    main()
