"""What is found out about an optimizer: once per optimizer, in seconds, whatever the user has set."""

import contextlib
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import hypergrad as hg
from hypergrad import validate
from hypergrad.estimators import _probe
from tests.optimizers import REFUSED, ROWS
from tests.test_optimizers import at, by_row

WEIGHTS = {"a": jnp.ones((3, 2)), "b": {"c": jnp.ones(3), "d": jnp.ones(())}}
ONE = {"a": jnp.ones(2)}
RATE = {"rate": jnp.array(0.1)}
GOOD = lambda h: optax.adam(h["rate"], eps_root=1e-8)  # noqa: E731
BAD = lambda h: optax.adam(h["rate"])  # noqa: E731
SGD = lambda h: optax.sgd(h["rate"])  # noqa: E731
ADAMW, NOISE_KEY = optax.adamw(0.1), jax.random.key(0)
FAR = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u + INFINITY, updates))
INFINITY = jnp.array(jnp.inf)
NOISY = lambda h: optax.chain(optax.add_noise(0.01, 0.5, NOISE_KEY), GOOD(h))  # noqa: E731
LABELS = {"a": "keep", "b": {"c": "train", "d": "train"}}
ONLY_A = {"a": True, "b": {"c": False, "d": False}}
NONE = {"a": False, "b": {"c": False, "d": False}}
HALF = optax.partition({"keep": optax.set_to_zero(), "train": optax.adam(0.1)}, LABELS)


def check(make, params=WEIGHTS, hyperparams=RATE, *, steps=3, reverse=True, cache_key=None):
    _probe.check_differentiable(make, params, hyperparams, steps=steps, reverse=reverse, cache_key=cache_key)


def transformer(layers=6):
    """Return the weights of a language model: 93 leaves."""
    norm = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    heads = {name: {"kernel": jnp.ones((8, 4, 2)), "bias": jnp.zeros((4, 2))} for name in "qkv"}
    block = {
        "attention": {**heads, "out": {"kernel": jnp.ones((4, 2, 8)), "bias": jnp.zeros(8)}},
        "mlp": {"up": {"kernel": jnp.ones((8, 32))}, "down": {"kernel": jnp.ones((32, 8)), "bias": jnp.zeros(8)}},
        "norms": [norm, norm],
    }
    return {"embed": jnp.ones((20, 8)), "blocks": [block] * layers, "norm": norm}


def by_path(part, inside, outside):
    """Return the optimizer that treats weights whose path contains ``part`` in one way and the others in another."""
    label = lambda path, _: "inside" if part in jax.tree_util.keystr(path) else "outside"  # noqa: E731
    return optax.partition({"inside": inside, "outside": outside}, lambda params: jax.tree.map_with_path(label, params))


class TestSettings:
    """Verdicts under all of the user's settings at once: each alone makes a trial fail that does not override it."""

    @pytest.fixture(autouse=True)
    def settings(self):
        with contextlib.ExitStack() as stack:
            for setting in (
                *(jax.debug_nans(True), jax.debug_infs(True), jax.debug_key_reuse(True), jax.disable_jit(True)),
                *(jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")),
                jax.transfer_guard("disallow"),
            ):
                stack.enter_context(setting)
            yield

    def test_eager(self):
        check(NOISY, ONE)
        with pytest.raises(ValueError, match="exactly zero"):
            check(BAD, ONE)
        assert _probe.decays_weights(ADAMW, ONE)
        assert not _probe.decays_weights(optax.contrib.dadapt_adamw(), ONE)  # NaN at a zero gradient
        assert _probe.decays_weights(FAR, ONE)
        assert _probe.untrained_leaves(HALF, WEIGHTS) == ONLY_A

    def test_inside_jit(self):
        def traced(rate, make):
            check(make, {"a": rate * ONE["a"]}, {"rate": rate})
            assert _probe.decays_weights(ADAMW, ONE)
            assert _probe.untrained_leaves(HALF, WEIGHTS) == ONLY_A
            return rate

        with jax.disable_jit(False):
            jax.jit(lambda rate: traced(rate, NOISY)).lower(RATE["rate"])
            with pytest.raises(ValueError, match="exactly zero"):
                jax.jit(lambda rate: traced(rate, BAD)).lower(RATE["rate"])


class TestUnrolled:
    def test_debug_nans(self):
        problem = hg.BilevelProblem(lambda w, h, b, k: jnp.sum(h["rate"] * w**2), lambda w, h, b, k: jnp.sum(w**2))
        fn = hg.hypergrad(hg.unrolled(problem), GOOD)
        with jax.debug_nans(True):
            assert float(fn(jnp.ones(2), RATE, jnp.arange(2), (), key=None)["rate"]) != 0.0
            with pytest.raises(ValueError, match="exactly zero"):
                hg.hypergrad(hg.unrolled(problem), BAD)(jnp.ones(2), RATE, jnp.arange(2), (), key=None)


class TestCost:
    @pytest.mark.parametrize(
        ("make", "kinds"),
        [
            (BAD, 3),
            (lambda h: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(h["rate"])), 3),
            (lambda h: optax.adamw(h["rate"], mask=jax.tree.map(lambda w: w.ndim > 1, transformer())), 3),
            (lambda h: optax.MultiSteps(optax.adam(h["rate"]), 2).gradient_transformation(), 3),
            (lambda h: optax.apply_if_finite(optax.adam(h["rate"]), 2), 3),
            (lambda h: by_path("mlp", optax.adam(h["rate"]), optax.sgd(h["rate"])), 5),
            (lambda h: by_path("[3]", optax.set_to_zero(), optax.sgd(h["rate"])), 6),
        ],
        ids=["adam", "clipped adamw", "mask", "MultiSteps", "apply_if_finite", "partition by name", "frozen block"],
    )
    def test_a_language_model_has_few_kinds_of_weights(self, make, kinds):
        """Matrices, vectors, and tensors of heads; each once more where its path makes a difference."""
        params = transformer()
        assert len(jax.tree.leaves(params)) == 93
        trial = _probe._trial(make, RATE, _probe._small(params, 2))
        assert len(trial.weights) == kinds
        assert len(trial.kinds) == 93

    @pytest.mark.parametrize("part", ["'a'", "'c'"])
    def test_each_kind_is_tried_with_weights_of_zero(self, part):
        """A rate per weight of |w|, which has no derivative at zero by this formula."""
        rooted = optax.stateless(lambda grads, params: jax.tree.map(lambda g, w: g * jnp.sqrt(w * w), grads, params))
        with pytest.raises(ValueError, match="expected an inner optimizer whose update has a finite derivative"):
            check(lambda h: by_path(part, rooted, optax.sgd(h["rate"])))

    def test_one_leaf_of_many_is_enough_for_a_refusal(self):
        one = lambda h: by_path("[4]['mlp']['up']", optax.adam(h["rate"]), optax.sgd(h["rate"]))  # noqa: E731
        for reverse in (True, False):
            with pytest.raises(ValueError, match=r"exactly zero; got NaN.*eps_root"):
                check(one, transformer(), reverse=reverse)
        check(lambda h: by_path("[4]['mlp']['up']", GOOD(h), optax.sgd(h["rate"])), transformer())

    @pytest.mark.parametrize("row", by_row(row for row in ROWS if row.verdict != REFUSED))
    def test_a_kind_stands_for_its_weights(self, row):
        """Steps with the kinds alone reach what steps with all weights reach."""
        rng, h = np.random.default_rng(0), {name: jnp.array(0.37) for name in row.at}
        names = ["in", "mid", "bias", "out", "last"]
        shapes = [(2, 2), (2, 2), (2,), (2, 2), (2,)]
        params = {name: jnp.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
        make = lambda h: validate.transformation("optimizer", row.make(h))  # noqa: E731
        trial = _probe._trial(make, h, params)
        assert len(trial.weights) < 5 or row.name in {"noisy_sgd", "lbfgs without line search"}
        values = [jnp.asarray(rng.uniform(0.1, 1.0, w.shape), jnp.float32) for w in trial.weights]
        grads = [jnp.asarray(rng.normal(size=(4, *w.shape)), jnp.float32) for w in trial.weights]
        reached, _ = trial.steps([jnp.array(0.37)], values, grads)
        structure = jax.tree.structure(params)
        all_of = lambda part: jax.tree.unflatten(structure, [part[k] for k in trial.kinds])  # noqa: E731
        optimizer = make(h)
        step = lambda now, grads: _probe._step(optimizer, now, grads)  # noqa: E731
        (want, _), _ = jax.lax.scan(step, _probe._begin(optimizer, all_of(values)), all_of(grads))
        for k, leaf in zip(trial.kinds, jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(reached[k], leaf, rtol=2e-5, atol=1e-6)


class TestCache:
    def counted(self, make):
        calls = []
        return calls, lambda h: calls.append(None) or make(h)

    def test_an_optimizer_is_tried_once(self):
        calls, make = self.counted(SGD)
        check(make, cache_key=(make, None))
        first = len(calls)
        assert first > 0
        check(make, cache_key=(make, None))
        jax.jit(lambda rate: check(make, hyperparams={"rate": rate}, cache_key=(make, None)))(0.1)
        check(make, jax.tree.map(lambda w: jnp.ones([5] * w.ndim), WEIGHTS), cache_key=(make, None))
        assert len(calls) == first
        other_weights = {"a": jnp.ones((2, 2))}, jax.tree.map(lambda w: w.astype(jnp.bfloat16), WEIGHTS)
        for change in (
            *({"steps": 2}, {"reverse": False}, {"cache_key": (make, jnp.exp)}, {"cache_key": None}),
            *({"params": params} for params in other_weights),
        ):
            before = len(calls)
            check(make, **{"cache_key": (make, None), **change})
            assert len(calls) > before, change

    def test_a_refusal_is_remembered(self):
        calls, make = self.counted(BAD)
        with pytest.raises(ValueError, match="exactly zero") as first:
            check(make, ONE, cache_key=make)
        before = len(calls)
        with pytest.raises(ValueError, match="exactly zero") as again:
            check(make, ONE, cache_key=make)
        assert len(calls) == before
        assert str(again.value) == str(first.value)

    def test_another_precision_is_another_trial(self):
        calls, make = self.counted(SGD)
        check(make, ONE, cache_key=make)
        first = len(calls)
        with jax.enable_x64(True):
            check(make, ONE, cache_key=make)
        assert len(calls) > first

    def test_traced_values_are_neither_tried_nor_remembered(self):
        momentum = types.SimpleNamespace()
        make = lambda h: optax.adam(h["rate"], b1=momentum.value)  # noqa: E731

        def traced(b1):
            momentum.value = b1
            check(make, ONE, cache_key=make)
            assert not _probe.decays_weights(optax.adamw(0.1, weight_decay=b1), ONE)
            return b1

        jax.jit(traced)(0.9)
        momentum.value = 0.9
        with pytest.raises(ValueError, match="exactly zero"):
            check(make, ONE, cache_key=make)

    def test_nothing_is_kept_alive(self):
        def use():
            big = jnp.ones(3)
            last = optax.scale_by_schedule(lambda count: big[0])
            optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), last)
            assert _probe.decays_weights(optimizer, ONE)
            assert _probe.untrained_leaves(optimizer, ONE) == {"a": False}
            with pytest.raises(ValueError, match="exactly zero"):
                check(lambda h: optimizer, ONE, cache_key=(optimizer, None))
            line_search = optax.chain(optax.identity(), optax.scale_by_polyak())
            with pytest.raises(TypeError, match="no loss value"):
                check(lambda h: line_search, ONE, cache_key=(line_search, None))
            return weakref.ref(big), weakref.ref(optimizer.update), weakref.ref(line_search.update)

        references = use()
        gc.collect()
        assert [reference() for reference in references] == [None, None, None]

    def test_a_new_optimizer_at_an_old_address_is_tried(self):
        """Objects of one size tend to get the address of the last one."""
        verdicts = []
        for i in range(20):
            optimizer = optax.chain(optax.set_to_zero(), optax.identity()) if i % 2 else optax.sgd(0.1)
            verdicts.append(_probe.untrained_leaves(optimizer, ONE)["a"])
            del optimizer
        assert verdicts == [False, True] * 10

    def test_memory_is_bounded(self):
        kept = [optax.sgd(0.1 * i) for i in range(_probe._MOST_RESULTS + 5)]
        for optimizer in kept:
            _probe.untrained_leaves(optimizer, {"a": jnp.ones(1)})
        assert len(_probe._results) <= _probe._MOST_RESULTS

    def test_without_a_key_or_weak_references_it_is_tried_each_time(self):
        class Rule:
            __slots__ = ()

            def __call__(self, h):
                return SGD(h)

        calls, make = self.counted(Rule())
        for key in (Rule(), Rule(), None, None):
            before = len(calls)
            check(make, ONE, cache_key=key)
            assert len(calls) > before


CLIPS = {
    "clip_by_global_norm": lambda where: where.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda where: where.clip_by_block_rms(1.0),
    "normalize_by_update_norm": lambda where: where.normalize_by_update_norm(),
}
WRAPPERS = {
    "chain": lambda clip, h: optax.chain(clip, optax.sgd(h["rate"])),
    "last": lambda clip, h: optax.chain(optax.trace(0.9), clip, optax.scale(-h["rate"])),
    "masked": lambda clip, h: optax.chain(optax.masked(clip, {"a": True}), optax.sgd(h["rate"])),
    "MultiSteps": lambda clip, h: optax.MultiSteps(clip, 1).gradient_transformation(),
    "injected": lambda clip, h: optax.inject_hyperparams(lambda rate: optax.chain(clip, optax.scale(rate)))(h["rate"]),
}


class TestZeroGradients:
    @pytest.mark.parametrize("name", CLIPS)
    def test_a_norm_without_derivative_is_refused_with_its_replacement(self, name):
        fix = rf"whole gradient is zero; got NaN or infinity, with optax\.{name}\. .*Use hg\.optimizers\.{name}: "
        with pytest.raises(ValueError, match=fix):
            check(lambda h: WRAPPERS["chain"](CLIPS[name](optax), h), ONE)
        check(lambda h: WRAPPERS["chain"](CLIPS[name](hg.optimizers), h), ONE)

    def test_clipping_by_unit_is_refused_where_all_weights_are_vectors(self):
        clip = optax.adaptive_grad_clip(0.1)
        with pytest.raises(ValueError, match=r"with optax\.adaptive_grad_clip\. .* Leave it out"):
            check(lambda h: WRAPPERS["chain"](clip, h), ONE)

    @pytest.mark.parametrize("around", WRAPPERS)
    def test_it_is_found_inside_other_transformations(self, around):
        with pytest.raises(ValueError, match=r"Use hg\.optimizers\.clip_by_block_rms"):
            check(lambda h: WRAPPERS[around](CLIPS["clip_by_block_rms"](optax), h), ONE)

    def test_forward_mode_passes_where_it_is_right(self):
        check(lambda h: WRAPPERS["chain"](optax.clip_by_global_norm(1.0), h), reverse=False)

    @pytest.mark.parametrize("name", ["lars", "adafactor"])
    def test_optimizers_without_a_replacement_are_not_refused(self, name):
        """Adafactor clips by the root mean square of a block, too."""
        row = next(row for row in ROWS if row.name == name)
        with jax.enable_x64(True):
            check(row.make, {"a": jnp.ones((2, 2))}, at(row, loss=False))

    @pytest.mark.parametrize("mode", [hg.reverse(), hg.forward()], ids=["reverse", "forward"])
    def test_a_masked_batch_moves_the_hyperparameters(self, mode):
        """The hypergradient of a window whose first batch counts nothing is that of the window without it."""
        inner = lambda w, h, batch, key: 0.5 * batch * jnp.sum((w - h["target"]) ** 2)  # noqa: E731
        problem = hg.BilevelProblem(inner, lambda w, h, b, k: jnp.sum(w**2))
        optimizer = lambda h: optax.chain(hg.optimizers.clip_by_global_norm(0.5), optax.sgd(h["rate"]))  # noqa: E731
        fn = hg.hypergrad(hg.unrolled(problem, mode), optimizer)
        start, h = jnp.ones(2), {"rate": jnp.array(0.1), "target": jnp.array(3.0)}
        masked, plain = (fn(start, h, jnp.array(b), (), key=None) for b in ([0.0, 1.0, 1.0], [1.0, 1.0]))
        for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(plain), strict=True):
            assert float(b) != 0.0
            np.testing.assert_allclose(a, b, rtol=1e-6)


SHIFT = optax.GradientTransformation(  # the gradient of two steps ago
    lambda params: (optax.tree.zeros_like(params),) * 2, lambda grads, state, params=None: (state[1], (grads, state[0]))
)
NO_ROUND = optax.stateless(  # a loop whose body makes zeros, and which never runs
    lambda g, p: jax.tree.map(lambda x: lax.while_loop(lambda c: c.sum() > 1e6, lambda c: 0 * c, x), g)
)
LIFTED = optax.stateless(lambda g, p: jax.tree.map(lambda x: jnp.maximum(x, 0.1), g))
FROZEN = {
    "sgd": (optax.sgd(0.1), NONE),
    "partition": (HALF, ONLY_A),
    "partition by function": (by_path("'a'", optax.set_to_zero(), optax.adam(0.1)), ONLY_A),
    "masked zero": (optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), ONLY_A)), ONLY_A),
    "masked sgd": (optax.masked(optax.sgd(0.1), {"a": False, "b": True}), NONE),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), HALF), ONLY_A),
    "decayed": (optax.chain(HALF, optax.add_decayed_weights(-0.1)), ONLY_A),
    "through the state": (SHIFT, NONE),
    "if finite": (optax.apply_if_finite(HALF, 3), ONLY_A),
    "clipped after": (optax.chain(HALF, optax.clip_by_global_norm(1.0)), ONLY_A),
    "normalized after": (optax.chain(HALF, optax.normalize_by_update_norm()), ONLY_A),
    "several steps": (optax.MultiSteps(HALF, 2, should_skip_update_fn=optax.skip_not_finite), ONLY_A),
    "rate of zero": (by_path("'a'", optax.scale(0.0), optax.adam(0.1)), ONLY_A),
    "rate of zero that may be set": (
        by_path("'a'", optax.inject_hyperparams(optax.sgd)(0.0), optax.adam(0.1)),
        NONE,
    ),
    "clipped, if finite": (optax.apply_if_finite(optax.chain(HALF, optax.clip(1e3)), 3), ONLY_A),
    "lifted, if finite": (optax.apply_if_finite(optax.chain(HALF, LIFTED), 3), NONE),
    "a loop of no round": (NO_ROUND, NONE),
    "rate that starts at zero": (optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000)), NONE),
    "reads the loss": (optax.chain(HALF, optax.contrib.reduce_on_plateau()), ONLY_A),
    "set to zero": (optax.set_to_zero(), {"a": True, "b": {"c": True, "d": True}}),
    "wants a value": (optax.polyak_sgd(), NONE),
    "searches a line": (optax.lbfgs(), NONE),
}


@pytest.mark.parametrize("name", FROZEN)
def test_untrained_leaves(name):
    optimizer, want = FROZEN[name]
    assert _probe.untrained_leaves(optimizer, WEIGHTS) == want
    found = []
    jax.jit(lambda params: found.append(_probe.untrained_leaves(optimizer, params)) or params)(WEIGHTS)
    assert found == [want]


def test_a_weight_moved_through_another_is_trained():
    """A follows the weights of b, which gradients move."""

    def update(grads, state, params):
        return {"a": jnp.ones((3, 2)) * params["b"]["d"], "b": grads["b"]}, state

    follow = optax.GradientTransformation(lambda params: (), update)
    assert _probe.untrained_leaves(follow, WEIGHTS) == NONE
    both = optax.chain(follow, optax.masked(optax.set_to_zero(), {"a": False, "b": True}))
    assert _probe.untrained_leaves(both, WEIGHTS) == {"a": True, "b": {"c": True, "d": True}}


def test_untrained_leaves_compute_nothing():
    like = {"a": jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)}
    assert _probe.untrained_leaves(optax.adam(0.1), like) == {"a": False}


DECAYS = {
    "adamw": (optax.adamw(1e-3, weight_decay=1e-4), True),
    "warm-up": (optax.adamw(optax.linear_schedule(0.0, 1e-3, 1000)), True),
    "sgd with decay": (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)), True),
    "fast decay": (optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.0)), True),
    "in one part": (by_path("'a'", optax.adamw(0.1), optax.sgd(0.1)), True),
    "every third step": (optax.MultiSteps(optax.adamw(0.1), 3), True),
    "noise": (optax.noisy_sgd(0.1, key=jax.random.key(0)), True),
    "adam": (optax.adam(0.1), False),
    "clipped adam": (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), False),
    "yogi starts with momentum": (optax.yogi(0.1), False),
    "averages round": (optax.contrib.schedule_free_sgd(0.1), False),
    "wants a value": (optax.polyak_sgd(), False),
}


@pytest.mark.parametrize("name", DECAYS)
def test_decays_weights(name):
    optimizer, want = DECAYS[name]
    assert _probe.decays_weights(optimizer, WEIGHTS if "part" in name else ONE) is want


def test_small_decays_of_low_precision_weights_are_found():
    assert _probe.decays_weights(DECAYS["adamw"][0], jax.tree.map(lambda w: w.astype(jnp.bfloat16), WEIGHTS))
