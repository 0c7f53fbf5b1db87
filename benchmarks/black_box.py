"""The rivals of ``self_tuning.py``: black-box searches over the same box of hyperparameters, by Optuna.

A search draws values, trains at them from fresh weights and hears the best validation loss so far at every look; a
pruner may stop the training early. Random search and TPE train every trial to the end, Hyperband and ASHA stop most.

Reference: Bergstra & Bengio 2012; Bergstra et al. 2011 (TPE); Li et al., Hyperband, arXiv 1603.06560; Li et al., ASHA,
arXiv 1810.05934; Akiba et al., Optuna, arXiv 1907.10902.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import optuna

RANDOM, TPE, HYPERBAND, ASHA = "random search", "TPE", "Hyperband", "ASHA"


class Piece(NamedTuple):
    """A stretch of training and what was seen at its end.

    Attributes:
      gradients: what the stretch cost.
      loss: validation loss.
      params: plain weights.
      values: constrained hyperparameters.
      trial: number of the training run, from 0.
    """

    gradients: int
    loss: float
    params: Any
    values: Any
    trial: int


def study(name: str, seed: int, *, trials: int, trial_gradients: int, look: int) -> optuna.Study:
    """Return a study of one method.

    Args:
      name: of the method.
      seed: of the sampler.
      trials: that the budget pays for in full: a quarter of TPE's are drawn at random, two at least, ten at most.
      trial_gradients: length of a trial that nobody stops.
      look: gradients between two looks: the shortest that a pruner may stop a trial at.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    random, nothing = optuna.samplers.RandomSampler(seed=seed), optuna.pruners.NopPruner()
    sampler, pruner = {
        RANDOM: (random, nothing),
        TPE: (optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, trials // 4))), nothing),
        HYPERBAND: (
            optuna.samplers.TPESampler(seed=seed),
            optuna.pruners.HyperbandPruner(min_resource=look, max_resource=trial_gradients, reduction_factor=3),
        ),
        ASHA: (random, optuna.pruners.SuccessiveHalvingPruner(min_resource=look, reduction_factor=3)),
    }[name]
    return optuna.create_study(direction="minimize", sampler=sampler, pruner=pruner, study_name=f"{name} {seed}")


def search(
    study: optuna.Study, high: Any, train: Callable[[Any, int], Iterator[Any]], look: int, patience: int
) -> Iterator[Piece]:
    """Search without end.

    Args:
      study: from ``study``.
      high: tree of upper ends; every hyperparameter is drawn from (0, high).
      train: ``train(values, number)``: looks at the training of trial ``number`` (``Look`` of the example).
      look: gradients between two looks.
      patience: gradients without a lower validation loss after which a trial ends.

    Yields:
      A ``Piece`` a look.
    """
    leaves, structure = jax.tree.flatten(high)
    for number in itertools.count():
        trial = study.ask()
        drawn = [trial.suggest_float(f"{place}", 0.0, top) for place, top in enumerate(leaves)]
        values, best, since, pruned = jax.tree.unflatten(structure, drawn), math.inf, 0, False
        for seen in train(values, number):
            yield Piece(look, seen.loss, seen.params, values, number)
            best, since = min(best, seen.loss), (0 if seen.loss < best else since + look)
            trial.report(best, seen.steps)
            pruned = trial.should_prune()
            if pruned or since >= patience:
                break
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, best)
