"""The observed information: minus the mean second derivative of the log-likelihood at the data."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ..batches import pieces
from ..law import Data, Law
from ..model import Model, flatten, row_count
from ..score import expected_hessian
from .dense import DenseFisher


def observed_information(model: Model, theta: Any, x: Any = None, *, law: Law) -> DenseFisher:
    r"""Form minus the mean Hessian of the log-likelihood at observations, as an operator.

    It is a curvature for `laplace`, with `law=Data(y)`. It is no Fisher information: it depends on y, it need not be
    positive away from a maximum, and then a solve raises. For the canonical parameter of an exponential family the two
    are equal.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution with second derivatives.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, or `Batches` of them, for a conditional model.
        law: `Data(y)`, the observations.

    Returns:
        A `DenseFisher` of shape [d, d] in 1/u^2, per observation.

    Raises:
        ValueError: the law is not `Data(y)`; as `expected_hessian`.

    Example:
        >>> import numpyro.distributions as dist
        >>> y = jnp.array([-1.0, 0.0, 4.0])  # Cauchy: the second derivative depends on y
        >>> H = observed_information(lambda t: dist.Cauchy(t, 1.0), jnp.array(0.0), law=Data(y))
        >>> print(H.as_matrix().round(4))
        [[0.6321]]

    Derived in the chapter "Laplace posteriors". Source: Efron and Hinkley (1978), section 1.
    """
    if not isinstance(law, Data):
        raise ValueError(f"observed information is at observations: pass law=Data(y), got {type(law).__name__}")
    flat, unravel = flatten(theta)
    total, n = jnp.zeros((flat.size, flat.size), flat.dtype), 0
    for piece in pieces(x, law):
        assert isinstance(piece.law, Data)
        rows = row_count(piece.law.y, "y")
        total, n = total - rows * expected_hessian(model, theta, piece.x, law=piece.law), n + rows
    return DenseFisher(unravel(flat), jnp.ones((), flat.dtype), "observed, Data(y)", total / n)
