"""Learned best responses w(λ): problem transforms that make them the inner variable, for ``hg.direct``."""

from hypergrad.responses._base import Encoding, Perturbed, Response, init, labels, weights_at
from hypergrad.responses._hypernetwork import HypernetworkParams, hypernetwork, magnitude_invariant
from hypergrad.responses._linear import GatedParams, LinearParams, gated, linear
from hypergrad.responses._perturbed import LearnedScale, learned_scale, perturbed, sampled
from hypergrad.responses._self_tuning import (
    CenteredParams,
    SelfTuningForm,
    UncenteredParams,
    delta_stn,
    self_tuning,
    stn,
)
from hypergrad.responses._with_response import with_response
from hypergrad.responses.layers import self_tunable, untuned

__all__ = [
    "CenteredParams",
    "Encoding",
    "GatedParams",
    "HypernetworkParams",
    "LearnedScale",
    "LinearParams",
    "Perturbed",
    "Response",
    "SelfTuningForm",
    "UncenteredParams",
    "delta_stn",
    "gated",
    "hypernetwork",
    "init",
    "labels",
    "learned_scale",
    "linear",
    "magnitude_invariant",
    "perturbed",
    "sampled",
    "self_tunable",
    "self_tuning",
    "stn",
    "untuned",
    "weights_at",
    "with_response",
]
