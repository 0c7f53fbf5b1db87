"""Softmax regression on text: one decay, a decay per band of word frequency, or a decay per word.

    w*(c) = argmin_w  CE(w; 600 documents) + ½ Σⱼ cⱼ ‖wⱼ‖²
    min_λ  CE(w*(c); 600 others) − log p(λ) / 600            log cⱼ = λ of the word's band + λ of the word

The 2,000 most frequent words form eight bands. Priors: N(μ, 1) with a free μ for bands, N(0, 0.5²) for words. Features:
term frequencies (tf) or tf-idf. Documents: four groups of 20 newsgroups (1 to 4, comp.*), split at random, if the file
$HYPERGRAD_DATA/20news/20news_counts.npz exists; otherwise they are drawn from a topic model.

    python examples/10_text_classification.py       # text, 40 seconds on two cores, 10_text_classification.png
"""

import os

import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse  # type: ignore[import-untyped]
from matplotlib.figure import Figure

import hypergrad as hg

PATH, CLASSES, BANDS = os.path.join(os.environ.get("HYPERGRAD_DATA", ""), "20news", "20news_counts.npz"), 4, 8


def newsgroups():  # word counts (documents, 130107), classes
    file = np.load(PATH)
    parts = [[file[f"{part}_{name}"] for name in ("counts", "indices", "indptr")] for part in ("train", "test")]
    counts = [scipy.sparse.csr_matrix(tuple(csr), (len(csr[2]) - 1, int(file["shape"][0]))) for csr in parts]
    y = np.concatenate([file["train_y"], file["test_y"]]).astype(int) - 1
    return scipy.sparse.vstack(counts).tocsr()[(y >= 0) & (y < CLASSES)], y[(y >= 0) & (y < CLASSES)]


def topic_model(rng, documents=3900, words=5000):  # word counts, classes: a document favours the topic of its class
    common = 1.0 / np.arange(10, words + 10)
    topics = common * np.exp(2.0 * rng.normal(size=(CLASSES, words))) * (np.arange(words) >= 50)
    y = rng.integers(0, CLASSES, documents)
    shares = rng.dirichlet(np.full(CLASSES, 0.5), documents) + 2.0 * np.eye(CLASSES)[y]
    rates = 0.85 * common / common.sum() + 0.05 * shares @ (topics / topics.sum(axis=1, keepdims=True))
    return scipy.sparse.csr_matrix(rng.poisson(rng.lognormal(4.5, 0.7, (documents, 1)) * rates)), y


def load(size, num_words):  # (train, valid, test) of tf and of tf-idf, and for each word how many documents have it
    counts, y = newsgroups() if os.path.exists(PATH) else topic_model(np.random.default_rng(0))
    order, cuts, splits = np.random.default_rng(1).permutation(len(y)), (size, 2 * size), {}
    frequency = np.asarray((counts[order[: 2 * size]] > 0).sum(axis=0)).ravel()
    words = np.argsort(-frequency, kind="stable")[:num_words]
    tf, y, frequency = counts[order][:, words].toarray(), y[order], frequency[words]
    for name, scale in {"tf": 1.0, "tf-idf": 1.0 + np.log((1 + 2 * size) / (1 + frequency))}.items():
        x = np.float32(tf * scale / np.maximum(np.linalg.norm(tf * scale, axis=1, keepdims=True), 1e-9))
        splits[name] = list(zip(np.split(x, cuts), np.split(y, cuts), strict=True))
    return splits, frequency


def cross_entropy(params, hyperparams, batch, key):
    x, y = batch
    return optax.losses.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], y).mean()


def decays(hyperparams, num_words):  # each part has one entry for some words in a row
    return jnp.exp(sum(jnp.repeat(part, num_words // len(part)) for part in hyperparams.values()))


def train_loss(params, hyperparams, batch, key):
    decay = {"w": decays(hyperparams, len(params["w"]))[:, None], "b": 1e-4}
    return cross_entropy(params, hyperparams, batch, key) + hg.penalties.l2(params, decay)


def main(max_steps=50, size=600, num_words=2000, out="10_text_classification.png"):  # returns the test losses
    print("four groups of 20 newsgroups" if os.path.exists(PATH) else "documents drawn from a topic model")
    splits, frequency = load(size, num_words)
    bands, words = hg.priors.shared_mean(1.0), hg.priors.normal(0.0, 0.5)
    prior = lambda h: bands(h["band"]) + words(h.get("word", jnp.zeros(1)))  # noqa: E731
    problem = hg.with_prior(hg.BilevelProblem(train_loss, cross_entropy), prior, num_examples=size)
    options = {"method": hg.methods.lbfgs(), "inner_solver": hg.inner_solvers.newton_cg(), "max_steps": max_steps}
    losses, learned, zeros = {}, {}, {"word": jnp.zeros(num_words)}
    for features, (train, valid, test) in splits.items():
        params, start = {"w": jnp.zeros((num_words, CLASSES)), "b": jnp.zeros(CLASSES)}, {"band": jnp.full(1, -8.0)}
        for kind, added in {"one decay": {}, "one per band": {}, "one per word": zeros}.items():
            found = hg.minimize(problem, hg.BilevelParams(params, start | added), train, valid, **options)
            params, row = found.params, f"{features}, {kind}"
            start = {"band": jnp.broadcast_to(found.hyperparams["band"], BANDS)}  # the next starts where this one ended
            learned[row] = decays(found.hyperparams, num_words)
            valid_loss, losses[row] = (float(cross_entropy(params, None, batch, None)) for batch in (valid, test))
            print(f"{row:20} validation loss {valid_loss:.3f}, test loss {losses[row]:.3f}; {found.message}")
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    for kind, mark in {"one per word": ".", "one per band": "-", "one decay": "--"}.items():
        left.loglog(frequency, learned[f"tf, {kind}"], mark, label=kind)
    left.set(xlabel="documents with the word", ylabel="learned decay, tf")
    left.legend()
    bars = right.barh([*losses], [*losses.values()], color=["C2", "C1", "C0"] * 2)
    right.bar_label(bars, fmt="%.3f", label_type="center", color="w")
    right.set(xlabel="test loss", ylim=(5.6, -0.6))
    figure.savefig(out, dpi=120)
    return losses


if __name__ == "__main__":
    main()
