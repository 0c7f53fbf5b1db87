"""Change images at random, differentiably: an affine warp, a network that makes one up, and a fixed recipe.

    warped(p) = x(A (p − c) + c + t)      pixels p, centre c; x between pixels by bilinear interpolation, 0 outside

A map (A, t) is a 2 × 3 matrix over (row, column, 1), t in units of half an image. It says where a pixel is taken from.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

IDENTITY = jnp.eye(2, 3)
_TURN, _ZOOM, _SHIFT, _GRAIN = math.pi / 12, 0.1, 0.1, 0.1  # at most, at strength 1 of the fixed recipe


def warp(x: jax.Array, maps: jax.Array) -> jax.Array:
    """Return flat square images (n, pixels) as seen through ``maps`` (n, 2, 3); differentiable in both."""
    side = math.isqrt(x.shape[1])
    offsets = jnp.arange(side, dtype=maps.dtype) - (side - 1) / 2
    rows, columns = (grid.ravel() for grid in jnp.meshgrid(offsets, offsets, indexing="ij"))
    points = jnp.stack([rows, columns, jnp.full_like(rows, side / 2)])
    # Around the image lies a frame of zeros, one pixel wide, in which every place further out is taken to be.
    places = jnp.clip(jnp.einsum("nij,jp->nip", maps, points) + (side - 1) / 2, -1.0, float(side))
    row, column = jnp.moveaxis(jnp.floor(places).astype(int), 1, 0)
    down, right = jnp.moveaxis(places - jnp.floor(places), 1, 0)
    wide = side + 3
    framed = jnp.pad(x.reshape(-1, side, side), ((0, 0), (1, 2), (1, 2))).reshape(-1, wide * wide)

    def pixel(below: int, beside: int) -> jax.Array:
        return jnp.take_along_axis(framed, (row + 1 + below) * wide + column + 1 + beside, axis=1)

    upper = pixel(0, 0) * (1 - right) + pixel(0, 1) * right
    lower = pixel(1, 0) * (1 - right) + pixel(1, 1) * right
    return upper * (1 - down) + lower * down


class RandomMap(nn.Module):
    """Noise (n, d) to affine maps (n, 2, 3) around the identity."""

    hidden: int
    spread: float

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Return the maps. Without biases they are odd in the noise, so their mean is the identity."""
        odd = nn.tanh(nn.Dense(self.hidden, use_bias=False)(z))
        return IDENTITY + nn.Dense(6, use_bias=False, kernel_init=_spread(self.spread), name="out")(odd).reshape(
            -1, 2, 3
        )


class Augmenter(nn.Module):
    """Image and noise to image: an affine warp, and a small change of every pixel that depends on the image.

    Both are odd in the noise. A change that is not could shift all training images alike; the hypergradient then
    spends itself on such a shift, which mends the weights of the moment and no others.

    Attributes:
      hidden: width of the hidden layers.
      spread: first standard deviation of an entry of the map, about. At 0 the network would be the identity for all
        noise, and the loss even in what multiplies the noise: its gradient would vanish.
      change: bound of what is added to a pixel.
      noise: how many random numbers the network gets for an image.
    """

    hidden: int = 64
    spread: float = 0.1
    change: float = 0.2
    noise: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """Return changed images, shaped like ``x`` (n, pixels)."""
        z = jax.random.normal(key, (len(x), self.noise))
        seen = nn.tanh(nn.Dense(self.hidden, name="image")(2 * x - 1))
        odd = seen * nn.tanh(nn.Dense(self.hidden, use_bias=False, name="noise")(z))
        out = nn.Dense(x.shape[1], use_bias=False, kernel_init=_spread(self.spread), name="out")
        return warp(x, RandomMap(self.hidden, self.spread, name="map")(z)) + self.change * nn.tanh(out(odd))


def by_hand(strength: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Return images turned, zoomed, shifted and grained at random; unchanged, at no cost, at strength 0."""

    def change(x: jax.Array) -> jax.Array:
        draw, grain = jax.random.split(key)
        turn, zoom, down, right = strength * jax.random.uniform(draw, (4, len(x)), minval=-1.0, maxval=1.0)
        cosine, sine = (jnp.exp(_ZOOM * zoom) * f(_TURN * turn) for f in (jnp.cos, jnp.sin))
        maps = jnp.stack([cosine, -sine, _SHIFT * down, sine, cosine, _SHIFT * right], axis=-1)
        grains = jax.random.uniform(grain, x.shape, minval=-1.0, maxval=1.0)
        return warp(x, maps.reshape(-1, 2, 3)) + strength * _GRAIN * grains

    return lax.cond(strength > 0, change, lambda x: x, x)


def _spread(size: float) -> nn.initializers.Initializer:
    """Return an initializer for a layer whose inputs are hyperbolic tangents, of mean square about a third."""
    return nn.initializers.variance_scaling(3 * size**2, "fan_in", "normal")
