"""The order in which a run of n segments is reversed with s kept states: the binomial schedule.

    n ≤ C(s + r, s)  ⇒  every segment runs forward at most r times before it is reversed
    segments run forward in all:  r n − C(s + r, r − 1)

for the smallest such r; s counts the state at the start, and each segment runs forward once more as it is reversed. No
schedule with s states needs fewer.

Reference: Griewank & Walther, Algorithm 799: revolve, ACM Transactions on Mathematical Software 2000.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Action", "num_forward", "num_repeats", "schedule"]


class Action(NamedTuple):
    """One action of a schedule; ``at`` and ``to`` are numbers of boundaries between segments.

    Attributes:
      kind: "restore": take up the state kept at ``at``; "forward": run on from there to ``to``; "keep": keep the
        present state, that of ``at``; "reverse": pull the cotangent back through segment ``at``, from its state, which
        is the present one; "drop": forget the state kept at ``at``.
      at: boundary.
      to: of "forward": the boundary it ends at; otherwise ``at``.
    """

    kind: str
    at: int
    to: int


def num_repeats(num_segments: int, slots: int) -> int:
    """Return r, the smallest number with C(s + r, s) ≥ n.

    >>> [num_repeats(n, 10) for n in (1, 11, 66, 286, 1001)]
    [0, 1, 2, 3, 4]
    """
    repeats = 0
    while math.comb(slots + repeats, slots) < num_segments:
        repeats += 1
    return repeats


def num_forward(num_segments: int, slots: int) -> int:
    """Return how many segments the schedule runs forward, without those that are reversed.

    >>> num_forward(66, 10), num_forward(4, 1)
    (120, 6)
    """
    repeats = num_repeats(num_segments, slots)
    return repeats * num_segments - math.comb(slots + repeats, repeats - 1) if repeats else 0


def schedule(num_segments: int, slots: int) -> Iterator[Action]:
    """Yield the actions that reverse n segments; the state at boundary 0 is kept by the caller, and present.

    >>> [" ".join(map(str, action[: 3 if action.kind == "forward" else 2])) for action in schedule(2, 2)]
    ['forward 0 1', 'keep 1', 'reverse 1', 'drop 1', 'restore 0', 'reverse 0']
    """
    # Parts of the run, the next one last; the first state of each is kept. A stack: there may be as many as slots.
    parts = [(0, num_segments)]
    while parts:
        start, stop = parts.pop()
        free = slots - len(parts)  # with that of this part
        if stop - start == 1:
            yield Action("reverse", start, start)
            if parts:
                yield Action("drop", start, start)
                yield Action("restore", parts[-1][0], parts[-1][0])
            continue
        middle = start + _split(stop - start, free)
        yield Action("forward", start, middle)
        parts.append((start, middle))
        if free == 1:
            yield Action("reverse", middle, middle)
            yield Action("restore", start, start)
        else:
            yield Action("keep", middle, middle)
            parts.append((middle, stop))


def _split(length: int, slots: int) -> int:
    """Return after how many of the segments the next state is kept."""
    if slots == 1:
        return length - 1
    repeats = num_repeats(length, slots)
    return max(1, min(math.comb(slots + repeats - 1, slots), length - math.comb(slots + repeats - 2, slots - 1)))
