"""Draw what imports what in ``hypergrad/``: ``python docs/architecture.py`` writes docs/architecture.png.

The layers are those of ``tests/test_architecture.py``: a module imports lower layers and its own folder.
"""

import ast
import collections
import pathlib
from typing import Any

from matplotlib.figure import Figure

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hypergrad"
TITLES = {
    0: "values",
    1: "hyperparameters",
    2: "problem, training",
    3: "linear solvers",
    4: "estimators, responses",
    5: "drivers",
    6: "diagnostics, integrations",
}


def layers() -> dict[str, float]:
    """Return the layer of each module of the top level, from the test that enforces them."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            found: dict[str, float] = ast.literal_eval(node.value)
            return {name: layer for name, layer in found.items() if not name.startswith("_")}
    raise ValueError("tests/test_architecture.py has no LAYERS")


def edges(names: dict[str, float]) -> set[tuple[str, str]]:
    """Return (importer, imported) between modules of the top level."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hypergrad":
                parts = (node.module or "").split(".")
                targets = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
                found |= {(own, target) for target in targets if own in names and target in names and own != target}
    return found


def main() -> None:
    """Draw and save."""
    names = layers()
    rows = collections.defaultdict(list)
    for name, layer in names.items():
        rows[int(layer)].append(name)
    places: dict[str, tuple[float, float]] = {}
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Any = figure.subplots()
    for layer, row in rows.items():
        for i, name in enumerate(row):
            places[name] = ((i + 0.5) / len(row) * 8, layer)
    for importer, imported in sorted(edges(names)):
        if int(names[importer]) != int(names[imported]):
            (x, y), (u, v) = places[importer], places[imported]
            axes.plot([x, u], [y - 0.18, v + 0.18], color="0.8", linewidth=0.8, zorder=0)
    for name, (x, y) in places.items():
        axes.text(x, y, name, ha="center", va="center", fontsize=9, bbox={"boxstyle": "round", "fc": "white"})
    for layer, title in TITLES.items():
        axes.text(-0.4, layer, f"{layer}  {title}", ha="right", va="center", fontsize=9, color="0.3")
    axes.set(xlim=(-2.6, 8.2), ylim=(-0.5, 6.5))
    axes.axis("off")
    figure.savefig(ROOT / "docs" / "architecture.png", dpi=110)


if __name__ == "__main__":
    main()
