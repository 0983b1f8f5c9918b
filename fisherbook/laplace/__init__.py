"""Laplace posteriors: the normal law at a mode whose precision is n F + prior."""

from .fit import laplace as laplace
from .posterior import LaplacePosterior as LaplacePosterior
from .saving import load_posterior as load_posterior
from .tuning import tune_prior as tune_prior
