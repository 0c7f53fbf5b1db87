"""Learned best responses w(λ): problem transforms that make them the inner variable, for ``hg.direct``."""

from hypergrad.responses._base import Encoding, Response, deployable_params, init, optimizer_labels
from hypergrad.responses._hypernetwork import HypernetworkParams, hypernetwork, magnitude_invariant
from hypergrad.responses._learned_scale import HyperparamsWithScale, LearnedScale, learned_scale
from hypergrad.responses._linear import GatedParams, LinearParams, gated, linear
from hypergrad.responses._perturbed import perturbed, sampled
from hypergrad.responses._self_tuning import (
    CenteredParams,
    SelfTuningVariant,
    UncenteredParams,
    delta_stn,
    self_tuning,
    stn,
)
from hypergrad.responses._with_response import with_response
from hypergrad.responses.layers import disable_self_tuning, self_tunable

__all__ = [
    "CenteredParams",
    "Encoding",
    "GatedParams",
    "HypernetworkParams",
    "HyperparamsWithScale",
    "LearnedScale",
    "LinearParams",
    "Response",
    "SelfTuningVariant",
    "UncenteredParams",
    "delta_stn",
    "deployable_params",
    "disable_self_tuning",
    "gated",
    "hypernetwork",
    "init",
    "learned_scale",
    "linear",
    "magnitude_invariant",
    "optimizer_labels",
    "perturbed",
    "sampled",
    "self_tunable",
    "self_tuning",
    "stn",
    "with_response",
]
