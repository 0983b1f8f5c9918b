"""Figures of the book: arrays in, Axes out. Needs matplotlib (`pip install fisherbook[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Okabe and Ito's palette, darkened where a line on white needs it: told apart by colour-blind readers.
COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "red": "#B2182B",
    "purple": "#8E4585",
    "grey": "#6B6B6B",
}


def use_style() -> None:
    """Set matplotlib's defaults to the book's: opaque white ground, open axes, a colour-blind-safe cycle."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.8),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=list(COLORS.values())),
            "axes.labelsize": 11,
            "axes.titlesize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
            "font.size": 11,
        }
    )


def _axes(ax: Axes | None) -> Axes:
    return ax if ax is not None else plt.subplots()[1]


def ellipse(F: Any, center: Any = (0.0, 0.0), level: float = 1.0, ax: Axes | None = None, **line: Any) -> Axes:
    """Draw the set of v with (v - center)^T F (v - center) = level, for F [2, 2] positive definite.

    Raises:
        ValueError: F is not [2, 2] and positive definite, or `level` is not positive.

    Example:
        >>> ax = ellipse(np.diag([4.0, 1.0]), level=2.0)
        >>> print(round(float(ax.lines[0].get_xdata().max()), 2))  # sqrt(level / F_00)
        0.71
    """
    F = np.asarray(F, float)
    if F.shape != (2, 2) or np.linalg.eigvalsh(F).min() <= 0 or level <= 0:
        raise ValueError(
            f"ellipse needs F [2, 2] positive definite and level > 0, got F = {F.tolist()}, level = {level}"
        )
    values, vectors = np.linalg.eigh(F)
    angle = np.linspace(0, 2 * np.pi, 401)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    points = np.asarray(center, float)[:, None] + vectors @ (np.sqrt(level / values)[:, None] * circle)
    ax = _axes(ax)
    ax.plot(*points, **line)
    return ax


def spectrum(values: Any, ax: Axes | None = None, **line: Any) -> Axes:
    """Plot singular values or eigenvalues, largest first, on a logarithmic axis; zeros are marked at the bottom.

    Raises:
        ValueError: a value is negative or not finite, or there is none.
    """
    values = np.sort(np.ravel(np.asarray(values, float)))[::-1]
    if values.size == 0 or not np.isfinite(values).all() or values[-1] < 0 or values[0] == 0:
        raise ValueError("spectrum needs non-negative finite values, at least one positive")
    ax, rank = _axes(ax), np.arange(1, values.size + 1)
    positive = values > 0
    ax.semilogy(rank[positive], values[positive], **{"marker": "o", "markersize": 3, "linestyle": "none", **line})
    if not positive.all():
        floor = np.full((~positive).sum(), values[positive].min() / 10)
        ax.semilogy(rank[~positive], floor, marker="x", markersize=4, linestyle="none", color=COLORS["grey"])
    ax.set_xlabel("rank")
    return ax


def intervals(
    estimates: Any,
    standard_errors: Mapping[str, Any],
    names: Sequence[str],
    ax: Axes | None = None,
    z: float = 1.96,
) -> Axes:
    """Draw estimate +- z standard errors of each kind, one parameter to a row.

    Raises:
        ValueError: the lengths of estimates, standard errors and names differ.
    """
    estimates = np.ravel(np.asarray(estimates, float))
    errors = {kind: np.ravel(np.asarray(e, float)) for kind, e in standard_errors.items()}
    lengths = {len(names), estimates.size, *(e.size for e in errors.values())}
    if len(lengths) > 1:
        raise ValueError(f"estimates, standard errors and names have different lengths: {sorted(lengths)}")
    ax, row = _axes(ax), np.arange(len(names))[::-1]
    for i, (kind, error) in enumerate(errors.items()):
        shift = 0.6 * ((len(errors) - 1) / 2 - i) / max(len(errors), 1)
        ax.errorbar(estimates, row + shift, xerr=z * error, fmt="o", markersize=3, capsize=2, label=kind)
    ax.axvline(0, color=COLORS["grey"], linewidth=0.8)
    ax.set_yticks(row, list(names))
    ax.legend(loc="best")
    return ax
