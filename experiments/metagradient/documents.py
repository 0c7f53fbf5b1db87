"""A weight for each document of a training set, for the sake of one passage: whole runs against one-step estimates.

    w_T(λ): 500 steps of SGD on mean_i v_{d(i)} CE(w; window i),  v = N softmax(λ);     min_λ  CE(w_T(λ); passage)

A language model of about 9,300 weights, a character from the last eight, trains on documents of 1,000 characters of War
and Peace from ``$HYPERGRAD_DATA``; every second document is printed backwards, and no row is told which. The passage is
of the second epilogue, on the philosophy of history; the epilogue's lines in another file judge. Without that variable,
documents are of scikit-learn's descriptions of data sets.

    python -m experiments.metagradient.documents [--seeds 3] [--quick] [--out experiments/results]

    equal weights             plain training
    random weights            λ normal, of the standard deviation that the metagradient ends with
    random documents          as many as the best documents
    alignment, weights        λ = c · score;  score = ∇CE(passage) · ∇CE(document) after plain training, standardised
    alignment, documents      the k documents of the highest scores
    alignment, iterated       outer Adam on the score, which is a hypergradient after one step, after each new run
    metagradient              outer Adam on ``hg.metagradient``, a new run at every outer step
    metagradient, documents   the k documents of the largest learned weights
    passage added             plain training on the documents and the passage, which counts as so many documents

Scores are means over runs. c, k, the count of the last row and the rate of Adam are the best by the loss on the
passage; the last row's by that on one half after training on the other half. Rows by
alignments cost a tenth of those by metagradients. Judged by eight new runs: other first weights and batches. Writes
``metagradient_documents.json``, ``.md`` and ``.png``.

Reference: Engstrom et al., arXiv 2503.13751; Koh & Liang, arXiv 1703.04730; Pruthi et al., arXiv 2002.08484.
"""

import argparse
import gzip
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sklearn.datasets
from matplotlib.figure import Figure

import hypergrad as hg
from experiments.common import results

CONTEXT, EMBEDDING, HIDDEN, BATCH, STEPS, RUNS = 8, 8, 48, 32, 500, 8
EPILOGUE = 0.9655, 0.9935  # the second: its part of each file
OUTER_RATES = 0.03, 0.1, 0.3
SCALES = 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0
COUNTS = 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.03  # k, as a share of the documents
ADDED = 1, 3, 10, 30, 100, 300
Weights = dict[str, jax.Array]


class Texts(NamedTuple):
    """Characters.

    Attributes:
      documents: (N, length).
      passage: (n,), which the weights of documents are learned for.
      judge: (m,), of the same kind.
      kind: (N,), 1 where a document is printed forwards.
      letters: the number of different characters.
    """

    documents: jax.Array
    passage: jax.Array
    judge: jax.Array
    kind: np.ndarray
    letters: int


class Size(NamedTuple):
    """Documents and their length, characters of the passage, outer steps, runs that scores are the means of."""

    documents: int = 128
    length: int = 1000
    passage: int = 6000
    outer_steps: int = 40
    runs: int = 6


QUICK = Size(24, 200, 400, 4, 2)


def load(seed: int, size: Size) -> Texts:
    """Return other documents and another passage for every seed."""
    rng, root = np.random.default_rng(seed), os.environ.get("HYPERGRAD_DATA")
    if root is None:
        wine = sklearn.datasets.load_wine().DESCR
        half = len(wine) // 2
        texts = [
            "".join(getattr(sklearn.datasets, f"load_{n}")().DESCR for n in ("breast_cancer", "diabetes", "digits"))
        ]
        texts += [wine[:half], wine[half:]]
    else:
        names = ("train", "valid", "test")
        files = [Path(root) / "war_and_peace" / f"{name}.txt.gz" for name in names]
        texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
        texts[1:] = [text[slice(*(int(part * len(text)) for part in EPILOGUE))] for text in texts[1:]]
    letters = sorted(set("".join(texts)))
    number = {letter: i for i, letter in enumerate(letters)}
    train, valid, test = (np.array([number[letter] for letter in text], np.int32) for text in texts)
    places = rng.choice(len(train) // size.length, size.documents, replace=False)
    begins = size.length * places[:, None]
    first = rng.integers(len(valid) - size.passage + 1)
    kind = np.arange(size.documents) % 2
    documents = train[begins + np.arange(size.length)]
    documents = jnp.asarray(np.where(kind[:, None], documents, documents[:, ::-1]))
    return Texts(documents, jnp.asarray(valid[first:][: size.passage]), jnp.asarray(test), kind, len(letters))


def fresh(key: jax.Array, letters: int) -> Weights:
    """Return new weights."""
    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    draw = lambda key, a, b: jax.random.normal(key, (a, b)) / np.sqrt(a)  # noqa: E731
    embedding = jax.random.normal(keys[0], (letters, EMBEDDING))
    hidden = {"embedding": embedding, "w0": draw(keys[1], CONTEXT * EMBEDDING, HIDDEN), "b0": jnp.zeros(HIDDEN)}
    return hidden | {"w1": draw(keys[2], HIDDEN, letters), "b1": jnp.zeros(letters)}


def losses(weights: Weights, windows: jax.Array) -> jax.Array:
    """Return the cross-entropy of the last character of each window."""
    x = weights["embedding"][windows[:, :-1]].reshape(len(windows), -1)
    logits = jnp.tanh(x @ weights["w0"] + weights["b0"]) @ weights["w1"] + weights["b1"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, -1])


def windows_of(text: jax.Array) -> jax.Array:
    """Return all windows of a text."""
    return text[jnp.arange(len(text) - CONTEXT)[:, None] + jnp.arange(CONTEXT + 1)]


def inner_loss(weights: Weights, logits: jax.Array, documents: jax.Array, key: jax.Array) -> jax.Array:
    """Return the weighted loss on windows that the key draws."""
    of_rows, of_places = jax.random.split(key)
    rows = jax.random.randint(of_rows, (BATCH,), 0, len(documents))
    places = jax.random.randint(of_places, (BATCH,), 0, documents.shape[1] - CONTEXT)
    windows = documents[rows[:, None], places[:, None] + jnp.arange(CONTEXT + 1)]
    return jnp.mean(len(documents) * jax.nn.softmax(logits)[rows] * losses(weights, windows))


def outer_loss(weights: Weights, _logits: Any, windows: jax.Array, _key: Any) -> jax.Array:
    """Return the loss on windows of the passage."""
    return losses(weights, windows).mean()


INNER = optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9)


@jax.jit
def train(key: jax.Array, logits: jax.Array, documents: jax.Array, first: Weights) -> Weights:
    """Return the weights after the run of this key, the same that ``hg.metagradient`` takes."""
    of_steps = jax.random.split(key, 5)[0]

    def step(i: jax.Array, carry: Any) -> Any:
        weights, state = carry
        gradient = jax.grad(inner_loss)(weights, logits, documents, jax.random.fold_in(of_steps, i))
        updates, state = INNER.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    return jax.lax.fori_loop(0, STEPS, step, (first, INNER.init(first)))[0]


@jax.jit
def scores(weights: Weights, documents: jax.Array, windows: jax.Array, key: jax.Array) -> jax.Array:
    """Return for each document the product of the gradients of its loss, on sixteen windows, and the passage's."""
    places = jax.random.randint(key, (len(documents), 16), 0, documents.shape[1] - CONTEXT)
    drawn = documents[jnp.arange(len(documents))[:, None, None], places[..., None] + jnp.arange(CONTEXT + 1)]
    towards = jax.grad(outer_loss)(weights, None, windows, None)
    along = lambda weights: losses(weights, drawn.reshape(-1, CONTEXT + 1)).reshape(len(documents), -1).mean(1)  # noqa: E731
    return jax.jvp(along, (weights,), (towards,))[1]


class Row(NamedTuple):
    """The documents that a run draws from, by number, and the logits of their weights."""

    places: np.ndarray
    logits: jax.Array


class Learner:
    """Rows on the texts of one seed."""

    def __init__(self, seed: int, size: Size) -> None:
        self.size, self.texts, self.key = size, load(seed, size), jax.random.key(seed)
        self.windows = windows_of(self.texts.passage)
        self.equal = jnp.zeros(size.documents)
        problem = hg.BilevelProblem(inner_loss, outer_loss)
        settings: dict[str, Any] = {"num_steps": STEPS, "segment": 50, "store": hg.stores.device(10)}
        settings["batch_at"] = lambda _: self.texts.documents
        self.gradient = hg.metagradient(problem, INNER, **settings)
        self.plan = hg.metagradient_plan(problem, INNER, **settings)

    def runs(self, logits: jax.Array, documents: jax.Array, windows: jax.Array, first: int, count: int) -> float:
        """Return the loss on windows, the mean of new runs."""
        keys = [jax.random.fold_in(self.key, first + i) for i in range(count)]
        trained = [train(key, logits, documents, fresh(key, self.texts.letters)) for key in keys]
        return float(np.mean([outer_loss(weights, None, windows, None) for weights in trained]))

    def on_passage(self, row: Row) -> float:
        """Return the loss on the passage, the mean of runs that no row is judged by."""
        return self.runs(row.logits, self.texts.documents[row.places], self.windows, 1_000_000, self.size.runs)

    def learn(self, name: str, outer_rate: float) -> tuple[Row, list[float]]:
        """Return the row after outer steps by metagradients, or by alignments; and cotangents' norms."""
        logits, norms = self.equal, list[float]()
        tx = optax.adam(optax.cosine_decay_schedule(outer_rate, self.size.outer_steps))
        state: Any = tx.init(logits)
        for number in range(self.size.outer_steps):
            key = jax.random.fold_in(self.key, number)
            first = fresh(key, self.texts.letters)
            if name == "metagradient":
                (_, gradient), info = self.gradient(first, logits, self.windows, key=key)
                assert info.status == hg.MetagradientStatus.FINISHED, info.status
                norms = info.cotangent_norms.tolist()
            else:
                weights = train(key, logits, self.texts.documents, first)
                found = scores(weights, self.texts.documents, self.windows, key)
                shares = jax.nn.softmax(logits)
                gradient = -shares * (found - shares @ found)
            updates, state = tx.update(gradient, state)
            logits = jnp.asarray(optax.apply_updates(logits, updates))
        return self.weighted(logits), norms

    def scores(self) -> jax.Array:
        """Return the standardised means over plain runs."""
        found = []
        for number in range(self.size.runs):
            key = jax.random.fold_in(self.key, 10_000 + number)
            weights = train(key, self.equal, self.texts.documents, fresh(key, self.texts.letters))
            found += [scores(weights, self.texts.documents, self.windows, jax.random.fold_in(key, i)) for i in range(8)]
        mean = jnp.mean(jnp.stack(found), 0)
        return (mean - mean.mean()) / mean.std()

    def best(self, candidates: dict[float, Row]) -> tuple[float, Row]:
        """Return the candidate of the least loss on the passage."""
        found = {value: self.on_passage(row) for value, row in candidates.items()}
        value = min(found, key=found.__getitem__)
        return value, candidates[value]

    def weighted(self, logits: jax.Array) -> Row:
        """Return all documents with these logits."""
        return Row(np.arange(self.size.documents), logits)

    def only(self, order: jax.Array, share: float) -> Row:
        """Return the first documents of an order, repeated such that batches are full."""
        count = max(1, round(share * self.size.documents))
        return Row(np.asarray(order)[np.arange(self.size.documents) % count], self.equal)

    def added(self) -> tuple[int, float]:
        """Return how often the passage is best added, and the held-out loss with it."""
        half, length = len(self.texts.passage) // 2, self.size.length

        def with_passage(passage: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
            pieces = jnp.stack([passage[i : i + length] for i in range(0, len(passage) - length + 1, length)])
            logits = jnp.append(self.equal, jnp.full(len(pieces), np.log(count / len(pieces))))
            return logits, jnp.concatenate([self.texts.documents, pieces])

        judges = windows_of(self.texts.passage[half:])
        tried = {n: with_passage(self.texts.passage[:half], n) for n in ADDED}
        found = {n: self.runs(*given, judges, 1_000_000, 4) for n, given in tried.items()}
        count = min(found, key=found.__getitem__)
        texts = with_passage(self.texts.passage, count)
        return count, self.runs(*texts, windows_of(self.texts.judge), 2_000_000, RUNS)

    def judge(self, row: Row) -> dict[str, Any]:
        """Return what a row is judged by."""
        given = row.logits, self.texts.documents[row.places]
        shares = np.bincount(row.places, jax.nn.softmax(row.logits), self.size.documents)
        return {
            "held_out": self.runs(*given, windows_of(self.texts.judge), 2_000_000, RUNS),
            "passage": self.runs(*given, self.windows, 2_000_000, RUNS),
            "effective": float(1 / np.sum(shares**2)),
            "kind": float(shares @ self.texts.kind),
        }


def tune(size: Size) -> dict[str, dict[float, float]]:
    """Return the loss on the passage for every rate of Adam, on a seed that is not reported."""
    learner = Learner(1000, size)
    names = ("alignment, iterated", "metagradient")
    return {name: {rate: learner.on_passage(learner.learn(name, rate)[0]) for rate in OUTER_RATES} for name in names}


def run(seeds: int, size: Size) -> dict[str, Any]:
    """Return the record."""
    tuning = tune(size)
    record: dict[str, Any] = {"size": size._asdict(), "tuning": tuning, "rows": {}, "chosen": {}, "norms": []}
    for seed in range(seeds):
        begun, learner = time.perf_counter(), Learner(seed, size)
        found = {name: learner.learn(name, min(r, key=r.__getitem__)) for name, r in tuning.items()}
        learned = {name: row for name, (row, _) in found.items()}
        logits = learned["metagradient"].logits
        record["norms"].append(found["metagradient"][1])
        score = learner.scores()
        scale, tilted = learner.best({c: learner.weighted(c * score) for c in SCALES})
        share, kept = learner.best({k: learner.only(jnp.argsort(-score), k) for k in COUNTS})
        noise, order = jax.random.split(jax.random.fold_in(learner.key, 77))
        rows = {
            "equal weights": learner.weighted(learner.equal),
            "random weights": learner.weighted(logits.std() * jax.random.normal(noise, (size.documents,))),
            "random documents": learner.only(jax.random.permutation(order, size.documents), share),
            "alignment, weights": tilted,
            "alignment, documents": kept,
            **learned,
            "metagradient, documents": learner.best({k: learner.only(jnp.argsort(-logits), k) for k in COUNTS})[1],
        }
        for name, row in rows.items():
            record["rows"].setdefault(name, []).append(learner.judge(row))
        count, held_out = learner.added()
        record["rows"].setdefault("passage added", []).append({"held_out": held_out})
        for name, value in (("scale", scale), ("share", share), ("added", count)):
            record["chosen"].setdefault(name, []).append(value)
        if seed == 0:
            key = learner.key
            plan = learner.plan(fresh(key, learner.texts.letters), learner.equal, learner.windows, key=key)
            record["runs_per_metagradient"] = plan.forward_equivalents / plan.num_segments
            shown = {"score": score, "kind": learner.texts.kind, "metagradient": logits}
            record["first"] = {name: np.asarray(x, float).round(3).tolist() for name, x in shown.items()}
        print(f"seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    return record


def training_runs(record: dict[str, Any], name: str) -> str:
    """Return the cost of a row, in training runs, without the choice of a rate of Adam on another seed."""
    size = Size(**record["size"])
    costs = {
        "alignment, weights": size.runs * (1 + len(SCALES)),
        "alignment, documents": size.runs * (1 + len(COUNTS)),
        "alignment, iterated": size.outer_steps,
        "metagradient": round(size.outer_steps * record["runs_per_metagradient"]),
        "metagradient, documents": round(size.outer_steps * record["runs_per_metagradient"]) + size.runs * len(COUNTS),
        "passage added": 4 * len(ADDED),
    }
    return f"{costs.get(name, 0):,}"


def report(record: dict[str, Any]) -> str:
    """Return the tables."""

    def spread(values: Sequence[float]) -> str:
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{error}"

    rows, size = record["rows"], Size(**record["size"])
    equal = np.asarray([row["held_out"] for row in rows["equal weights"]])
    head = (
        "weights",
        "training runs",
        "held-out loss",
        "to equal weights",
        "passage",
        "effective documents",
        "forwards, %",
    )
    lines = [head, ("---",) * len(head)]
    for name, found in rows.items():
        held_out = np.asarray([row["held_out"] for row in found])
        shown = [spread(held_out.tolist()), spread((held_out - equal).tolist())]
        if "passage" in found[0]:
            shown += [spread([row["passage"] for row in found])]
            shown += [f"{np.mean([row['effective'] for row in found]):.0f}"]
            shown += [f"{100 * np.mean([row['kind'] for row in found]):.1f}"]
        lines.append((name, training_runs(record, name), *shown, *("",) * (len(head) - 2 - len(shown))))
    tuned = [("rate of Adam", *(f"{rate:g}" for rate in OUTER_RATES)), ("---",) * (1 + len(OUTER_RATES))]
    tuned += [(name, *(f"{x:.3f}" for x in found.values())) for name, found in record["tuning"].items()]
    norms = np.asarray(record["norms"])
    chosen = record["chosen"]
    return "\n".join(
        [
            "# Weights of documents for one passage",
            "",
            f"{size.documents} documents of {size.length:,} characters, a passage of {size.passage:,}. Losses in nats "
            f"per character, means of {RUNS} new runs; mean ± standard error over {len(equal)} seeds. Effective "
            "documents: 1 / Σ shares². Forwards: the share of their weight.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"A metagradient costs {record['runs_per_metagradient']:.1f} training runs. Norm of the cotangent at the "
            "start to that at the end, at the last outer step: "
            f"{np.exp(np.log(norms[:, 0] / norms[:, -1]).mean()):.2g}.",
            f"Chosen: scale {chosen['scale']}, share of documents {chosen['share']}, passage as {chosen['added']}.",
            "",
            "Loss on the passage by the rate of Adam, on the seed that chooses it:",
            "",
            *(f"| {' | '.join(line)} |" for line in tuned),
            "",
        ]
    )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw the held-out losses by seed, and learned weights over scores of the first seed."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (_, found) in enumerate(record["rows"].items()):
        left.plot([row["held_out"] for row in found], [place] * len(found), "o", ms=4, color=f"C{place}")
    left.set(xlabel="held-out loss, nats per character, by seed")
    left.set_yticks(range(len(record["rows"])), list(record["rows"]))
    left.invert_yaxis()
    first = {name: np.asarray(x) for name, x in record["first"].items()}
    weights = len(first["kind"]) * np.asarray(jax.nn.softmax(first["metagradient"]))
    inside = first["kind"] > 0.5
    for part, label in ((inside, "printed forwards"), (~inside, "printed backwards")):
        right.semilogy(first["score"][part], weights[part], "o", ms=4, label=label)
    right.set(xlabel="alignment score after plain training", ylabel="weight by metagradients")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, write the files; return the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few documents and steps: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results")
    args = parser.parse_args(argv)
    record = run(args.seeds, QUICK if args.quick else Size())
    results.write(args.out, "metagradient_documents", record, report(record), draw)
    print(report(record))
    return record


if __name__ == "__main__":
    main()
