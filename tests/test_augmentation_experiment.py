"""The augmentation experiment: its warp, its network, and a tiny run that gives what ``main`` promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from experiments.augmentation import comparison, main, transforms


def images(side, count=3):
    return jax.random.uniform(jax.random.key(0), (count, side * side))


@pytest.mark.parametrize("side", [7, 8])
def test_the_identity_map_gives_the_image_back(side):
    x = images(side)
    same = transforms.warp(x, jnp.broadcast_to(transforms.IDENTITY, (3, 2, 3)))
    np.testing.assert_allclose(same, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (-3, 1)])
def test_a_whole_pixel_shift_moves_the_image(side, shift):
    x = images(side)
    maps = transforms.IDENTITY.at[:, 2].set(jnp.array(shift) / (side / 2))
    found = transforms.warp(x, jnp.broadcast_to(maps, (3, 2, 3))).reshape(3, side, side)
    wide = np.pad(np.asarray(x).reshape(3, side, side), ((0, 0), (4, 4), (4, 4)))
    expected = wide[:, 4 + shift[0] : 4 + shift[0] + side, 4 + shift[1] : 4 + shift[1] + side]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_gradient_of_the_warp_agrees_with_finite_differences(x64):
    x, weights = (jax.random.normal(jax.random.key(n), (3, 49), jnp.float64) for n in (1, 2))
    # At a generic map no pixel is taken from a whole place, where bilinear interpolation has a kink.
    maps = jnp.eye(2, 3) + 0.2 * jax.random.normal(jax.random.key(3), (3, 2, 3), jnp.float64)
    loss = lambda maps, x: (weights * transforms.warp(x, maps)).sum()  # noqa: E731
    check_grads(loss, (maps, x), order=1, modes=["fwd", "rev"], atol=1e-7, rtol=1e-7, eps=1e-6)


@pytest.mark.slow
def test_a_network_with_output_layers_of_zero_is_the_identity():
    augmenter, x, key = transforms.Augmenter(), images(8), jax.random.key(1)
    params = augmenter.init(key, x, key)["params"]
    assert float(jnp.abs(augmenter.apply({"params": params}, x, key) - x).max()) > 0.05
    zero = jax.tree_util.tree_map_with_path(lambda path, w: 0 * w if path[-2].key == "out" else w, params)
    np.testing.assert_allclose(augmenter.apply({"params": zero}, x, key), x, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_augmentation(tmp_path, capsys):
    log = tmp_path / "log.csv"
    arguments = ["--steps", "40", "--seeds", "1", "--out", str(tmp_path), "--log", str(log)]
    (outcomes,) = main(arguments)
    assert len(outcomes) == 9
    for name, outcome in outcomes.items():
        assert 0 < outcome.test_loss < 3
        assert 0 < outcome.test_error < 0.9
        assert outcome.images == (400 if "valid" in name else 200)
    start, learned = (outcomes[name].run.variables.hyperparams for name in (comparison.START, comparison.JOINT))
    again = outcomes[comparison.RETRAINED].run.variables.hyperparams
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).all(), start, learned))  # each had a hypergradient
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), learned, again))
    assert (tmp_path / "augmentation.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name in printed for name in outcomes)
    assert log.read_text().count("\n") == 1 + comparison.RUNS
