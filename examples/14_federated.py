"""Federated learning with rates that tune themselves: twenty clients, each with images of two digits.

    client k:  E steps  w_k ← w_k − α_k g_k  from the server's w;     server:  w ← w − β Δ,  Δ = w − mean_k w_k

FedAvg has one constant α and β = 1. The rules of FedHyper follow the hypergradient of a step, here by the cosine of a
gradient (or Δ) with the direction of the last step, and within a factor of ten (global: three) of where they begin:

    client    α_k from g_k and the last local direction, to which Δ of the last round / E is added
    server    α, one for all clients, from Δ and the last Δ;     global    β, from the same

Reference: Wang et al., FedHyper, arXiv 2310.03156.
    python examples/14_federated.py           # scikit-learn's digits, 40 seconds on two cores, 14_federated.png
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from hypergrad import optimizers

images, labels = load_digits(return_X_y=True)
CLIENTS, LOCAL_STEPS, SIZE, TEST, RULES = 20, 20, 60, 497, ("FedAvg", "client", "server", "global")


def split(seed):  # each client holds SIZE images of two digits; the test images have all ten
    test, train = np.split(np.random.default_rng(seed).permutation(len(labels)), [TEST])
    rows = [train[np.isin(labels[train], (k % 10, (k + 1 + k // 10) % 10))][:SIZE] for k in range(CLIENTS)]
    return [(jnp.asarray(images[part], jnp.float32) / 16, jnp.asarray(labels[part])) for part in (np.stack(rows), test)]


def network(w, x):
    return jax.nn.relu(x @ w["in"]) @ w["out"]


def loss(w, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(network(w, batch[0]), batch[1]).mean()


def train(key, clients, test, rate, rule, rounds):  # returns the test accuracy of each round
    into, out_of = jax.random.split(key)
    w = {"in": jax.random.normal(into, (64, 32)) / 8, "out": jax.random.normal(out_of, (32, 10)) / 6}
    follow = optimizers.multiplicative(0.1 if rule == "client" else 0.3)

    def online(name, bounds, init_rate):  # only the rate of the named rule moves
        bounded = optimizers.clipped(follow, init_rate / bounds, init_rate * bounds)
        still = optimizers.RateRule(lambda rate, inner, cosine: rate)
        return optimizers.hypergradient_descent(optax.sgd, bounded if name == rule else still, init_rate=init_rate)

    local, for_all, server = online("client", 10.0, rate), online("server", 10.0, rate), online("global", 3.0, 1.0)

    def at_client(w, state, batch, last):  # E local steps from the server's weights
        def step(carry, rows):
            w, state = carry
            updates, state = local.update(jax.grad(loss)(w, jax.tree.map(lambda x: x[rows], batch)), state, w)
            towards = optax.tree.add(optax.tree.get(state, "direction"), optax.tree.scale(1 / LOCAL_STEPS, last))
            return (optax.apply_updates(w, updates), optax.tree.set(state, direction=towards)), None

        order = jnp.arange(LOCAL_STEPS * 20).reshape(LOCAL_STEPS, 20) % SIZE
        return jax.lax.scan(step, (w, state._replace(direction=last)), order)[0]

    def one_round(carry, _):
        w, states, of_server, of_all, last = carry
        rates = jnp.where(rule == "server", jnp.full(CLIENTS, of_all.rate), states.rate)
        ends, states = jax.vmap(at_client, (None, 0, 0, None))(w, states._replace(rate=rates), clients, last)
        delta = jax.tree.map(lambda w, end: w - end.mean(axis=0), w, ends)
        (updates, of_server), (_, of_all) = server.update(delta, of_server, w), for_all.update(delta, of_all, w)
        w = optax.apply_updates(w, updates)
        return (w, states, of_server, of_all, delta), jnp.mean(jnp.argmax(network(w, test[0]), axis=1) == test[1])

    states = jax.tree.map(lambda x: jnp.stack([x] * CLIENTS), local.init(w))
    carry = w, states, server.init(w), for_all.init(w), optax.tree.zeros_like(w)
    return jax.lax.scan(one_round, carry, length=rounds)[1]


def main(rounds=60, seeds=5, rates=(1e-3, 1e-2, 1e-1), out="14_federated.png"):  # returns final accuracies
    figure, found = Figure(figsize=(9.0, 3.2), layout="constrained"), {}
    axes = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    data = jax.tree.map(lambda *parts: jnp.stack(parts), *[split(seed) for seed in range(seeds)])
    for rule in RULES:
        for axis, rate in zip(axes, rates, strict=True):
            of_seeds = jax.jit(jax.vmap(lambda k, d, rate=rate, rule=rule: train(k, d[0], d[1], rate, rule, rounds)))
            reached = of_seeds(jax.random.split(jax.random.key(0), seeds), data)
            middle, deviation = reached.mean(axis=0), reached.std(axis=0)
            found[f"{rule}, {rate:g}"] = float(middle[-1])
            axis.plot(middle, label=rule)
            axis.fill_between(range(rounds), middle - deviation, middle + deviation, alpha=0.15)
            print(f"{rule}, first rate {rate:g}: test accuracy {middle[-1]:.3f} ± {deviation[-1]:.3f}")
    for axis, rate in zip(axes, rates, strict=True):
        axis.set(title=f"first rate {rate:g}", xlabel="round", ylabel="test accuracy")
        axis.axhline(max(found[f"FedAvg, {rate:g}"] for rate in rates), ls="--", color="k", label="FedAvg, best rate")
    axes[-1].legend(frameon=False)
    figure.savefig(out, dpi=90)
    return found


if __name__ == "__main__":
    main()
