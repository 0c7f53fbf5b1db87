"""The optimizers of optax under unrolled differentiation: a row each, and the table that the documentation shows.

``python -m tests.optimizers`` writes the table into docs/optimizers.md.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

import hypergrad as hg

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "optimizers.md"
BEGIN, END = "<!-- table: python -m tests.optimizers -->\n", "<!-- end of table -->\n"

RIGHT, SETTING, REFUSED = "right", "with a setting", "refused"
BOTH, REVERSE, FORWARD = ("reverse", "forward"), ("reverse",), ("forward",)
SETTINGS = {"eps_root": 1e-8}


class OptimizerRow(NamedTuple):
    """An optax optimizer as an inner optimizer.

    Attributes:
      name: as the table shows it; unique.
      make: from hyperparameters to the optimizer, with the setting where it needs one.
      verdict: ``RIGHT``, ``SETTING`` or ``REFUSED``.
      reason: the setting, the reason, or a limit; empty for none.
      at: the optimizer's hyperparameters, and the values to differentiate at.
      loss: whether hyperparameters of the inner loss have a derivative through it.
      modes: of differentiation that pass; the other is refused.
      layers: whether it is right too where a whole layer's gradient is exactly zero.
      masked: whether it is right too where the whole gradient of the first or third step is exactly zero.
      without: the optimizer without its setting.
      message: what the library's refusal says: of the row, of ``without``, or of the mode that does not pass.
    """

    name: str
    make: Callable[[Any], Any]
    verdict: str = RIGHT
    reason: str = ""
    at: Mapping[str, float] = {"rate": 0.1}
    loss: bool = True
    modes: tuple[str, ...] = BOTH
    layers: bool = True
    masked: bool = True
    without: Callable[[Any], Any] | None = None
    message: str = "finite derivative"


def _row(name: str, make: Callable[[Any], Any], *, rate: float = 0.1, more: Any = (), **options: Any) -> OptimizerRow:
    return OptimizerRow(name, make, at={"rate": rate, **dict(more)}, **options)


def _rooted(name: str, make: Callable[..., Any], *, rate: float = 0.1, more: Any = (), **options: Any) -> OptimizerRow:
    """Return the row of an optimizer that is right with ``eps_root=1e-8`` and refused without."""
    with_it = lambda h: make(h, eps_root=1e-8)  # noqa: E731
    options = {"reason": "`eps_root=1e-8`", "message": "eps_root", **options}
    return _row(name, with_it, rate=rate, more=more, verdict=SETTING, without=make, **options)


def _refused(name: str, make: Callable[[Any], Any], reason: str, message: str, **options: Any) -> OptimizerRow:
    return _row(name, make, verdict=REFUSED, reason=reason, message=message, modes=(), **options)


ZERO_LAYER = "NaN where a whole layer's gradient is exactly zero"
ZERO_GRADIENT = "NaN where the whole gradient is exactly zero"
SIGNS = "hyperparameters of the loss are refused: a sign has no derivative"
NO_EPS = "derivative not finite at a dead unit, and no setting that helps"
START = "enters the initial state: right with a fresh one, as of `hg.value_and_hypergrad`, and refused with a given one"

SMALL_EPS = "in float32 refused for arrays that it does not factor: set `eps=1e-12`"

ROWS = [
    _row("adabelief", lambda h: optax.adabelief(h["rate"], b1=h["b1"]), more={"b1": 0.9}),
    _row("adadelta", lambda h: optax.adadelta(h["rate"], rho=h["rho"]), more={"rho": 0.9}),
    _row(
        "adafactor",
        lambda h: optax.adafactor(h["rate"], min_dim_size_to_factor=2),
        reason=f"{ZERO_LAYER}, but for `clipping_threshold=None`; {SMALL_EPS}",
        layers=False,
        masked=False,
    ),
    _row(
        "adafactor, unclipped, with momentum",
        lambda h: optax.adafactor(
            h["rate"], min_dim_size_to_factor=2, clipping_threshold=None, momentum=h["momentum"], dtype_momentum=float
        ),
        more={"momentum": 0.9},
        reason=SMALL_EPS,
    ),
    _row(
        "adagrad",
        lambda h: optax.adagrad(h["rate"], initial_accumulator_value=h["accumulator"]),
        more={"accumulator": 0.1},
        reason=f"`initial_accumulator_value` {START}",
    ),
    _rooted("adam", lambda h, **s: optax.adam(h["rate"], b1=h["b1"], **s), more={"b1": 0.9}),
    _row("adamax", lambda h: optax.adamax(h["rate"], b1=h["b1"]), more={"b1": 0.9}),
    _row("adamaxw", lambda h: optax.adamaxw(h["rate"], weight_decay=h["decay"]), more={"decay": 0.01}),
    _rooted("adamw", lambda h, **s: optax.adamw(h["rate"], weight_decay=h["decay"], **s), more={"decay": 0.01}),
    _row("adan", lambda h: optax.adan(h["rate"], b1=h["b1"]), more={"b1": 0.9}),
    _rooted("amsgrad", lambda h, **s: optax.amsgrad(h["rate"], b1=h["b1"], **s), more={"b1": 0.9}),
    _row("fromage", lambda h: optax.fromage(h["rate"]), rate=0.03),
    _rooted(
        "lamb",
        lambda h, **s: optax.lamb(h["rate"], b1=h["b1"], **s),
        more={"b1": 0.9},
        reason=f"`eps_root=1e-8`; in reverse mode {ZERO_LAYER}",
        layers=False,
    ),
    _row(
        "lars",
        lambda h: optax.lars(h["rate"], momentum=h["momentum"], trust_coefficient=0.1),
        more={"momentum": 0.9},
        reason=f"in reverse mode {ZERO_LAYER}, but for `eps=1e-8`",
        layers=False,
        masked=False,
    ),
    _row(
        "lars with eps",
        lambda h: optax.lars(h["rate"], weight_decay=h["decay"], trust_coefficient=0.1, eps=1e-8),
        more={"decay": 0.01},
    ),
    _refused(
        "lbfgs", lambda h: optax.lbfgs(h["rate"]), "its line search wants `value`, `grad`, `value_fn`", "value_fn"
    ),
    _row(
        "lbfgs without line search",
        lambda h: optax.lbfgs(h["rate"], linesearch=None, scale_init_precond=False),
        verdict=SETTING,
        reason="`linesearch=None, scale_init_precond=False`: the scale of the first step is a `stop_gradient`, wrong; "
        f"in reverse mode {ZERO_GRADIENT}",
        masked=False,
        rate=0.5,
    ),
    _row(
        "lion",
        lambda h: optax.lion(h["rate"], weight_decay=h["decay"]),
        rate=0.01,
        more={"decay": 0.1},
        loss=False,
        reason=SIGNS,
    ),
    _rooted("nadam", lambda h, **s: optax.nadam(h["rate"], b1=h["b1"], **s), more={"b1": 0.9}),
    _rooted("nadamw", lambda h, **s: optax.nadamw(h["rate"], weight_decay=h["decay"], **s), more={"decay": 0.01}),
    _row("noisy_sgd", lambda h: optax.noisy_sgd(h["rate"], eta=h["eta"], key=jax.random.key(0)), more={"eta": 0.01}),
    _row(
        "novograd",
        lambda h: optax.novograd(h["rate"], b1=h["b1"]),
        rate=0.01,
        more={"b1": 0.9},
        reason=ZERO_LAYER,
        layers=False,
        masked=False,
    ),
    _rooted(
        "optimistic_adam_v2",
        lambda h, **s: optax.optimistic_adam_v2(h["rate"], alpha=h["alpha"], **s),
        rate=0.05,
        more={"alpha": 0.5},
    ),
    _row(
        "optimistic_gradient_descent",
        lambda h: optax.optimistic_gradient_descent(h["rate"], alpha=h["alpha"]),
        more={"alpha": 0.5},
    ),
    _refused("polyak_sgd", lambda h: optax.polyak_sgd(h["rate"]), "wants `value`", "'value'"),
    _rooted(
        "radam",
        lambda h, **s: optax.radam(h["rate"], b1=h["b1"], **s),
        more={"b1": 0.9},
        reason="`eps_root=1e-8` and `mode=hg.forward()`: its rectifier is √ of a negative number in the first steps",
        modes=FORWARD,
        message="finite derivative",
    ),
    _row("rmsprop", lambda h: optax.rmsprop(h["rate"], decay=h["decay"]), rate=0.01, more={"decay": 0.9}),
    _row(
        "rmsprop, centered, with momentum",
        lambda h: optax.rmsprop(h["rate"], centered=True, momentum=h["momentum"]),
        rate=0.01,
        more={"momentum": 0.9},
    ),
    _refused(
        "rmsprop with eps_in_sqrt=False",
        lambda h: optax.rmsprop(h["rate"], eps_in_sqrt=False),
        "derivative not finite at a dead unit: leave `eps_in_sqrt=True`",
        "finite derivative",
    ),
    _row(
        "rprop",
        lambda h: optax.rprop(h["rate"], eta_plus=h["eta_plus"]),
        rate=0.03,
        more={"eta_plus": 1.2},
        loss=False,
        reason=f"{SIGNS}; `learning_rate` {START}",
    ),
    _row("sgd", lambda h: optax.sgd(h["rate"])),
    _row("sgd with momentum", lambda h: optax.sgd(h["rate"], h["momentum"]), more={"momentum": 0.9}),
    _row("sgd with Nesterov", lambda h: optax.sgd(h["rate"], h["momentum"], nesterov=True), more={"momentum": 0.9}),
    _row("sign_sgd", lambda h: optax.sign_sgd(h["rate"]), rate=0.01, loss=False, reason=SIGNS),
    _row("signum", lambda h: optax.signum(h["rate"]), rate=0.01, loss=False, reason=SIGNS),
    _row("sm3", lambda h: optax.sm3(h["rate"], momentum=h["momentum"]), more={"momentum": 0.9}),
    _row("yogi", lambda h: optax.yogi(h["rate"], b1=h["b1"]), more={"b1": 0.9}),
    _row("contrib.acprop", lambda h: contrib.acprop(h["rate"], b1=h["b1"]), rate=0.01, more={"b1": 0.9}),
    _rooted("contrib.ademamix", lambda h, **s: contrib.ademamix(h["rate"], b1=h["b1"], **s), more={"b1": 0.9}),
    _refused("contrib.adopt", lambda h: contrib.adopt(h["rate"]), NO_EPS, "finite derivative"),
    _row(
        "contrib.cocob",
        lambda h: contrib.cocob(alpha=h["alpha"]),
        reason="a learning rate has no effect: its steps do not depend on the gradient's scale",
    )._replace(at={"alpha": 100.0}),
    _refused("contrib.dadapt_adamw", lambda h: contrib.dadapt_adamw(h["rate"]), NO_EPS, "finite derivative", rate=1.0),
    _row(
        "contrib.dog",
        lambda h: contrib.dog(h["rate"], init_step=("learning_rate", 0.1)),
        rate=1.5,
        modes=REVERSE,
        reason=f"forward mode is refused: a norm of zero in the first step; {ZERO_GRADIENT} in the first step",
        masked=False,
    ),
    _row(
        "contrib.dowg",
        lambda h: contrib.dowg(h["rate"]),
        rate=1.0,
        reason=f"{ZERO_GRADIENT} in the first step",
        masked=False,
    ),
    _refused(
        "chain(contrib.differentially_private_aggregate, sgd)",
        lambda h: optax.chain(
            contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0)), optax.sgd(h["rate"])
        ),
        "as `contrib.dpsgd`: wants one gradient per example",
        "batch dim|finite derivative",
    ),
    _refused("contrib.galore", lambda h: contrib.galore(h["rate"], rank=2), NO_EPS, "finite derivative"),
    _refused("contrib.madgrad", lambda h: contrib.madgrad(h["rate"]), NO_EPS, "finite derivative"),
    _refused(
        "contrib.mechanize",
        lambda h: contrib.mechanize(optax.sgd(h["rate"])),
        "derivative not finite in the first step: a norm of zero",
        "finite derivative",
    ),
    _refused("contrib.momo", lambda h: contrib.momo(h["rate"]), "wants `value`", "'value'"),
    _refused("contrib.momo_adam", lambda h: contrib.momo_adam(h["rate"]), "wants `value`", "'value'"),
    _row(
        "contrib.muon",
        lambda h: contrib.muon(h["rate"], beta=h["beta"], adam_eps_root=1e-8),
        verdict=SETTING,
        rate=0.03,
        more={"beta": 0.9},
        reason=f"`adam_eps_root=1e-8`; {ZERO_LAYER}",
        layers=False,
        masked=False,
        without=lambda h: contrib.muon(h["rate"], beta=h["beta"]),
    ),
    _refused("contrib.prodigy", lambda h: contrib.prodigy(h["rate"]), NO_EPS, "finite derivative", rate=1.0),
    _row(
        "contrib.sam",
        lambda h: contrib.sam(optax.sgd(h["rate"]), optax.sgd(h["radius"])),
        more={"radius": 0.05},
        reason="transparent mode",
    ),
    _row(
        "contrib.schedule_free_sgd",
        lambda h: contrib.schedule_free_sgd(h["rate"], b1=h["b1"]),
        more={"b1": 0.9},
    ),
    _refused(
        "contrib.schedule_free_adamw",
        lambda h: contrib.schedule_free_adamw(h["rate"]),
        "hides `eps_root`: use `contrib.schedule_free` around `optax.adam`",
        "eps_root",
    ),
    _rooted(
        "contrib.schedule_free around adam",
        lambda h, **s: contrib.schedule_free(optax.adam(h["rate"], b1=0.0, **s), h["rate"], b1=h["b1"]),
        more={"b1": 0.9},
    ),
    _rooted(
        "contrib.simplified_ademamix",
        lambda h, **s: contrib.simplified_ademamix(h["rate"], alpha=h["alpha"], **s),
        rate=0.01,
        more={"alpha": 0.5},
    ),
    _refused("contrib.sophia", lambda h: contrib.sophia(h["rate"]), "wants Hessians, by `obj_fn`", "obj_fn"),
    _row(
        "chain(clip_by_global_norm, sgd)",
        lambda h: optax.chain(optax.clip_by_global_norm(h["norm"]), optax.sgd(h["rate"])),
        more={"norm": 0.1},
        modes=FORWARD,
        reason=f"reverse mode is refused: {ZERO_GRADIENT}; use `hg.optimizers.clip_by_global_norm`",
        message=r"with optax\.clip_by_global_norm.*Use hg\.optimizers\.clip_by_global_norm:",
    ),
    _refused(
        "chain(clip_by_block_rms, sgd)",
        lambda h: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(h["rate"])),
        f"{ZERO_LAYER}: use `hg.optimizers.clip_by_block_rms`",
        r"with optax\.clip_by_block_rms.*Use hg\.optimizers\.clip_by_block_rms:",
    ),
    _refused(
        "chain(normalize_by_update_norm, sgd)",
        lambda h: optax.chain(optax.normalize_by_update_norm(), optax.sgd(h["rate"])),
        f"{ZERO_GRADIENT}: use `hg.optimizers.normalize_by_update_norm`",
        r"with optax\.normalize_by_update_norm.*Use hg\.optimizers\.normalize_by_update_norm:",
    ),
    _row(
        "chain(hg.optimizers.clip_by_global_norm, sgd)",
        lambda h: optax.chain(hg.optimizers.clip_by_global_norm(h["norm"]), optax.sgd(h["rate"])),
        more={"norm": 0.1},
    ),
    _row(
        "chain(hg.optimizers.clip_by_block_rms, sgd)",
        lambda h: optax.chain(hg.optimizers.clip_by_block_rms(h["rms"]), optax.sgd(h["rate"])),
        more={"rms": 0.05},
    ),
    _row(
        "chain(hg.optimizers.normalize_by_update_norm, sgd)",
        lambda h: optax.chain(hg.optimizers.normalize_by_update_norm(h["scale"]), optax.sgd(h["rate"])),
        more={"scale": 0.5},
    ),
    _refused(
        "chain(adaptive_grad_clip, sgd)",
        lambda h: optax.chain(optax.adaptive_grad_clip(0.05), optax.sgd(h["rate"])),
        "norms unit by unit: " + NO_EPS,
        "finite derivative",
    ),
    _row(
        "chain(ema, sgd)",
        lambda h: optax.chain(optax.ema(h["decay"]), optax.sgd(h["rate"])),
        more={"decay": 0.9},
    ),
    _row(
        "inject_hyperparams(sgd)",
        lambda h: optax.inject_hyperparams(optax.sgd)(h["rate"]),
        reason=f"a number, not a schedule, {START}",
    ),
    _rooted(
        "MultiSteps(adam)",
        lambda h, **s: optax.MultiSteps(optax.adam(h["rate"], b1=h["b1"], **s), 2, accumulator_dtype=float),
        more={"b1": 0.9},
    ),
    _row("apply_if_finite(sgd)", lambda h: optax.apply_if_finite(optax.sgd(h["rate"]), 3)),
    _rooted(
        "partition: adam for matrices, sgd for the rest",
        lambda h, **s: optax.partition(
            {"adam": optax.adam(h["rate"], b1=h["b1"], **s), "sgd": optax.sgd(h["rate"])},
            lambda params: jax.tree.map(lambda w: "adam" if w.ndim > 1 else "sgd", params),
        ),
        more={"b1": 0.9},
    ),
    _rooted(
        "chain(scale_by_adam, hg.optimizers)",
        lambda h, **s: optax.chain(
            optax.scale_by_adam(**s),
            hg.optimizers.add_decayed_weights(h["decay"]),
            hg.optimizers.scale_by_learning_rate(h["rate"]),
        ),
        more={"decay": 0.01},
    ),
]


def hyperparameters(row: OptimizerRow) -> list[str]:
    """Return the names of what is checked against finite differences."""
    if row.verdict == REFUSED:
        return []
    return [*(["loss"] if row.loss else []), *row.at]


def table() -> str:
    """Return the table of the documentation."""
    lines = ["| optimizer | verdict | setting or reason | hyperparameters checked |", "|---|---|---|---|"]
    for row in ROWS:
        checked = ", ".join(hyperparameters(row))
        lines.append(f"| `{row.name}` | {row.verdict} | {row.reason} | {checked} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    """Put the table, and the version of optax that it is of, into the documentation."""
    before, rest = DOCS.read_text().split(BEGIN)
    _, after = rest.split(END)
    DOCS.write_text(f"{before}{BEGIN}\nTested with optax {optax.__version__}.\n\n{table()}\n{END}{after}")


if __name__ == "__main__":
    write()
