"""Laplace posteriors: the normal law at a mode whose precision is n F + prior."""

from .posterior import LaplacePosterior as LaplacePosterior
from .posterior import laplace as laplace
