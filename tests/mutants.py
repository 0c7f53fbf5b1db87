"""Change the source in one place at a time, and see whether a test of that module notices.

``python tests/mutants.py`` runs all, ``python tests/mutants.py guard 3`` those whose file or number is named; each in a copy of
the package, against the test files of its module only. A mutant that survives is a test that is missing.
``tests/mutants.md`` holds the last table.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """One change."""

    file: str  # below hypergrad/
    old: str
    new: str
    tests: str  # files below tests/; with a -k expression slow tests run, too
    kind: str


KEYS, FAULTS, TOYS, CG = "test_keys.py", "test_faults.py", "test_toys.py", "test_conjugate_gradients.py"
MINIMIZE, INNER = "test_minimize.py", "test_inner_solvers.py"
EVOLUTION, DESCENT, LEARNED = "test_evolution.py", "test_hypergradient_descent.py", "test_learned_optimizers.py"
META = "test_metagradient.py"
META_COMPILE = "test_metagradient.py -k compile_once"
META_MEMORY = "test_metagradient.py -k half_a_segment"
MUTANTS = [
    # keys
    Mutant(
        "drivers/_bilevel.py",
        "impl=setup.key_impl), state.step)",
        "impl=setup.key_impl), 0)",
        KEYS,
        "one key for all calls",
    ),
    Mutant("drivers/_bilevel.py", "_fold_in(root, INIT)", "root", KEYS, "wrong key"),
    Mutant("drivers/_functional.py", "jax.random.fold_in(key, INIT)", "key", KEYS, "wrong key"),
    Mutant(
        "training.py",
        "evaluate_inner(ctx.problem, at, batch, ctx.keys.solve,",
        "evaluate_inner(ctx.problem, at, batch, ctx.keys.outer,",
        KEYS,
        "wrong key",
    ),
    Mutant(
        "training.py",
        "ctx.outer_batch, ctx.keys.outer, ctx.at",
        "ctx.outer_batch, ctx.keys.inner, ctx.at",
        KEYS,
        "wrong key",
    ),
    Mutant("training.py", "jax.random.fold_in(ctx.keys.inner, index)", "ctx.keys.inner", KEYS, "one key for all steps"),
    Mutant(
        "training.py",
        "jax.random.fold_in(ctx.keys.inner, index)",
        "jax.random.fold_in(ctx.keys.inner, index + 1)",
        KEYS,
        "off by one",
    ),
    Mutant(
        "estimators/_implicit.py",
        "symmetric,\n            ctx.keys.estimate,",
        "symmetric,\n            ctx.keys.solve,",
        KEYS,
        "wrong key",
    ),
    Mutant(
        "diagnostics/_retrain.py",
        "start_key, batch_key, loss_key = jax.random.split(key, 3)",
        "start_key, batch_key, loss_key = key, key, key",
        KEYS,
        "shared key",
    ),
    Mutant(
        "diagnostics/_compare.py",
        "key = validate.as_key(key)",
        "key = None if key is None else jax.random.key(0)",
        KEYS,
        "key ignored",
    ),
    # batches, windows and states
    Mutant(
        "training.py",
        "return data.take(ctx.inner_batches, -1)",
        "return data.take(ctx.inner_batches, 0)",
        KEYS,
        "first batch of a window",
    ),
    Mutant(
        "training.py",
        "Trained(optax.apply_updates(at.params, updates), inner_state, model_state)",
        "Trained(optax.apply_updates(at.params, updates), inner_state, at.model_state)",
        KEYS,
        "dropped model state",
    ),
    Mutant(
        "training.py",
        "Trained(optax.apply_updates(at.params, updates), inner_state, model_state)",
        "Trained(optax.apply_updates(at.params, updates), at.inner_state, model_state)",
        f"{FAULTS} test_bilevel.py -k hand or adopted",
        "dropped optimizer state",
    ),
    Mutant("training.py", "inner_loss=values[-1]", "inner_loss=values[0]", FAULTS, "loss of the first step"),
    Mutant(
        "training.py",
        "{**keywords, **others}",
        "{**others, **keywords}",
        "test_first_order.py -k own_loss",
        "swapped precedence",
    ),
    Mutant(
        "training.py",
        "at.model_state, drawn)[0]  # noqa",
        "at.model_state, drawn)[0] * 0  # noqa",
        FAULTS,
        "line search without a loss",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "number % of == 0",
        "number % of == 1",
        "test_bilevel.py -k due",
        "off by one in due",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "_is_due(setup, _next(state.step), outer_batch)",
        "_is_due(setup, state.step, outer_batch)",
        "test_bilevel.py -k due",
        "off by one in due",
    ),
    Mutant(
        "drivers/_bilevel.py", "made = jax.tree.map(jnp.copy, inner_state)", "pass", FAULTS, "adopted state dropped"
    ),
    Mutant("drivers/_bilevel.py", 'extra.get("value", math.nan)', "math.nan", FAULTS, "given loss dropped"),
    Mutant(
        "drivers/_bilevel.py",
        "state.step + 1, ctx.at.inner_state,",
        "state.step + 1, state.inner,",
        "test_bilevel.py -k hand",
        "stale optimizer state",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "tree.promote(new) - tree.promote(old), ctx.at.params",
        "new - old, ctx.at.params",
        "test_faults.py -k low_precision",
        "low-precision difference",
    ),
    Mutant(
        "drivers/_phases.py",
        "ctx = ctx._replace(at=at, tape=tape)",
        "ctx = ctx._replace(tape=tape)",
        "test_toys.py test_bilevel.py",
        "weights before the steps",
    ),
    Mutant(
        "drivers/_functional.py",
        "if not trains and tree.refuses_nan():",
        "if False:",
        "test_strict.py -k not_known",
        "NaN under NaN checks",
    ),
    # the guard
    Mutant(
        "drivers/_guard.py",
        "(SkipReason.OUTER_LOSS, ~jnp.isfinite(estimate.value))",
        "(SkipReason.OUTER_LOSS, jnp.isnan(estimate.value))",
        TOYS,
        "inf passes",
    ),
    Mutant(
        "drivers/_guard.py",
        "solve.status == Status.DIVERGED) |",
        "solve.status == Status.CONVERGED) |",
        FAULTS,
        "wrong status",
    ),
    Mutant(
        "drivers/_guard.py",
        "solve.residual > guard.max_residual",
        "solve.residual < guard.max_residual",
        FAULTS,
        "wrong sign",
    ),
    Mutant(
        "drivers/_guard.py",
        "for code, holds in reversed(reasons):",
        "for code, holds in reasons:",
        FAULTS,
        "last reason counts",
    ),
    Mutant(
        "drivers/_guard.py",
        "((reason == SkipReason.SOLVE) & ~state_lost)",
        "(reason == -1)",
        "test_guard.py",
        "cold after a skipped solve",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "(SkipReason.OUTER_STATE, state, before.state),",
        "",
        FAULTS,
        "outer state unguarded",
    ),
    Mutant(
        "drivers/_guard.py",
        "(SkipReason.ESTIMATOR_STATE, lost | state_lost)",
        "(SkipReason.ESTIMATOR_STATE, lost)",
        "test_guard.py",
        "estimator state unguarded",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "jax.lax.cond(info.skipped, nothing, step, before.state)",
        "step(before.state)",
        FAULTS,
        "a skipped step is taken",
    ),
    Mutant(
        "drivers/_phases.py",
        "new = optax.tree.where(lost, state, new)",
        "pass",
        "test_guard.py test_toys.py",
        "no rollback",
    ),
    Mutant("tree.py", "jnp.isfinite(b) & ~jnp.isfinite(a)", "~jnp.isfinite(a)", FAULTS, "inf by design counts"),
    Mutant("tree.py", "size > floor)", "size > 0)", f"{FAULTS} -k norms", "unscaled norm"),
    # estimators
    Mutant(
        "estimators/_implicit.py",
        "jnp.where(finite, d - i, jnp.nan)",
        "jnp.where(finite, d + i, jnp.nan)",
        KEYS,
        "wrong sign",
    ),
    Mutant(
        "estimators/_implicit.py",
        "lax.stop_gradient(ctx.at.params), ctx.keys",
        "ctx.at.params, ctx.keys",
        "test_stages.py -k implicit_response",
        "derivative through the start",
    ),
    Mutant("estimators/_implicit.py", "none or not mark, never", "True, never", FAULTS, "frozen weights solved for"),
    Mutant(
        "estimators/_unrolled.py",
        "slice(length - mode.truncate), slice(length - mode.truncate, None)",
        "slice(mode.truncate), slice(mode.truncate, None)",
        "test_keys.py test_unrolled.py -k truncat or unrolled",
        "wrong part of the window",
    ),
    Mutant(
        "estimators/_unrolled.py",
        "fixed, start = jax.lax.stop_gradient((hyperparams, start))",
        "fixed = hyperparams",
        "test_unrolled.py -k truncat",
        "head differentiated",
    ),
    Mutant(
        "estimators/_direct.py",
        "response.losses_at is not None:",
        "response.losses_at is None:",
        FAULTS,
        "untrained response passes",
    ),
    Mutant(
        "estimators/_paths.py",
        "if jax.tree.leaves(params) and len(_unused_leaves(outer, params)) == len(jax.tree.leaves(params)):",
        "if False:",
        FAULTS,
        "blind outer loss passes",
    ),
    Mutant(
        "estimators/_modes.py",
        "length < _TWO_LEVELS_FROM",
        "length <= _TWO_LEVELS_FROM",
        "test_unrolled.py -k interval",
        "off by one",
    ),
    Mutant(
        "estimators/_protocol.py",
        "at=train(ctx, start=start, hyperparams=hyperparams)",
        "at=train(ctx, start=ctx.start, hyperparams=ctx.hyperparams)",
        "test_stages.py -k trained_first",
        "differentiated training",
    ),
    # solvers, responses, the probe
    Mutant(
        "solvers/_base.py",
        "residual <= (rtol if limit",
        "residual >= (rtol if limit",
        "test_solvers.py -k residual",
        "wrong status",
    ),
    Mutant(
        "solvers/_base.py",
        "optax.tree.where(tree.all_finite(state), state, init(b))",
        "state",
        "test_solvers.py -k fresh",
        "state that is not finite",
    ),
    Mutant(
        "solvers/_base.py",
        "tree.add_scaled(remainder, total_damping, x)",
        "tree.add_scaled(remainder, -total_damping, x)",
        "test_solvers.py -k damping",
        "wrong sign",
    ),
    Mutant(
        "solvers/_base.py",
        "x / power.astype(x.dtype), 0.0)",
        "x, 0.0)",
        "test_solvers.py -k scal or overflow",
        "unscaled right-hand side",
    ),
    Mutant(
        "solvers/_krylov.py",
        "10 * epsilon(c.x) * largest)",
        "-1.0 * largest)",
        "test_solvers.py -k cg",
        "negative curvature accepted",
    ),
    Mutant(
        "solvers/_krylov.py",
        "~nearer & ~(jnp.sqrt(square) <",
        "~nearer & (jnp.sqrt(square) < 0 *",
        "test_solvers.py -k warm or random",
        "bad warm start kept",
    ),
    Mutant(
        "solvers/_krylov.py",
        "count, residual = c.num_products + 1,",
        "count, residual = c.num_products + ~c.trial,",
        "test_solvers.py -k counted or warm",
        "product not counted",
    ),
    Mutant(
        "solvers/_krylov.py",
        "square + share * share * c.direction_sq",
        "square",
        "test_solvers.py -k cg",
        "wrong recurrence",
    ),
    Mutant(
        "solvers/_neumann.py",
        "tree.add_scaled(c.term, -alpha,",
        "tree.add_scaled(c.term, alpha,",
        "test_solvers.py -k neumann",
        "wrong sign",
    ),
    Mutant(
        "solvers/_power.py",
        "cold = tree.norm(direction) == 0",
        "cold = jnp.array(True)",
        "test_solvers.py -k neumann",
        "warm start ignored",
    ),
    Mutant(
        "solvers/_neumann.py",
        "spent += power.num_products",
        "pass",
        "test_solvers.py -k counted or counts",
        "products not counted",
    ),
    Mutant(
        "responses/_perturbed.py",
        "jax.random.split(key, len(found))",
        "[key] * len(found)",
        "test_keys.py test_responses.py",
        "shared key",
    ),
    Mutant(
        "responses/_perturbed.py",
        "draw_key, loss_key = jax.random.split(key)",
        "draw_key, loss_key = key, key",
        "test_keys.py test_responses.py",
        "shared key",
    ),
    Mutant(
        "responses/_perturbed.py",
        "center = lax.stop_gradient(drop_scale(hyperparams, learned))",
        "center = drop_scale(hyperparams, learned)",
        "test_keys.py test_responses.py",
        "centre differentiated",
    ),
    Mutant(
        "dataflow.py",
        "return [zero or not mark for",
        "return [zero or mark for",
        "test_faults.py",
        "swapped mark",
    ),
    Mutant(
        "dataflow.py",
        'name == "select_n" and all(zeros[1:])',
        'name == "select_n" and zeros[1]',
        "test_probe.py",
        "one case of two",
    ),
    Mutant(
        "dataflow.py",
        "_loop(_follow_zeros, all, body, constants, carry",
        "_loop(_follow_zeros, any, body, constants, carry",
        "test_probe.py",
        "carry of a loop kept",
    ),
    Mutant(
        "drivers/_phases.py",
        "filled.insert(place, leaf)",
        "filled.append(leaf)",
        "test_faults.py",
        "constant in a wrong place",
    ),
    Mutant(
        "drivers/_bilevel.py",
        "return grads, state.model_state if model_state is None else",
        "return grads, state.model_state if True else",
        "test_bilevel.py",
        "given model state dropped",
    ),
    Mutant("drivers/_phases.py", "else id(leaf))", "else hash(leaf))", FAULTS, "object by equality"),
    Mutant(
        "dataflow.py",
        "zero and not same for",
        "zero for",
        "test_probe.py -k untrained",
        "zero that may be set",
    ),
    Mutant(
        "dataflow.py",
        "return joined + outputs[len(carry) :]",
        "return outputs[: len(carry)] + outputs[len(carry) :]",
        "test_probe.py -k untrained",
        "no round",
    ),
    Mutant(
        "solvers/_base.py",
        "optax.tree.where(is_valid, state, given)",
        "state",
        FAULTS,
        "cold after a bad batch",
    ),
    Mutant("solvers/_base.py", "is_valid |= is_zero", "pass", FAULTS, "zero of a singular system"),
    Mutant(
        "training.py",
        "**accepted_keywords(optimizer, merged(others))",
        "**merged(others)",
        FAULTS,
        "foreign keyword",
    ),
    Mutant("tree.py", "int(limits.maxexp) // 2", "64", FAULTS + " -k norms", "range of float32"),
    # damped, warm, preconditioned solvers
    Mutant("solvers/_krylov.py", "floor = jnp.maximum(0.1 *", "floor = jnp.maximum(0.0 *", CG, "floor of curvature"),
    Mutant("solvers/_base.py", "WORST_START = 3.0", "WORST_START = 1.0", CG, "good warm start dropped"),
    Mutant("solvers/_krylov.py", "(2.0 * c.energy >= curvature)", "False", CG, "near warm start dropped"),
    Mutant("solvers/_krylov.py", "FADE = 0.9", "FADE = 1.0", CG, "scale that never fades"),
    Mutant(
        "solvers/_krylov.py", "jnp.where(unknown & ~(rayleigh > constant), stretch, seen)", "seen", CG, "negative scale"
    ),
    Mutant(
        "solvers/_krylov.py",
        "share = jnp.where(c.trial, 0.0, ",
        "share = jnp.where(c.trial, 1.0, ",
        CG,
        "stale direction",
    ),
    Mutant("solvers/_block.py", "_REST = 0.3", "_REST = 300.0", CG, "wrong rest of the spectrum"),
    Mutant("solvers/_recycled_cg.py", "a - d.astype(p.dtype) * p", "a + d.astype(p.dtype) * p", CG, "wrong sign"),
    Mutant(
        "solvers/_richardson.py",
        "momentum, velocity) if momentum",
        "0.0, velocity) if momentum",
        CG,
        "momentum dropped",
    ),
    Mutant(
        "solvers/_richardson.py",
        "alpha, stop = divide(1.0, power.top + damping)",
        "alpha, stop = divide(3.0, power.top + damping)",
        CG,
        "step too long",
    ),
    Mutant("solvers/_gmres.py", "for _ in range(2):", "for _ in range(0):", CG, "basis not orthogonal"),
    Mutant("solvers/_gmres.py", "-sin * c.target[c.place]", "sin * c.target[c.place]", CG, "wrong rotation"),
    Mutant("solvers/preconditioners.py", "state.age % every == 0", "state.age == 0", CG, "never made anew"),
    Mutant(
        "estimators/_implicit.py",
        "diagonal(params, ctx.problem.constrain(ctx.hyperparams))",
        "diagonal(params, ctx.hyperparams)",
        CG,
        "unconstrained diagonal",
    ),
    Mutant("curvature.py", "lambda q: of_params(q)[0]", "lambda q: q", "test_residuals.py", "identity for a Jacobian"),
    Mutant(
        "problem.py",
        "residual=None if problem.residual is None else over_unconstrained(problem.residual)",
        "residual=problem.residual",
        "test_residuals.py",
        "residual not wrapped",
    ),
    Mutant(
        "residuals.py",
        "optax.tree.add_scale(params, -step_size,",
        "optax.tree.add_scale(params, step_size,",
        "test_residuals.py",
        "wrong sign",
    ),
    Mutant(
        "data.py",
        "place % length",
        "0 * place",
        "test_solve_batches.py",
        "one batch for all products",
    ),
    Mutant(
        "problem.py",
        "value.astype(total.dtype) / count",
        "value.astype(total.dtype)",
        "test_solve_batches.py",
        "sum for a mean",
    ),
    Mutant(
        "diagnostics/_check.py",
        "return status == Status.TRUNCATED or",
        "return True or",
        "test_check_hypergrad.py",
        "own estimate never judged",
    ),
    # priors, and the warning without one
    Mutant(
        "problem.py",
        '"Return one number, −log p(λ).") / count',
        '"Return one number, −log p(λ).")',
        "test_priors.py",
        "not divided by N",
    ),
    Mutant(
        "problem.py",
        "problem.response.base_hyperparams(variables.hyperparams)",
        "variables.hyperparams",
        "test_priors.py",
        "learned scales reach the prior",
    ),
    Mutant(
        "problem.py",
        "if problem.prior is not None or problem.response",
        "if problem.response",
        "test_priors.py",
        "unknown prior",
    ),
    Mutant(
        "problem.py",
        "count <= found * (1 if known else 10)",
        "count <= found * 10",
        "test_priors.py",
        "size of the data set ignored",
    ),
    Mutant("data.py", "axes = 2 if is_indexed", "axes = 1 if is_indexed", "test_priors.py", "batches counted"),
    Mutant(
        "data.py",
        "known, found = (is_indexed, size) if",
        "known, found = (known or is_indexed, size) if",
        "test_priors.py",
        "any index tells the size",
    ),
    Mutant(
        "solvers/_richardson.py",
        "start, velocity = optax.tree.where(trial,",
        "start, velocity = optax.tree.where(True,",
        CG,
        "remainder of another x",
    ),
    Mutant(
        "diagnostics/_check.py",
        "reference = _differences.resolved(ctx, unknowns(case.estimator, ctx), case.budget)",
        "reference = _differences.resolved(ctx, budget=case.budget)",
        "test_check_hypergrad.py -k frozen",
        "frozen weights are solved for",
    ),
    Mutant("priors.py", "(leaf - jnp.mean(leaf)) / scale", "leaf / scale", "test_priors.py", "mean not free"),
    Mutant("priors.py", "center, value.dtype)) / scale", "center, value.dtype))", "test_priors.py", "scale left out"),
    # kinks, residuals in the check
    Mutant(
        "diagnostics/_kinks.py",
        "& rises & jump & steep",
        "& rises & steep",
        "test_linearized.py -k bend",
        "smooth losses have kinks",
    ),
    Mutant(
        "diagnostics/_kinks.py",
        "held &= _along(",
        "held |= _along(",
        "test_check_hypergrad.py -k kink",
        "one direction is enough",
    ),
    Mutant(
        "diagnostics/_kinks.py",
        "found &= held[-1]",
        "pass",
        "test_linearized.py -k bend",
        "narrow bends are kinks",
    ),
    # minimize, its methods and inner solvers
    Mutant("methods/_hoag.py", "state.step_size * factor)", "state.step_size)", MINIMIZE, "step size that stays"),
    Mutant("methods/_hoag.py", "(rise(trial) <= 0)", "(rise(trial) <= 1e9)", MINIMIZE, "every step accepted"),
    Mutant(
        "methods/_base.py",
        "tried & (first | tree.all_finite(new.hypergrad))",
        "tried",
        MINIMIZE,
        "hypergradient of NaN accepted",
    ),
    Mutant("methods/_lbfgs.py", "0.5 * size).astype", "size).astype", MINIMIZE, "no backtracking"),
    Mutant("drivers/_minimize.py", "~(point.value >= run.best.value)", "True", MINIMIZE, "last, not best"),
    Mutant("drivers/_minimize.py", "linear_state=found.state,", "", MINIMIZE, "cold linear solves"),
    Mutant(
        "drivers/_minimize.py",
        "point.num_gradients + found.num_gradients",
        "found.num_gradients",
        MINIMIZE,
        "gradients not summed",
    ),
    Mutant("estimators/_implicit.py", "tolerance=ctx.tolerance", "tolerance=None", MINIMIZE, "tolerance ignored"),
    Mutant("inner_solvers/_lbfgs.py", "jnp.where(kept, 0, 1)", "1", INNER, "a gradient counted twice"),
    Mutant("inner_solvers/_proximal.py", "params), change) > 0", "params), change) > 1e9", INNER, "no restart"),
    Mutant("inner_solvers/_newton_cg.py", "done | reached", "done", INNER, "no end at the tolerance"),
    # the check with many weights, and in float64
    Mutant(
        "diagnostics/_linearized.py",
        "solution = jax.tree.map(jnp.negative, of_shift)",
        "solution = of_shift",
        "test_linearized.py",
        "sign of q",
    ),
    Mutant(
        "diagnostics/_linearized.py",
        "b - p - damping * q",
        "b - p",
        "test_linearized.py",
        "residual without the damping",
    ),
    Mutant(
        "diagnostics/_linearized.py",
        "of.outer(of.weights, hyperparams) - tree.vdot(",
        "-tree.vdot(",
        "test_linearized.py",
        "no direct part",
    ),
    Mutant(
        "diagnostics/_check.py",
        "abs(residual - claimed) > rtol * max(1.0, claimed)",
        "False",
        "test_linearized.py",
        "what the solve claims is believed",
    ),
    Mutant(
        "diagnostics/_check.py",
        "unreported and not differs and not residual <= rtol",
        "False",
        "test_linearized.py",
        "any solve will do",
    ),
    Mutant(
        "diagnostics/_check.py",
        "wrong = row is not None and row.uncertainty <= rtol < row.error",
        "wrong = False",
        "test_linearized.py",
        "derivative rules are believed",
    ),
    Mutant(
        "diagnostics/_float64.py",
        "with jax.enable_x64(self._x64):",
        "with jax.enable_x64(True):",
        "test_float64.py",
        "other random numbers",
    ),
    Mutant(
        "diagnostics/_float64.py",
        "return _wide(jnp.dtype(value)) if is_dtype else value",
        "return value",
        "test_float64.py",
        "casts down stay",
    ),
    Mutant(
        "diagnostics/_float64.py",
        'if "custom_vjp" in name:',
        "if False:",
        "test_float64.py",
        "rules of custom_vjp are lost",
    ),
    # explicit meshes
    Mutant(
        "drivers/_bilevel.py",
        "return tree.placed_like(state, like)._replace(inner=state.inner)",
        "return state",
        "test_sharding.py",
        "restored state stays where it is",
    ),
    Mutant("solvers/_block.py", ", out_sharding=sharding)", ")", "test_sharding.py", "contraction of sharded axes"),
    # first-order estimators, certificates, sparse batches
    Mutant("estimators/_first_order.py", "factor.astype(p.dtype) * p", "p", "test_first_order.py", "penalty left out"),
    Mutant("estimators/_first_order.py", "(outer / sigma)", "outer", "test_first_order.py", "copy of another penalty"),
    Mutant("estimators/_first_order.py", "finite, copy, tree", "True, copy, tree", "test_first_order.py", "no restart"),
    Mutant(
        "estimators/_first_order.py",
        "for _ in range(num_steps)",
        "for _ in range(1)",
        "test_first_order.py",
        "one step",
    ),
    Mutant("estimators/_sama.py", "1.0, jnp.nan)", "1.0, 1.0)", "test_first_order.py", "silent zero"),
    Mutant(
        "estimators/_sama.py",
        "pull_back(tree.match_dtypes(s, updates))[0]",
        "tree.scale(s, -1.0)",
        "test_first_order.py",
        "optimizer ignored",
    ),
    Mutant(
        "methods/_maid.py",
        "trial.value - point.value + blurred",
        "trial.value - point.value",
        "test_maid.py",
        "decrease not certified",
    ),
    Mutant(
        "methods/_maid.py",
        "at.inner_residual / here.strong_convexity",
        "0.01 * at.inner_residual",
        "test_maid.py",
        "another distance",
    ),
    Mutant(
        "methods/_maid.py",
        "new.linear_residual * slope",
        "0.0 * slope",
        "test_maid.py -k unsolved",
        "linear residual ignored",
    ),
    Mutant("drivers/_minimize.py", " & ~(row.error_bound > tol)", "", "test_maid.py", "bound ignored at the end"),
    Mutant("methods/_bounds.py", "2 * mixed_steps + 2", "0", "test_maid.py -k dense", "products not counted"),
    Mutant(
        "inner_solvers/_lbfgs.py",
        "searching=searching & better",
        "searching=searching",
        INNER,
        "no steps below rounding",
    ),
    Mutant(
        "inner_solvers/_lbfgs.py",
        "solved, norm = end.best",
        "solved, norm = end.params, end.norm",
        "test_inner_solvers.py -k best_weights",
        "last, not best",
    ),
    Mutant("data.py", "return x[indices]", "return x", "test_sparse.py", "sparse rows not taken"),
    Mutant(
        "folds.py",
        "places = [k for k, other in enumerate(sizes) if other == size]",
        "places = sorted(range(len(sizes)), key=sizes.__getitem__)[: sizes.count(size)]",
        "test_cross_validation.py -k folds",
        "folds of one size mixed",
    ),
    Mutant(
        "estimators/_implicit.py",
        "flat, parts = ravel_pytree(b)",
        "flat, parts = b, lambda v: v",
        "test_stages.py -k reverse_mode",
        "a tree for the transpose",
    ),
    Mutant(
        "estimators/_evolution.py",
        "sums = jax.tree.map(jnp.add, begun, added)",
        "sums = added",
        EVOLUTION,
        "ES in place of PES",
    ),
    Mutant(
        "estimators/_evolution.py",
        "ages = jnp.where(alive, jnp.where(again, 0, state.ages) + steps, _NEVER)",
        "ages = jnp.where(alive, state.ages + steps, _NEVER)",
        EVOLUTION,
        "ages go on after a new start",
    ),
    Mutant(
        "estimators/_evolution.py",
        "np.arange(num_pairs) * (horizon or 0) // num_pairs",
        "np.zeros(num_pairs)",
        EVOLUTION,
        "all start again at once",
    ),
    Mutant(
        "estimators/_evolution.py",
        "(fits[:, 0] - fits[:, 1]) / 2, 0.0)",
        "(fits[:, 0] - fits[:, 1]), 0.0)",
        EVOLUTION,
        "twice the estimate",
    ),
    Mutant(
        "estimators/_evolution.py",
        "(n * (n - 1))",
        "(n * n)",
        EVOLUTION,
        "biased standard error",
    ),
    Mutant(
        "estimators/_evolution.py",
        "/ jnp.maximum(n - 1, 1)",
        "/ n",
        EVOLUTION,
        "baseline with the pair itself",
    ),
    Mutant(
        "estimators/_evolution.py",
        "validate.required_key(ctx.keys.advance)",
        "validate.required_key(ctx.keys.estimate)",
        EVOLUTION,
        "wrong key",
    ),
    Mutant(
        "estimators/_evolution.py",
        "alive = alive & jnp.isfinite(losses).all(axis=1)",
        "alive = alive & jnp.isfinite(losses).any(axis=1)",
        EVOLUTION,
        "half a pair lives on",
    ),
    Mutant(
        "estimators/_unrolled.py",
        "rows = [jnp.where(finite, x, jnp.zeros_like(x)) for x in rows]",
        "rows = list(rows)",
        "test_forward.py -k overflow",
        "tangents of NaN stay",
    ),
    Mutant(
        "estimators/_unrolled.py",
        "jnp.array(False) if mode.horizon is None else state.age >= mode.horizon",
        "jnp.array(False)",
        "test_forward.py -k horizon",
        "no horizon",
    ),
    Mutant(
        "estimators/_unrolled.py",
        "age = jnp.where(again, 0, state.age)",
        "age = state.age",
        "test_forward.py -k horizon",
        "age goes on after a new start",
    ),
    Mutant(
        "optimizers/_hypergradient_descent.py",
        "direction = jax.tree.map(jnp.negative, updates)",
        "direction = updates",
        DESCENT,
        "wrong sign",
    ),
    Mutant(
        "optimizers/_hypergradient_descent.py",
        "usable = (size > 0) & jnp.isfinite(size) & jnp.isfinite(inner)",
        "usable = size > 0",
        DESCENT,
        "infinite products count",
    ),
    Mutant(
        "optimizers/_hypergradient_descent.py",
        "jnp.where(jnp.isfinite(new), new, rates[place])",
        "new",
        DESCENT,
        "a rate of NaN",
    ),
    Mutant(
        "optimizers/_learned.py",
        "averaged, square, count))\n",
        "averaged, square, state.num_steps))\n",
        LEARNED,
        "count from 0",
    ),
    Mutant(
        "optimizers/_learned.py",
        "(u / jnp.broadcast_to(jnp.asarray(width, u.dtype), u.shape))",
        "u",
        "test_learned_optimizers.py -k widths",
        "widths without effect",
    ),
    Mutant(
        "estimators/_partition.py",
        "ctx = ctx._replace(solve_batch=None)  # it is for those that solve a linear system",
        "pass",
        "test_partition.py -k solve_batch",
        "a batch of the solve for all",
    ),
    # whole runs
    Mutant(
        "drivers/_metagradient.py",
        "jax.random.fold_in(keys.outer, evaluation)",
        "jax.random.fold_in(keys.outer, 0)",
        META,
        "one key for all evaluations",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "evaluation == count - 1, reached.params",
        "evaluation == 0, reached.params",
        META,
        "weights of the first evaluation",
    ),
    Mutant("drivers/_metagradient.py", "(g / count)", "g", META, "sum of the evaluations, not mean"),
    Mutant(
        "drivers/_metagradient.py",
        "first = jnp.asarray(self.run.boundaries[number], jnp.int32)",
        "first = jnp.asarray(self.run.boundaries[0], jnp.int32)",
        META,
        "each segment begins at step 0",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "self.kept.record(index + 1, progress)",
        "self.kept.record(index, progress)",
        META,
        "a segment counts twice after a kill",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "at if status == MetagradientStatus.COTANGENT else at + 1",
        "at + 1",
        META,
        "off by one in at_step",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "(min(self.store.slots, self.run.num_segments) - 1) *",
        "min(self.store.slots, self.run.num_segments) *",
        "test_metagradient.py -k plan",
        "the first state counts as kept",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "(a + g).astype(h.dtype), progress.hypergrad",
        "a.astype(h.dtype), progress.hypergrad",
        "test_metagradient.py -k copy",
        "no derivative through the first state",
    ),
    Mutant(
        "drivers/_metagradient.py",
        'if self.store.where != "device" and not all(',
        "if False and not all(",
        "test_sharding.py -k other_drivers",
        "a store of one process for several",
    ),
    Mutant(
        "drivers/_revolve.py",
        "length - math.comb(slots + repeats - 2, slots - 1)",
        "length - math.comb(slots + repeats - 1, slots - 1)",
        META,
        "wrong binomial",
    ),
    Mutant("drivers/_revolve.py", "slots - len(parts)  #", "slots + 1 - len(parts)  #", META, "one slot too many"),
    Mutant(
        "drivers/_revolve.py",
        "math.comb(slots + repeats, repeats - 1)",
        "math.comb(slots + repeats, repeats)",
        META,
        "wrong count of segments",
    ),
    Mutant("stores.py", "stream.read() != digest.digest()", "stream.read() == b''", META, "checksum not compared"),
    Mutant(
        "stores.py",
        '            (self._folder / "position.json").unlink()\n',
        "",
        META,
        "the position outlives what was damaged",
    ),
    Mutant(
        "tree.py",
        "return x if x.committed else jax.device_put(x, *shardings)",
        "return x",
        "test_sharding.py -k on_one_device",
        "a state that lies nowhere beside variables on a device",
    ),
    Mutant("stores.py", "signed != self._signed(position, name)", "False", META, "a position of another run counts"),
    Mutant(
        "stores.py",
        "if like.committed else jnp.array(leaf)",
        "",
        META_COMPILE,
        "restored states compile segments again",
    ),
    Mutant(
        "drivers/_plan.py",
        "max(range(call.run.num_segments), key=call.run.length)",
        "call.run.num_segments - 1",
        "test_metagradient.py -k short_last",
        "a short last segment stands for all",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "least_memory(length)}",
        "1 if length < 50 else least_memory(length)}",
        META_MEMORY,
        "one level of checkpoints",
    ),
    Mutant(
        "stores.py",
        'file.with_name(file.name + ".part")',
        "file",
        META,
        "a file is written in its place",
    ),
    Mutant("stores.py", "if before and before != name:", "if before:", META, "what was gathered is removed"),
    Mutant(
        "stores.py",
        "                file.unlink()\n",
        "                pass\n",
        META,
        "files of a kill stay",
    ),
    Mutant(
        "stores.py",
        "self.bytes_moved += tree.num_bytes(self._states[number])\n        return",
        "return",
        META,
        "reads are not counted",
    ),
    # plans, and the outer step that is looked at first
    Mutant(
        "drivers/_plan.py",
        "memory.output_size_in_bytes - memory.alias_size_in_bytes",
        "memory.output_size_in_bytes",
        "test_plan.py -k peak",
        "donated results count twice",
    ),
    Mutant(
        "drivers/_plan.py",
        "leaf.sharding.shard_shape(leaf.shape)",
        "leaf.shape",
        "test_plan.py -k shards",
        "the bytes of all devices",
    ),
    Mutant(
        "drivers/_plan.py",
        "_bytes_on_a_device(wide) // 2)",
        "_bytes_on_a_device(wide))",
        "test_plan.py -k bfloat16",
        "a moment in no bytes at all",
    ),
    Mutant(
        "drivers/_plan.py",
        "key=lambda advice: -advice.saves",
        "key=lambda advice: advice.saves",
        "test_plan.py -k advice",
        "the smallest saving first",
    ),
    Mutant("drivers/_plan.py", "total > device_bytes", "total >= device_bytes", "test_plan.py -k advice", "off by one"),
    Mutant("drivers/_plan.py", "_half(outer, 0)", "outer", "test_plan.py -k memory", "one batch stays whole"),
    Mutant(
        "drivers/_plan.py", "Advice(change, state + more)", "Advice(change, state)", "test_plan.py -k advised", "a part"
    ),
    Mutant("drivers/_plan.py", "0 if run.num_segments == 1 else ", "", "test_metagradient.py -k short_last", "twice"),
    Mutant(
        "drivers/_metagradient.py",
        '            "values of the optimizer state": _digest(self.start.inner_state),\n',
        "",
        META,
        "another first state of the optimizer counts as this run",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "run.num_segments - 1, self.blank)",
        "0, self.blank)",
        META,
        "another outer loss counts as this run",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "(self.start, self.variables, self.outer_batch))",
        "(self.start, self.variables))",
        META_COMPILE,
        "an outer batch on a device compiles segments again",
    ),
    Mutant(
        "drivers/_metagradient.py",
        "check_variables(tree.strip_weak_types(arrays))",
        "check_variables(arrays)",
        META_COMPILE,
        "weakly typed hyperparameters compile segments again",
    ),
    Mutant("stores.py", "                self._refuse_others()\n", "", META, "files of another program are removed"),
]


def run(mutant: Mutant) -> tuple[str, float]:
    """Return what became of a mutant, and the seconds that it took."""
    source = (ROOT / "hypergrad" / mutant.file).read_text()
    if source.count(mutant.old) != 1:
        return f"no such place ({source.count(mutant.old)})", 0.0
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("hypergrad", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, copy / name)
        (copy / "hypergrad" / mutant.file).write_text(source.replace(mutant.old, mutant.new))
        files, _, expression = mutant.tests.partition(" -k ")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            *(f"tests/{f}" for f in files.split()),
        ]
        begin = time.monotonic()
        done = subprocess.run(
            command + (["-k", expression, "-m", "slow or not slow"] if expression else []),
            cwd=copy,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")},
            capture_output=True,
            check=False,
        )
    verdict = {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"pytest exit {done.returncode}")
    return verdict, time.monotonic() - begin


def main(chosen: list[str]) -> int:
    """Run the mutants chosen and print a table; return the number that survived."""
    survived = 0
    print("| # | file | change | tests | result | s |\n|---|---|---|---|---|---|")
    for number, mutant in enumerate(MUTANTS):
        if chosen and not any(c == str(number) or c in mutant.file for c in chosen):
            continue
        verdict, seconds = run(mutant)
        survived += verdict != "killed"
        print(f"| {number} | {mutant.file} | {mutant.kind} | {mutant.tests} | {verdict} | {seconds:.0f} |", flush=True)
    return survived


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
