"""Points that SMAC, DEHB and CMA-ES ask for, for ``race.py``; runs in an environment with these alone.

    python benchmarks/quality/_peer_search.py '{"method": "SMAC", "size": 10, "seed": 0, "trials": 20, "shortest": 0.1}'

Prints a line of JSON for each point: its coordinates in [0, 1], and the share of a whole training that it should get.
Reads a line with its loss, and so on until the input ends. Each method has its package's own settings; CMA-ES begins
at the middle of the box with a step size of 0.3, as its authors advise. Reference: Lindauer et al., SMAC3, arXiv
2109.09831; Awad et al., DEHB, arXiv 2105.09821; Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772;
Ros & Hansen 2008 (separable CMA-ES).
"""

import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from typing import Any

Points = Generator[tuple[Any, float], float, None]


def cma_es(size: int, seed: int, trials: int, shortest: float, *, separable: bool = False) -> Points:
    """Draw generation after generation."""
    numpy, cmaes = importlib.import_module("numpy"), importlib.import_module("cmaes")
    make = cmaes.SepCMA if separable else cmaes.CMA
    box = numpy.array([[0.0, 1.0]] * size)
    search = make(mean=numpy.full(size, 0.5), sigma=0.3, bounds=box, seed=seed)
    while True:
        told = []
        for _ in range(search.population_size):
            point = search.ask()
            told.append((point, (yield point, 1.0)))
        search.tell(told)


def _space(size: int, seed: int) -> Any:
    space = importlib.import_module("ConfigSpace")
    return space.ConfigurationSpace({f"x{i:05d}": (0.0, 1.0) for i in range(size)}, seed=seed)


def smac(size: int, seed: int, trials: int, shortest: float) -> Points:
    """Ask the facade that SMAC advises for hyperparameters."""
    package = importlib.import_module("smac")
    value = importlib.import_module("smac.runhistory").TrialValue
    with tempfile.TemporaryDirectory() as folder:
        scenario = package.Scenario(
            _space(size, seed), deterministic=True, n_trials=trials, seed=seed, output_directory=folder
        )
        facade = package.HyperparameterOptimizationFacade
        search = facade(scenario, lambda config, seed=0: 0.0, logging_level=False)
        while True:
            info = search.ask()
            search.tell(info, value(cost=(yield list(info.config.values()), 1.0)))


def dehb(size: int, seed: int, trials: int, shortest: float) -> Points:
    """Ask for points with the length of training that each should have."""
    with tempfile.TemporaryDirectory() as folder:
        search = importlib.import_module("dehb").DEHB(
            cs=_space(size, seed),
            min_fidelity=shortest,
            max_fidelity=1.0,
            n_workers=1,
            seed=seed,
            output_path=folder,
            log_level="ERROR",
        )
        while True:
            job = search.ask()
            loss = yield list(job["config"].values()), float(job["fidelity"])
            search.tell(job, {"fitness": loss, "cost": float(job["fidelity"])})


METHODS: dict[str, Callable[..., Points]] = {
    "CMA-ES": cma_es,
    "separable CMA-ES": lambda *args: cma_es(*args, separable=True),
    "SMAC": smac,
    "DEHB": dehb,
}


def main() -> None:
    """Print points and read losses."""
    settings = json.loads(sys.argv[1])
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 - packages print
    points = METHODS[settings["method"]](*(settings[key] for key in ("size", "seed", "trials", "shortest")))
    values, share = next(points)
    while True:
        print(json.dumps([[float(x) for x in values], share]), file=out, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        values, share = points.send(float(line))


if __name__ == "__main__":
    main()
