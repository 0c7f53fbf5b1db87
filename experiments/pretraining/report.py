"""Tell what ``pretraining.py`` measured: a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.pretraining.comparison import EQUAL, JOINT, TUNING, VALID, Outcome

_NOTE = f"""mean ± standard deviation over seeds; {TUNING} clean examples to fine-tune on, {VALID} to fit all else to
joined: test error after fine-tuning on both instead, for a fixed time
AUC: of telling right labels from wrong ones by the learned weights"""


def table(outcomes: Sequence[dict[str, Outcome]]) -> str:
    """Return the rows as text; mean ± standard deviation over the seeds."""
    lines: list[tuple[str, ...]] = [("", "valid loss", "test loss", "test error, %", "joined, %", "AUC")]
    for name in outcomes[0]:
        columns = zip(*(outcome[name][:5] for outcome in outcomes), strict=True)
        lines.append((name, *map(_mean_spread, columns, (1, 1, 100, 100, 1), (3, 3, 1, 1, 3))))
    text = ["  ".join([line[0].ljust(30), *(cell.rjust(13) for cell in line[1:])]) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], _NOTE])


def summary(outcomes: Sequence[dict[str, Outcome]]) -> str:
    """Say from the numbers alone what learned weights are worth beside other uses of the validation examples."""
    ours = np.asarray([outcome[JOINT].test_error for outcome in outcomes])
    theirs = {
        "equal weights": [outcome[EQUAL].test_error for outcome in outcomes],
        "equal weights, joined": [outcome[EQUAL].joined_error for outcome in outcomes],
    }
    head = "test error of learned weights, jointly trained, as a ratio to that of"
    ratios = [
        f"{name}: {ours.mean() / np.mean(errors):.2f} (lower on {(ours < errors).sum()} of {len(ours)} seeds)"
        for name, errors in theirs.items()
    ]
    return "\n  ".join([head, *ratios])


def draw(outcomes: Sequence[dict[str, Outcome]], path: Path) -> None:
    """Save the picture: learned weights of right and of wrong labels, and test errors."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    learned = [outcome[JOINT] for outcome in outcomes]
    weights, wrong = (np.concatenate(parts) for parts in zip(*(one[-2:] for one in learned), strict=True))
    for label, chosen, colour in (("right label", ~wrong, "tab:green"), ("wrong label", wrong, "tab:red")):
        left.hist(weights[chosen], np.linspace(0, 1, 41), alpha=0.55, color=colour, label=label)
    left.set(xlabel="learned weight of an example", ylabel=f"examples ({len(outcomes)} seeds)")
    left.set_title(f"one weight an example: AUC {np.mean([one.auc for one in learned]):.2f}", fontsize="medium")
    left.legend(frameon=False)
    places = np.arange(len(outcomes[0]))[::-1]
    for shift, field, colour, label in (
        (0.2, "test_error", "tab:blue", "fine-tuned on the small clean set"),
        (-0.2, "joined_error", "0.6", "fine-tuned on it and the validation set"),
    ):
        errors = 100 * np.asarray([[getattr(one, field) for one in outcome.values()] for outcome in outcomes])
        right.barh(places + shift, errors.mean(0), 0.38, color=colour, alpha=0.75, label=label)
        right.plot(errors.T, np.repeat(places[:, None] + shift, len(errors), 1), "k.", markersize=4)
    right.set_yticks(places, list(outcomes[0]))
    right.set(xlabel="test error, %: mean, and each seed")
    right.set_title("after fine-tuning", fontsize="medium")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=95, pil_kwargs={"optimize": True})


def _mean_spread(values: Sequence[float], scale: float, digits: int) -> str:
    scaled = scale * np.asarray(values)
    return "-" if np.isnan(scaled).any() else f"{scaled.mean():.{digits}f} ± {scaled.std():.{digits}f}"
