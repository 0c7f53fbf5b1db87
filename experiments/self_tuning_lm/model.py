"""Text, model and losses of ``self_tuning_lm.py``: a small LSTM over words with seven ways to regularise it.

Text is War and Peace from ``$HYPERGRAD_DATA/war_and_peace/{train,valid,test}.txt.gz`` or, without that variable, what
scikit-learn says about its bundled data sets: a few thousand words, enough to see the example run.
"""

import collections
import gzip
import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets

import hypergrad as hg

LENGTH = 32  # words that a window predicts; each window starts from a zero state


class Text(NamedTuple):
    """Word types in the order of the text.

    Attributes:
      train: int32 (n,); 0 stands for every word outside the vocabulary.
      valid: alike.
      test: alike.
      vocabulary: number of word types, the most frequent ones of the training text.
      name: of the text.
    """

    train: jax.Array
    valid: jax.Array
    test: jax.Array
    vocabulary: int
    name: str


def load(words: int, vocabulary: int) -> Text:
    """Return the text; the first ``words`` of the training part, so that regularisation matters."""
    root = os.environ.get("HYPERGRAD_DATA")
    if root is None:
        loaders = (getattr(sklearn.datasets, f"load_{n}") for n in ("breast_cancer", "diabetes", "digits", "wine"))
        name, whole = "descriptions of data sets", _split(" ".join(loader().DESCR for loader in loaders))
        blocks = [whole[i : i + 80] for i in range(0, len(whole), 80)]
        parts = [list(itertools.chain(*chosen)) for chosen in (blocks[::2], blocks[1::4], blocks[3::4])]
    else:
        name, folder = "War and Peace", Path(root) / "war_and_peace"
        files = (folder / f"{part}.txt.gz" for part in ("train", "valid", "test"))
        parts = [_split(gzip.decompress(file.read_bytes()).decode()) for file in files]
    parts[0] = parts[0][:words]
    common = [word for word, _ in collections.Counter(parts[0]).most_common(vocabulary - 1)]
    number = {word: i for i, word in enumerate(common, start=1)}
    ids = [jnp.asarray([number.get(word, 0) for word in part], jnp.int32) for part in parts]
    return Text(ids[0], ids[1], ids[2], len(common) + 1, name)


def draw(text: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Return random windows (size, LENGTH + 1)."""
    starts = jax.random.randint(key, (size,), 0, len(text) - LENGTH)
    return text[starts[:, None] + jnp.arange(LENGTH + 1)]


def windows(text: jax.Array, size: int) -> jax.Array:
    """Return the text as batches (n, size, LENGTH + 1) of windows that together predict all of it but a rest."""
    size = min(size, (len(text) - 1) // LENGTH)
    count = (len(text) - 1) // (LENGTH * size)
    starts = LENGTH * np.arange(count * size).reshape(count, size, 1)
    return text[starts + np.arange(LENGTH + 1)]


class Model(nn.Module):
    """An embedding, two LSTM layers and a softmax; rates are given to the call, None for a run without noise."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array, rates: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return logits (B, T, vocabulary), and the last layer's output after and before dropout."""

        def drop(name: str, x: jax.Array) -> jax.Array:
            return (
                x if rates is None else hg.noise.dropout(self.make_rng("dropout"), x, rates[name], broadcast_dims=(1,))
            )

        x: Any = nn.Embed(self.vocabulary, self.width)(ids)
        if rates is not None:
            x = hg.noise.drop_tokens(self.make_rng("dropout"), ids, x, rates["embedding"], vocabulary=self.vocabulary)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(drop("input", x))
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(drop("hidden", x))
        kept = drop("output", x)
        return nn.Dense(self.vocabulary)(kept), kept, x


# Weak, but not too weak for a perturbation to make a difference: from rates of 0.01 a response learns nothing.
PENALTIES = ("alpha", "beta")
START = dict.fromkeys(("input", "hidden", "output", "embedding", "weights"), 0.1) | dict.fromkeys(PENALTIES, 0.5)
PER_EXAMPLE = {name: name != "weights" for name in START}


def make_problem(model: Model) -> hg.BilevelProblem:
    """Return the losses of windows (B, LENGTH + 1): with all noise and penalties, and without."""

    def cross_entropy(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean(-1)

    def train_loss(params: Any, h: Any, ids: jax.Array, key: Any) -> jax.Array:
        weight_key, noise_key = jax.random.split(key)
        params = hg.noise.drop_weights(weight_key, params, _recurrent(params, h["weights"]))
        outputs: Any = model.apply({"params": params}, ids[:, :-1], h, rngs={"dropout": noise_key})
        logits, kept, raw = outputs
        activation = h["alpha"] * jnp.square(kept).mean((1, 2))
        change = h["beta"] * jnp.square(jnp.diff(raw, axis=1)).mean((1, 2))
        return (cross_entropy(logits, ids) + activation + change).mean()

    def valid_loss(params: Any, _h: Any, ids: jax.Array, _key: Any) -> jax.Array:
        return cross_entropy(model.apply({"params": params}, ids[:, :-1])[0], ids).mean()

    return hg.reparameterize(hg.BilevelProblem(train_loss, valid_loss), BIJECTORS)


BIJECTORS = {n: hg.bijectors.softplus() if n in PENALTIES else hg.bijectors.interval(0.0, 0.9) for n in START}


def _recurrent(params: Any, rate: jax.Array) -> Any:
    """Return the rate for the matrices that multiply an LSTM's hidden state, 0.0 for all other weights."""

    def of(path: Any, _: jax.Array) -> Any:
        names = [key.key for key in path]
        return rate if names[-2] in ("hi", "hf", "hg", "ho") and names[-1] == "kernel" else 0.0

    return jax.tree.map_with_path(of, params)


def _split(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())
