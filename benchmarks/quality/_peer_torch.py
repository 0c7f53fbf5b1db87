"""The problems of ``peer_accuracy.py`` in PyTorch, for the child scripts of PyTorch libraries; not run by itself.

import _peer_torch
inner = _peer_torch.inner_loss(problem, weights, logs)
"""

import importlib
from typing import Any

import _peer
import numpy as np

torch: Any = importlib.import_module("torch")


class Linear(torch.nn.Module):  # type: ignore[misc]
    """``forward(x) = x w``."""

    def __init__(self, weights: np.ndarray) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weights))

    def forward(self, x: Any) -> Any:
        """Return predictions or logits."""
        return x @ self.weight


class Decays(torch.nn.Module):  # type: ignore[misc]
    """Log decays, one per weight."""

    def __init__(self, logs: np.ndarray) -> None:
        super().__init__()
        self.logs = torch.nn.Parameter(torch.tensor(logs))

    def forward(self) -> Any:
        """Return the log decays."""
        return self.logs


def _loss(kind: str, predicted: Any, y: np.ndarray) -> Any:
    if kind == "ridge":
        return 0.5 * ((predicted - torch.tensor(y)) ** 2).sum()
    return torch.nn.functional.cross_entropy(predicted, torch.tensor(y))


def inner_loss(problem: _peer.Problem, weights: Any, logs: Any) -> Any:
    """Return the training loss with decays."""
    data = _loss(problem.kind, torch.tensor(problem.x) @ weights, problem.y)
    return data + 0.5 * (torch.exp(logs) * weights**2).sum()


def outer_loss(problem: _peer.Problem, weights: Any) -> Any:
    """Return the validation loss."""
    return _loss(problem.kind, torch.tensor(problem.valid_x) @ weights, problem.valid_y)
