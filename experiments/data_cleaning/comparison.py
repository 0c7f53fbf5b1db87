"""Put learned weights beside other ways to use labels that are partly wrong, and a few clean ones.

What is trained from scratch starts at the same first weights, and has its decay and its step chosen by validation
loss. ``test`` is read once, for what was chosen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score
from tqdm import tqdm

from experiments.data_cleaning.run import DECAYS, Data, Fitted, Settings, Tools

ALL, STOPPED, JOINED = "all labels, to the end", "all labels, best decay and step", "all labels and validation"
JOINT, RETRAINED = "learned weights, jointly trained", "learned weights, retrained"
KEPT, KEPT_JOINED = "weight ≥ ½, retrained", "weight ≥ ½ and validation"
VALID, FILTERED = "validation only", "labels that network agrees with"
FILTERED_JOINED = "these labels and validation"
ORACLE = "wrong labels left out (oracle)"
BY_WEIGHT, BY_VALID, BY_ALL = "learned weight < ½", "validation only disagrees", "all labels, best disagrees"
ROWS = (ALL, STOPPED, JOINED, VALID, FILTERED, FILTERED_JOINED, JOINT, RETRAINED, KEPT, KEPT_JOINED, ORACLE)
FITS = 11  # trainings from scratch


class Outcome(NamedTuple):
    """One network: how many examples it was trained on, and its test loss (nats) and error (share)."""

    examples: int
    test_loss: float
    test_error: float


class Found(NamedTuple):
    """How well wrong labels are found: among those suspected, and (AUC) by the order that doubt puts labels in."""

    precision: float
    recall: float
    f1: float
    auc: float


class Result(NamedTuple):
    """One seed: networks and searches by the names of their rows; learned weights, and whether a label is wrong."""

    networks: dict[str, Outcome]
    searches: dict[str, Found]
    weights: np.ndarray
    wrong: np.ndarray


def compare(
    learn: Callable[..., tuple[Any, Any]], tools: Tools, settings: Settings, data: Data, bar: tqdm, *, seed: int
) -> Result:
    """Train in each way; ``learn(params, data, key, run) -> (params, weights)``."""
    # The rbg generator compiles three times faster than the default one.
    first, second, key = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    fresh, networks = tools.init(second, data.train), {}
    ones, clean = np.ones(len(data.wrong)), np.ones(len(data.valid.y))

    def fit(weights: Any, extra: Any, judged: Any = clean) -> tuple[Fitted, int]:
        both = np.concatenate([weights, extra])
        fitted = tools.fit(fresh, data, both.astype(np.float32), judged.astype(np.float32), key)
        bar.update(settings.steps_fixed)
        return fitted, int((both > 0).sum())

    def test(name: str, params: Any, examples: int) -> Any:
        networks[name] = Outcome(examples, *map(float, tools.judge(params, data.test)))
        return params

    def best(name: str, weights: Any, joined: str | None = None, last: str | None = None) -> Any:
        fitted, examples = fit(weights, 0 * clean)
        at = _lowest(fitted.losses)
        if last:
            test(last, _at(fitted, (-1, DECAYS.index(settings.decay))), examples)
        if joined:
            more, number = fit(weights, clean)
            test(joined, _at(more, at), number)
        return test(name, _at(fitted, at), examples)

    params, weights = learn(tools.init(first, data.train), data, key, f"seed {seed}/learned")
    test(JOINT, params, len(ones))
    best(RETRAINED, weights)
    best(KEPT, weights >= 0.5, KEPT_JOINED)
    best(ORACLE, ~data.wrong)

    from_all = best(STOPPED, ones, JOINED, ALL)

    half = np.arange(len(clean)) % 2
    on_halves = sum(np.asarray(fit(0 * ones, kept, 1 - kept)[0].losses) for kept in (half, 1 - half))
    from_valid = test(VALID, _at(fit(0 * ones, clean)[0], _lowest(on_halves)), len(clean))
    doubts = {name: tools.losses(params, data.train) for name, params in ((BY_VALID, from_valid), (BY_ALL, from_all))}
    best(FILTERED, ~np.asarray(doubts[BY_VALID][1]), FILTERED_JOINED)

    searches = {BY_WEIGHT: _found(data.wrong, weights < 0.5, -weights)}
    searches |= {name: _found(data.wrong, disagrees, losses) for name, (losses, disagrees) in doubts.items()}
    return Result({name: networks[name] for name in ROWS}, searches, weights, data.wrong)


def _lowest(losses: Any) -> tuple[int, int]:
    finite = np.nan_to_num(np.asarray(losses), nan=np.inf)
    look, decay = np.unravel_index(finite.argmin(), finite.shape)
    return int(look), int(decay)


def _at(fitted: Fitted, at: tuple[int, int]) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[at], fitted.params)


def _found(wrong: np.ndarray, suspected: Any, doubt: Any) -> Found:
    shares = precision_recall_fscore_support(wrong, np.asarray(suspected), average="binary", zero_division=0)[:3]
    precision, recall, f1 = map(float, shares)
    return Found(precision, recall, f1, float(roc_auc_score(wrong, np.asarray(doubt))))
