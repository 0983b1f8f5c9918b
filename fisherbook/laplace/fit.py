"""A posterior from a fitted model: the sum of the curvature over the data, and the prior."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from typing import Any

import jax
import jax.numpy as jnp

from ..batches import Batches, pieces
from ..compilation import run, traced_once
from ..law import Data, Exact, Law
from ..model import Conditional, Model, by_identity, check_observations, flatten, is_traced, require
from ..operators import dense_fisher
from ..part import PartOfModel, select
from .posterior import LaplacePosterior, assemble, positive, spread

AWAY = 0.1  # posterior standard deviations from the mode from which on a warning is due


def laplace(
    model: Model,
    theta: Any,
    y: Any,
    x: Any = None,
    *,
    prior_precision: Any = 1.0,
    prior_mean: Any = 0.0,
    curvature: Callable[..., Any] = dense_fisher,
    law: Law = Exact(),  # noqa: B008
    subset: Callable[[Any], Any] | None = None,
    must_be_mode: bool = False,
    progress: bool = False,
) -> LaplacePosterior:
    r"""Approximate a posterior by a normal law at its mode, with precision :math:`n F + P`.

    F is the Fisher information per observation at theta and P the precision of a normal prior with independent
    parameters. For a linear model with normal noise this is the posterior itself.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: the mode, a pytree with d scalars; units u. Fit it first: this function does not move it.
        y: observations with leading axis n, or `Batches` of them beside those of x.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model.
        prior_precision: a number, a pytree with one number (or array) per leaf, or an array [d]; in 1/u^2. Zero is the
            flat prior, which needs a regular F.
        prior_mean: the same forms, in u.
        curvature: `dense_fisher`, `diagonal_fisher`, `kronecker_fisher`, `low_rank_fisher`, `implicit_fisher`,
            `observed_information` (with `law=Data(y)`), or any function of their signature.
        law: the law of the curvature's expectation.
        subset: a function from theta to the part that is uncertain: leaves, `lambda t: t["out"]`, or entries of them,
            `lambda t: t["out"].ravel()[chosen]`; the rest is held fixed, and everything the posterior gives is about
            that part.
        must_be_mode: raise, instead of warning, where theta is more than a tenth of a posterior standard deviation from
            the mode of the quadratic.
        progress: show a bar over the batches.

    Returns:
        A `LaplacePosterior`.

    Raises:
        ValueError: y outside the support; a negative prior precision; n F + prior is singular, indefinite, or too
            ill-conditioned for float32; a prior that the structure cannot carry; `subset` selects nothing; theta is not
            finite; batches of x and y that do not belong together.

    Example:
        >>> import numpyro.distributions as dist
        >>> y = jnp.array([1.0, 2.0, 3.0])  # normal with variance 1, prior precision 1: the mode is 6 / 4
        >>> posterior = laplace(lambda t: dist.Normal(t, 1.0), jnp.array(1.5), y)
        >>> print(posterior.mean, posterior.standard_deviations())  # 1 / sqrt(3 + 1)
        1.5 0.5

    Derived in the chapter "Laplace posteriors". Source: MacKay (1992).
    """
    model, part = by_identity(model), None
    whole = model
    if subset is not None:
        part, theta = select(theta, subset)
        model = PartOfModel(whole, part)
    flat, unravel = flatten(theta)
    mean = unravel(flat)
    if isinstance(y, Batches) and not isinstance(x, Batches):
        raise ValueError("y comes in Batches, but x does not: pass both in batches of the same rows")

    def likelihood(flat: jax.Array, y: jax.Array, x: Any) -> jax.Array:
        return jnp.sum(Conditional.of(model, unravel(flat), x, split=False).of_observations(y))

    n, sums, both = 0, None, jax.value_and_grad(likelihood)
    programs: dict[Any, Any] = {}
    for piece in pieces(_shown(x, progress, "log-likelihood"), Data(y)):
        assert isinstance(piece.law, Data)
        with traced_once(programs):
            rows = check_observations(model, mean, piece.law.y, piece.x)
            more = run(both, flat, rows, piece.x)
        n, sums = n + len(rows), more if sums is None else jax.tree.map(jnp.add, sums, more)
    F = curvature(model, mean, _shown(x, progress, "curvature"), law=law)
    if tuple(getattr(F, "shape", ())) != (flat.size, flat.size):
        raise ValueError(f"curvature has shape {getattr(F, 'shape', None)} but the parameters are {flat.size} scalars")
    prior, around = positive(prior_precision, mean), spread(prior_mean, mean, "prior_mean")
    count = jnp.asarray(n, flat.dtype)
    assert sums is not None
    posterior = assemble(whole, part, mean, F, count, prior, around, sums[0], sums[1] / count)
    return _checked(posterior, must_be_mode)


def _shown(x: Any, progress: bool, what: str) -> Any:
    if not (progress and isinstance(x, Batches)):
        return x
    from tqdm.auto import tqdm

    total = len(x.source) if isinstance(x.source, Sized) else None
    return Batches(lambda: iter(tqdm(x, desc=what, unit="batch", total=total)))


def _checked(posterior: LaplacePosterior, must_be_mode: bool) -> LaplacePosterior:
    message = "theta is not the mode: fit it to the log-likelihood plus the log-prior first"
    if is_traced(posterior):
        return require(posterior.away <= AWAY, posterior, message) if must_be_mode else posterior
    if not float(posterior.away) <= AWAY:
        message = (
            f"theta is not the mode: the step to it is {float(posterior.away):.2g} posterior standard deviations long; "
            "fit theta to the log-likelihood plus the log-prior first"
        )
        if must_be_mode:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return posterior
