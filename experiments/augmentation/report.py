"""Tell what ``augmentation.py`` measured: a table, what the network learned to do, and a picture."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.augmentation.comparison import DECAYS, HAND, JOINT, NONE, NONE_ON_MORE, RETRAINED, START, Outcome
from experiments.augmentation.training import Data
from experiments.augmentation.transforms import IDENTITY, Augmenter, RandomMap, by_hand

_NOTE = """mean ± standard deviation over seeds; gradients: of the training loss, with the search
held-out loss: on the part of the validation split that no gradient sees; it stops runs and chooses among several"""
_STYLES = {NONE: "tab:red", HAND: "tab:orange", START: "tab:gray", JOINT: "tab:blue", RETRAINED: "tab:green"}
_DRAWS = 6


def table(outcomes: Sequence[dict[str, Outcome]]) -> str:
    """Return the rows as text; mean ± standard deviation over the seeds."""
    lines: list[tuple[str, ...]] = [("", "images", "gradients", "held-out loss", "test loss", "test error, %")]
    for name in outcomes[0]:
        rows = [outcome[name] for outcome in outcomes]
        values = zip(*((row.run.loss, row.test_loss, 100 * row.test_error) for row in rows), strict=True)
        scores = map(_mean_spread, values, (3, 3, 1))
        lines.append((name, f"{rows[0].images:,}", f"{rows[0].gradients:,.0f}", *scores))
    text = ["  ".join([line[0].ljust(36), *(cell.rjust(13) for cell in line[1:])]) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], _NOTE])


def summary(outcomes: Sequence[dict[str, Outcome]], data: Data) -> str:
    """Say from the numbers alone how the learned network compares, and how it changes the data's images."""
    lines = []
    for name, rivals in (
        (JOINT, (NONE, DECAYS, HAND, START, NONE_ON_MORE)),
        (RETRAINED, (NONE, DECAYS, HAND, START)),
    ):
        ours = np.asarray([outcome[name].test_loss for outcome in outcomes])
        lines.append(f"test loss of {name}, as a ratio to that of")
        for rival in rivals:
            theirs = np.asarray([outcome[rival].test_loss for outcome in outcomes])
            won = f"lower on {(ours < theirs).sum()} of {len(ours)} seeds"
            lines.append(f"  {rival}: {ours.mean() / theirs.mean():.2f} ({won})")
    lines.append("what the network does to an image, standard deviation over its noise, at first and learned")
    first, learned = ([habits(outcome[row], data) for outcome in outcomes] for row in (START, JOINT))
    for name in first[0]:
        before, after = (np.mean([one[name] for one in each]) for each in (first, learned))
        lines.append(f"  {name}: {before:.3g}, {after:.3g}")
    return "\n".join(lines)


def habits(outcome: Outcome, data: Data) -> dict[str, float]:
    """Return by how much a network's maps and changes vary from noise to noise."""
    augmenter: Any = Augmenter()
    network, x = outcome.run.variables.hyperparams, data.valid.x
    z = jax.random.normal(jax.random.key(0), (5_000, augmenter.noise))
    random_map: Any = RandomMap(augmenter.hidden, augmenter.spread)
    (a, b, t), (c, d, u) = jnp.moveaxis(random_map.apply({"params": network["map"]}, z) - IDENTITY, 0, -1)
    parts = {"turn, degrees": jnp.degrees(c - b) / 2, "shear, %": 50 * (b + c), "zoom, %": 50 * (a + d)}
    pixels = math.sqrt(x.shape[1]) / 2
    parts |= {"stretch, %": 50 * (a - d), "shift down, pixels": pixels * t, "shift right, pixels": pixels * u}
    still = network | {"map": jax.tree.map(jnp.zeros_like, network["map"])}
    added = augmenter.apply({"params": still}, x, jax.random.key(0)) - x
    return {name: float(part.std()) for name, part in parts.items()} | {"a pixel, %": 100 * float(added.std())}


def draw(outcomes: Sequence[dict[str, Outcome]], data: Data, title: str, path: Path) -> None:
    """Save the picture: images of the first seed before and after, its losses on the way, and all test losses."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    (first, top), (second, bottom) = figure.subplots(2, 2)
    learned, recipe = (outcomes[0][name].run.variables.hyperparams for name in (JOINT, HAND))
    _mosaic(first, data, "learned", lambda x, key: Augmenter().apply({"params": learned}, x, key))
    _mosaic(second, data, "by hand", lambda x, key: by_hand(recipe["strength"], x, key))
    for name, style in _STYLES.items():
        top.plot(*zip(*outcomes[0][name].run.curve, strict=True), style, label=name)
    best = [outcomes[0][name].run.loss for name in _STYLES]
    top.set(xlabel="step", ylabel="held-out loss, first seed", ylim=(0.95 * min(best), 1.3 * max(best)))
    top.legend(frameon=False, fontsize="small")
    losses = np.asarray([[outcome.test_loss for outcome in each.values()] for each in outcomes])
    places = np.arange(len(outcomes[0]))[::-1]
    bottom.barh(places, losses.mean(0), color=[_STYLES.get(name, "0.7") for name in outcomes[0]], alpha=0.75)
    bottom.plot(losses.T, np.repeat(places[:, None], len(losses), 1), "k.", markersize=4)
    for place, name in zip(places, outcomes[0], strict=True):
        bottom.text(0.01 * losses.max(), place, name, va="center", fontsize="small")
    bottom.set(xlabel="test loss: mean, and each seed", yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=70, pil_kwargs={"optimize": True})


def _mosaic(axes: Any, data: Data, title: str, augment: Callable[[jax.Array, jax.Array], Any]) -> None:
    """Show five images, one a row: as they are, then several draws."""
    x = data.pool.x[np.unique(data.pool.y, return_index=True)[1][1::2]]
    columns = [x, *(augment(x, jax.random.key(n)) for n in range(_DRAWS))]
    side = math.isqrt(x.shape[1])
    tiles = np.asarray(columns).reshape(len(columns), len(x), side, side)
    tiles = np.pad(np.round(15 * np.clip(tiles, 0, 1)) / 15, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    axes.imshow(
        np.block([list(row) for row in tiles.swapaxes(0, 1)]), cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set_title(f"{title}: an image, and {_DRAWS} draws", fontsize="medium")
    axes.axis("off")


def _mean_spread(values: Sequence[float], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"
