"""Separation: when a linear predictor tells the outcomes apart, the likelihood has no maximum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .model import is_traced


def separating_direction(x: Any, y: Any) -> jax.Array | None:
    r"""Find a direction v in which a binary regression of y on x has no finite maximum-likelihood estimate.

    It satisfies :math:`x_i^\top v \ge 0` wherever :math:`y_i = 1` and :math:`x_i^\top v \le 0` wherever
    :math:`y_i = 0`, not all with equality: along it the likelihood of a logit, probit or complementary log-log
    model grows for ever. Found by the linear programme that maximises :math:`\sum_i t_i` subject to
    :math:`(2 y_i - 1) x_i^\top v \ge t_i` and :math:`0 \le t_i \le 1`, whose solution has t_i = 1 for as many rows
    as any direction can separate. Separation is complete if that is every row, and quasi-complete otherwise.

    Args:
        x: inputs [n, d] of the linear predictor, the column of ones included where the model has a constant.
        y: outcomes [n], each 0 or 1.

    Returns:
        Array [d] in 1 / units of x, scaled so that `abs(x @ v)` is at least 1 on the rows it separates and 0 on the
        others (to 1e-6); or None if the outcomes overlap in every direction, and then a finite maximum exists.

    Raises:
        ValueError: lengths differ, x is not a finite matrix, or y has a value other than 0 and 1.

    Example:
        >>> x = jnp.array([[1.0, -2.0], [1.0, -1.0], [1.0, 1.0], [1.0, 3.0]])
        >>> print(x @ separating_direction(x, jnp.array([0, 0, 1, 1])))
        [-2. -1.  1.  3.]
        >>> print(separating_direction(x, jnp.array([0, 1, 0, 1])))
        None

    Derived in the chapter "Maximum likelihood by Fisher scoring". Source: Albert and Anderson (1984), section 2;
    Konis (2007), chapter 4.
    """
    from scipy.optimize import linprog  # only needed here, and a third of a second to import
    from scipy.sparse import csr_array, eye_array, hstack

    X, outcome = _binary_regression(x, y)
    n, d = X.shape
    size = np.max(np.abs(X), axis=0)
    size = np.where(size > 0, size, 1)  # the solver's tolerances are absolute: columns in units of their largest entry
    signed = (2 * outcome - 1)[:, None] * X / size
    found = linprog(
        np.r_[np.zeros(d), -np.ones(n)],
        A_ub=hstack([csr_array(-signed), eye_array(n)], format="csr"),
        b_ub=np.zeros(n),
        bounds=[(None, None)] * d + [(0, 1)] * n,
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"the linear programme of separating_direction was not solved: {found.message}")
    strict = found.x[d:] > 0.5  # each is 0 or 1, but for the solver's tolerance
    return jnp.asarray(found.x[:d] / size) if strict.any() else None


def _binary_regression(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    if is_traced(x, y):
        raise ValueError("separating_direction solves a linear programme with SciPy: call it outside jit and vmap")
    X, outcome = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"x must be a matrix [n, d] with at least one row and column, but has shape {X.shape}")
    if outcome.shape != X.shape[:1]:
        raise ValueError(f"x has {len(X)} rows but y has shape {outcome.shape}")
    if not np.isfinite(X).all():
        raise ValueError(f"x[{np.flatnonzero(~np.isfinite(X).all(1))[0]}] is not finite")
    other = np.flatnonzero((outcome != 0) & (outcome != 1))
    if other.size:
        raise ValueError(f"y must be 0 or 1, but y[{other[0]}] = {outcome[other[0]]:g}")
    return X, outcome
