"""The three definitions against the closed forms of `cases.py`, against each other, and where a condition fails."""

import functools
import warnings

import jax
import numpy as np
import pytest
from cases import CASES, DEFINITIONS, INFINITE, IRREGULAR, RAISES, scaled_error

import fisherbook as fb

BY_NAME = {case.name: case for case in CASES}
FUNCTIONS = {**DEFINITIONS, "expected_hessian": fb.expected_hessian}


def marks(case):
    large = case.exact_kwargs.get("max_outcomes", 0) > 2**24  # 80 million outcomes take 11 GB
    return [pytest.mark.slow] * case.slow + [pytest.mark.large] * large


def difference(one, other, case):
    """max |dF_ij| in the units of the closed form's diagonal, and of nothing else of it."""
    return scaled_error(case.information + (one - other), case.information)


@functools.cache
def eager(name, definition):
    """The matrix by one definition, outside jit; two tests compare with it."""
    case = BY_NAME[name]
    return np.asarray(DEFINITIONS[definition](case.model, case.theta, case.x, law=fb.Exact(**case.exact_kwargs)))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c)) for c in CASES])
def test_closed_form(case):
    found, failures = {}, {}
    for name in DEFINITIONS:
        try:
            F = eager(case.name, name)
        except ValueError as error:
            if not case.may_raise:
                failures[name] = str(error)
            continue
        assert F.shape == case.information.shape
        if not scaled_error(F, case.information) <= case.tolerance:
            failures[name] = scaled_error(F, case.information)
        for earlier, G in found.items():
            if not difference(F, G, case) <= 2 * case.tolerance:
                failures[f"{name} - {earlier}"] = difference(F, G, case)
        found[name] = F
    assert not failures, case.note or case.source


# One of each kind of support and rule.
JITTED = [
    "Bernoulli, probs",
    "categorical, logits (singular)",
    "binomial",
    "Poisson, rate",
    "normal, location 1e6",
    "Cauchy, scale 1e-4",
    "gamma, shape 0.6",
    "beta",
    "von Mises, location near pi",
    "mixture of two normals",
    "bivariate normal",
    "independent Bernoulli pixels, regression",
    "gamma regression, log link",
]


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("name", JITTED)
def test_jit_equals_eager(name, definition):
    case, function = BY_NAME[name], DEFINITIONS[definition]
    compiled = jax.jit(lambda theta, x: function(case.model, theta, x, law=fb.Exact()))
    F = np.asarray(compiled(case.theta, case.x))
    assert scaled_error(F, case.information) <= case.tolerance
    # another order of the same sums; the scores themselves are only known to the rounding of y - loc
    assert difference(F, eager(name, definition), case) <= case.tolerance


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_jit_of_a_rule_too_coarse_is_an_error_or_right(definition):
    # the rule is refined until it converges where values can be read; under jit its size is fixed
    case = BY_NAME["mixture of two normals, modes 40 sd apart"]
    compiled = jax.jit(lambda theta: DEFINITIONS[definition](case.model, theta, None, law=fb.Exact()))
    try:
        F = np.asarray(compiled(case.theta))
    except jax.errors.JaxRuntimeError as error:
        F, message = case.information, str(error)
        assert "did not converge" in message  # an error is one of two right answers
    assert scaled_error(F, case.information) <= case.tolerance


def outcome(case, function):
    """What the call did: (matrix, None, warnings) or (None, message of the error, warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            F = FUNCTIONS[function](case.build(), case.theta, None, law=fb.Exact(**case.exact_kwargs))
            return np.asarray(F), None, caught
        except (ValueError, RuntimeError) as error:
            return None, str(error), caught


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in IRREGULAR])
def test_where_a_condition_fails(case, function):
    wanted = getattr(case, function)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    words, answers = [w for w in wanted if isinstance(w, str)], [w for w in wanted if not isinstance(w, str)]
    F, message, caught = outcome(case, function)
    if message is not None:
        assert words, message
        assert len(message) > 40, "an error must say why"
    elif function == "expected_hessian" and not answers and RAISES in words:
        # for Laplace 0 is the number: a warning that Bartlett's identity fails may stand in for the error
        assert any("Bartlett" in str(w.message) for w in caught), f"a number, {F}, without a word"
    elif INFINITE in words:
        assert np.all(np.isinf(F)), f"a finite number, {F}, for an integral that diverges"
    else:
        assert answers, f"{F} where there is no information"
        errors = [np.max(np.abs(F - answer)) / max(1.0, np.max(np.abs(answer))) for answer in answers]
        assert min(errors) <= case.tolerance, (F, answers)
