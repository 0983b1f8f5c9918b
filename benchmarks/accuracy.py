"""The accuracy of the three definitions over all families, as a Markdown table.

    python benchmarks/accuracy.py [--slow] [words that a family's name must contain]

Errors are max |dF_ij| / sqrt(F_ii F_jj) against the closed form; an entry that raised shows the error's type.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cases import CASES, DEFINITIONS, Case, scaled_error


def _entry(case: Case, definition: str) -> str:
    import fisherbook as fb

    try:
        F = DEFINITIONS[definition](case.model, case.theta, case.x, law=fb.Exact(**case.exact_kwargs))
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    error = scaled_error(F, case.information)
    return f"{error:.0e}" if error <= case.tolerance else f"**{error:.0e}**"


def accuracy_table(cases: Iterable[Case] = CASES) -> Iterator[str]:
    """Yield the rows of the table, heading first. An error above the tolerance is bold."""
    yield "| family | d | " + " | ".join(f"`{name}`" for name in DEFINITIONS) + " | tolerance |"
    yield "| --- " * (3 + len(DEFINITIONS)) + "|"
    for case in cases:
        entries = " | ".join(_entry(case, definition) for definition in DEFINITIONS)
        yield f"| {case.name} | {case.dimension} | {entries} | {case.tolerance:.0e} |"


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    chosen = [c for c in CASES if (not c.slow or "--slow" in sys.argv) and all(w in c.name for w in words)]
    for row in accuracy_table(chosen):
        print(row, flush=True)
