"""What every library is given, in NumPy alone: the network, its inputs, the answers in float64, and the stopwatch.

The answers come from backpropagation written out here, so that no library is its own referee.
Parameters are in the order W0, b0, W1, b1, ..., a matrix with one row per input of the layer.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

SMALL, LARGE = (64, 32, 10), (784, 512, 256, 10)
LOOP = 20  # products in a row, as a solve by conjugate gradients takes them
SECONDS, PATIENCE, REPEATS = 4.0, 30.0, (5, 30)  # a call is repeated that long and at least and at most that often
PAUSE = 0.2  # seconds, in which threads that wait for work fall asleep


class Network(NamedTuple):
    """Weights of tanh layers that end in logits, inputs [n, features] and classes [n]."""

    weights: list[np.ndarray]
    x: np.ndarray
    y: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(b) for b in [self.x[0], *self.weights[1::2]])


def digits() -> Network:
    """The 1797 digits of 8 by 8 pixels, and a network with one layer of 32 between."""
    data = load_digits()
    return Network(weights(SMALL), (data.data / 16).astype(np.float32), data.target)


def many_digits(n: int) -> Network:
    """n of the digits, drawn with replacement, and the same network."""
    some = digits()
    rows = np.random.default_rng(3).integers(0, len(some.x), n)
    return some._replace(x=some.x[rows], y=some.y[rows])


def pixels(n: int) -> Network:
    """n of the digits, whether each is above 4, and the weights of a logistic regression on the pixels."""
    many = many_digits(n)
    return Network([np.zeros(many.x.shape[1], np.float32)], many.x, (many.y > 4).astype(np.int32))


def large(n: int) -> Network:
    """Half a million parameters, and n inputs drawn from a standard normal."""
    x = np.random.default_rng(2).standard_normal((n, LARGE[0]), np.float32)
    return Network(weights(LARGE), x, np.arange(n) % LARGE[-1])


def weights(sizes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((a, b), np.float32) / np.float32(a**0.5), np.zeros(b, np.float32))
        for a, b in itertools.pairwise(sizes)
    ]
    return [array for pair in pairs for array in pair]


def direction(network: Network) -> list[np.ndarray]:
    """A vector to multiply with."""
    rng = np.random.default_rng(1)
    return [rng.standard_normal(w.shape, np.float32) for w in network.weights]


# ------------------------------------------------------------------------------------------ answers in float64


def forward(network: Network) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Matrices W [in, out], what enters each of them [n, in], and the probabilities [n, C]."""
    ws = [w.astype(float) for w in network.weights]
    entering = [network.x.astype(float)]
    for W, b in zip(ws[:-2:2], ws[1:-2:2], strict=True):
        entering.append(np.tanh(entering[-1] @ W + b))
    z = entering[-1] @ ws[-2] + ws[-1]
    p = np.exp(z - z.max(1, keepdims=True))
    return ws[::2], entering, p / p.sum(1, keepdims=True)


def signals(network: Network) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """For each class its probability [n], and the gradients of log p at the outputs of the layers, [n, out] each."""
    Ws, entering, p = forward(network)
    for c in range(p.shape[1]):
        back = [np.eye(p.shape[1])[c] - p]
        for W, a in zip(Ws[:0:-1], entering[:0:-1], strict=True):
            back.insert(0, (back[0] @ W.T) * (1 - a**2))
        yield p[:, c], back


def rows(network: Network) -> Iterator[np.ndarray]:
    """For each class the rows sqrt(p_c) s_c, [n, d]."""
    _, entering, _ = forward(network)
    for p_c, back in signals(network):
        scores = [
            np.concatenate([(a[:, :, None] * g[:, None, :]).reshape(len(a), -1), g], 1)
            for a, g in zip(entering, back, strict=True)
        ]
        yield np.sqrt(p_c)[:, None] * np.concatenate(scores, 1)


def exact_matrix(network: Network) -> np.ndarray:
    """F = mean_n sum_c p_c s_c s_c^T, [d, d]."""
    d = sum(w.size for w in network.weights)
    return sum((R.T @ R for R in rows(network)), np.zeros((d, d))) / len(network.x)


def raw_product(network: Network) -> Callable[[], np.ndarray]:
    """R^T R in single precision; the rows are written at the first call, when no library's memory is measured."""
    R = functools.cache(lambda: np.concatenate([R.astype(np.float32) for R in rows(network)]))
    return lambda: R().T @ R()


def exact_product(network: Network, v: list[np.ndarray]) -> np.ndarray:
    """F v = mean_n sum_c p_c s_c (s_c . v), [d]."""
    _, entering, p = forward(network)
    total = [np.zeros(w.shape) for w in v]
    for p_c, back in signals(network):
        pairs = list(zip(entering, back, v[::2], v[1::2], strict=True))
        inner = sum(np.einsum("ni,ni->n", a @ V, g) + g @ b for a, g, V, b in pairs)
        for k, (a, g, _, _) in enumerate(pairs):
            weighted = (p_c * inner)[:, None] * g / len(p)
            total[2 * k] += a.T @ weighted
            total[2 * k + 1] += weighted.sum(0)
    return flat(total)


def exact_loop(network: Network) -> np.ndarray:
    """(F / 10)^LOOP v, [d]."""
    v = direction(network)
    for _ in range(LOOP):
        ends = np.cumsum([w.size for w in v])[:-1]
        v = [part.reshape(w.shape) / 10 for part, w in zip(np.split(exact_product(network, v), ends), v, strict=True)]
    return flat(v)


def exact_diagonal(network: Network) -> np.ndarray:
    """F_ii = mean_n sum_c p_c s_ci^2, [d]."""
    _, entering, p = forward(network)
    total = [np.zeros(w.shape) for w in network.weights]
    for p_c, back in signals(network):
        for k, (a, g) in enumerate(zip(entering, back, strict=True)):
            squared = p_c[:, None] * g**2 / len(p)
            total[2 * k] += (a**2).T @ squared
            total[2 * k + 1] += squared.sum(0)
    return flat(total)


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(a, float).ravel() for a in arrays])


# --------------------------------------------------------------------------------------------------- stopwatch


class Entry(NamedTuple):
    """One library at one task: the call that is timed, its result in the order above, and what it is compared with."""

    call: Callable[[], object]
    canonical: Callable[[object], np.ndarray]
    beside: Callable[[], object] | None = None  # a gradient of the same loss by the same library, or R^T R


def resident(field: str) -> float:
    """Memory of this process in MB: VmRSS now, VmHWM at most since `forget_peak`. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(call: Callable[[], object]) -> float:
    """MB that a call, not the first, holds at its worst beyond what was in use before it.

    The largest of two calls, or that of one where calls take PATIENCE or longer. In a process of its own, started with
    MALLOC_MMAP_THRESHOLD_ (`compare.MAPPED`): then what large arrays held goes back to the system at once, and no call
    finds pages that an earlier one left.
    """
    first, peaks = seconds_of(call), []
    for _ in range(2 if first < PATIENCE else 1):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        before = resident("VmRSS")
        call()
        peaks.append(resident("VmHWM") - before)
    return max(peaks)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeat(call: Callable[[], object], after: Callable[[float], None] = lambda _: None) -> list[float]:
    """Seconds of each of the calls; `after` is told them, one by one."""
    times: list[float] = []
    while sum(times) < (PATIENCE if len(times) < REPEATS[0] else SECONDS) and len(times) < REPEATS[1]:
        times.append(seconds_of(call))
        after(times[-1])
    return times


def alternate(call: Callable[[], object], beside: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of both, in turns: a machine that slows down for a while then slows down both.

    After each call, `beside` has about as long, at most 20 times. Between them is a pause, in which the threads of one
    fall asleep; while they wait for work they would take the processor from the other.
    """
    others: list[float] = []

    def fill(spent: float) -> None:
        time.sleep(PAUSE)
        found = [seconds_of(beside)]
        while sum(found) + found[-1] < spent and len(found) < 20:
            found.append(seconds_of(beside))
        others.extend(found)
        time.sleep(PAUSE)

    return repeat(call, fill), others


def measure(entry: Entry, exact: np.ndarray) -> dict[str, float | None]:
    """Medians of seconds and of the comparison's, seconds of the first call, the peak in MB with it, relative error."""
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    result = entry.call()
    first = time.perf_counter() - start
    times = repeat(entry.call)
    peak = resident("VmHWM") - before
    error = beside = None
    if exact.size:
        found = np.asarray(entry.canonical(result), float)
        error = float(np.abs(found - exact).max() / np.abs(exact).max())
    if entry.beside is not None:
        entry.beside()
        times, others = alternate(entry.call, entry.beside)
        beside = float(np.median(others))
    return dict(seconds=float(np.median(times)), first=first, first_memory=peak, error=error, beside=beside)


# ------------------------------------------------------------------------------------------------------- tasks

TASKS: dict[str, tuple[Callable[[], Network], Callable[[Network], np.ndarray]]] = {
    "matrix": (digits, lambda n: exact_matrix(n).ravel()),
    "product": (lambda: large(4096), lambda n: exact_product(n, direction(n))),
    "loop": (lambda: large(4096), exact_loop),
    "diagonal": (lambda: large(4096), exact_diagonal),
    "trace": (lambda: large(512), lambda n: exact_diagonal(n).sum()[None]),
}


# -------------------------------------------------------------------------------------------------------- race

GOAL, AT_MOST, RUNS = 0.01, 600, 5  # loss to reach, steps, timed runs


class Race(NamedTuple):
    """A run of training: each call starts anew and gives the loss before every step (or evaluation)."""

    losses: Callable[[], Iterator[float]]


def run(race: Race, exact: np.ndarray) -> dict[str, float | None]:
    """Steps to a loss of GOAL and seconds, the median of RUNS after a first one that compiles.

    `exact` is the loss at the start, by NumPy: everyone must begin there.
    """
    forget_peak()
    before, times, steps, start_loss = resident("VmRSS"), [], [], 0.0
    for _ in range(1 + RUNS):
        start, losses = time.perf_counter(), []
        for loss in race.losses():
            losses.append(loss)
            if loss < GOAL or len(losses) > AT_MOST or not np.isfinite(loss):
                break
        times.append(time.perf_counter() - start)
        steps.append(len(losses) - 1 if losses[-1] < GOAL else None)
        start_loss = losses[0]
    assert len(set(steps)) == 1, f"runs from one start took {steps} steps"
    return dict(
        seconds=float(np.median(times[1:])),
        first=times[0],
        memory=resident("VmHWM") - before,
        steps=steps[0],
        error=float(abs(start_loss - exact[0]) / exact[0]),
        beside=None,
    )


def exact_loss(network: Network) -> np.ndarray:
    p = forward(network)[2]
    return -np.log(p[np.arange(len(p)), network.y]).mean()[None]


TASKS["training"] = (digits, exact_loss)


# -------------------------------------------------------------------------------------------------- posteriors

FITTED, PRIOR = 797, 1.0  # digits that a posterior is fitted to, and the precision of its prior; 1000 are predicted


class Posterior(NamedTuple):
    """A Laplace posterior in three calls, and its answers: the evidence and the probit's probabilities [1000, C]."""

    fit: Callable[[], object]
    evidence: Callable[[object], object]
    predict: Callable[[object], object]


def fitted() -> Network:
    network = digits()
    return network._replace(x=network.x[:FITTED], y=network.y[:FITTED])


def predicted() -> np.ndarray:
    return digits().x[FITTED:]


def exact_posterior(network: Network, structure: str) -> np.ndarray:
    """log p(y) and the probit's probabilities of the digits that were not fitted, with n F + PRIOR written out."""
    theta, n = flat(network.weights), len(network.x)
    kept = slice(None) if structure != "last" else slice(len(theta) - 330, None)
    if structure == "diagonal":
        root = np.diag(np.sqrt(n * exact_diagonal(network) + PRIOR))
    else:
        root = np.linalg.cholesky(n * exact_matrix(network)[kept, kept] + PRIOR * np.eye(len(theta[kept])))
    _, _, p = forward(network)
    evidence = np.log(p[np.arange(n), network.y]).sum() - PRIOR * theta[kept] @ theta[kept] / 2
    evidence += len(theta[kept]) * np.log(PRIOR) / 2 - np.log(np.diag(root)).sum()
    new = network._replace(x=predicted())
    Ws, entering, _ = forward(new)
    z = entering[-1] @ Ws[-1] + network.weights[-1]
    for c in range(z.shape[1]):
        back = [np.tile(np.eye(z.shape[1])[c], (len(z), 1))]
        for W, a in zip(Ws[:0:-1], entering[:0:-1], strict=True):
            back.insert(0, (back[0] @ W.T) * (1 - a**2))
        pairs = zip(entering, back, strict=True)
        parts = [part for a, g in pairs for part in ((a[:, :, None] * g[:, None, :]).reshape(len(a), -1), g)]
        J = np.concatenate(parts, 1)[:, kept]
        variance = np.sum(np.linalg.solve(root, J.T) ** 2, 0)
        z[:, c] /= np.sqrt(1 + np.pi / 8 * variance)
    q = np.exp(z - z.max(1, keepdims=True))
    return np.append(evidence, q / q.sum(1, keepdims=True))


def time_posterior(entry: Posterior, exact: np.ndarray) -> dict[str, float | None]:
    """Median seconds of the three calls and of their sum, peak MB, and the larger error of evidence and probability."""
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    posterior = entry.fit()
    evidence, probabilities = entry.evidence(posterior), entry.predict(posterior)
    first = time.perf_counter() - start
    parts = {
        "fit": repeat(entry.fit),
        "evidence": repeat(lambda: entry.evidence(posterior)),
        "predict": repeat(lambda: entry.predict(posterior)),
    }
    medians = {name: float(np.median(times)) for name, times in parts.items()}
    peak, error = resident("VmHWM") - before, None
    if exact.size:
        off = np.abs(np.asarray(probabilities, float).ravel() - exact[1:]).max()
        error = float(max(abs(float(evidence) - exact[0]) / abs(exact[0]), off))
    return dict(seconds=sum(medians.values()), first=first, memory=peak, error=error, beside=None, **medians)


for structure in ("full", "diagonal", "last"):
    TASKS[f"laplace_{structure}"] = (fitted, functools.partial(exact_posterior, structure=structure))
TASKS["laplace_kronecker"] = (fitted, lambda _: np.zeros(0))  # every library has its own: biases, averages


TASKS["inputs"] = (digits, lambda _: np.zeros(0))  # as many inputs as an entry says: nothing to compare with


def main(entries: dict[tuple[str, str], Callable[[Network], Entry | Race | Posterior]]) -> None:
    """Run `python FILE TASK NAME ANSWER`, in a process of its own, and print what was measured; alone, the names.

    `python FILE TASK NAME` prints the memory of a later call.
    """
    if len(sys.argv) == 1:
        print(json.dumps(list(entries)))
        return
    task, name, *answer = sys.argv[1:]
    network = TASKS[task][0]()
    entry = entries[task, name](network)
    if not answer:
        assert isinstance(entry, Entry)
        print(json.dumps({"memory": peak_of(entry.call)}))
        return
    exact = np.load(answer[0])
    if task == "matrix":
        entry = entry._replace(beside=raw_product(network))
    stopwatch = {Race: run, Posterior: time_posterior}.get(type(entry), measure)
    print(json.dumps(stopwatch(entry, exact)))
