"""Outer methods for ``hg.minimize``: how λ moves, and how exact the solves must be."""

from hypergrad.methods._base import Bounds, Method, MethodStep, Oracle, Point
from hypergrad.methods._gradient_descent import gradient_descent
from hypergrad.methods._hoag import hoag
from hypergrad.methods._lbfgs import lbfgs
from hypergrad.methods._maid import maid

__all__ = ["Bounds", "Method", "MethodStep", "Oracle", "Point", "gradient_descent", "hoag", "lbfgs", "maid"]
