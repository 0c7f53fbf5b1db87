"""Estimators of about 40 lines each, written with the public protocol alone: what a new method needs."""

from tests.toys.evolution import evolution
from tests.toys.langevin import langevin
from tests.toys.partition import partition

__all__ = ["evolution", "langevin", "partition"]
