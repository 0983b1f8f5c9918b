"""Figures: what is drawn is the set, the values and the intervals that were asked for."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from fisherbook import plotting


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_ellipse_is_the_level_set():
    F = np.array([[3.0, 1.0], [1.0, 2.0]])
    center = np.array([0.5, -1.0])
    ax = plotting.ellipse(F, center, level=2.5, color="black")
    v = np.stack(ax.lines[0].get_data()) - center[:, None]
    np.testing.assert_allclose(np.einsum("ik,ij,jk->k", v, F, v), 2.5, rtol=1e-10)


def test_spectrum_sorts_and_marks_zeros_at_the_bottom():
    ax = plotting.spectrum([1.0, 100.0, 0.0, 10.0])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [100.0, 10.0, 1.0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.1])
    assert ax.get_yscale() == "log"


def test_intervals_are_estimate_plus_minus_z_errors():
    _, ax = plt.subplots()
    assert (
        plotting.intervals([1.0, -2.0], {"expected": [0.5, 0.1], "sandwich": [1.0, 0.2]}, ["a", "b"], ax, z=2.0) is ax
    )
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bars[0][:, 0], bars[1][:, 0]], [[0.0, 2.0], [-2.2, -1.8]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="positive definite"):
        plotting.ellipse(np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match="non-negative"):
        plotting.spectrum([1.0, -1.0])
    with pytest.raises(ValueError, match="different lengths"):
        plotting.intervals([1.0], {"expected": [1.0, 2.0]}, ["a"])


def test_style_is_opaque_and_its_colours_differ():
    plotting.use_style()
    assert plt.rcParams["figure.facecolor"] == "white"
    assert len(set(plotting.COLORS.values())) == len(plotting.COLORS)
