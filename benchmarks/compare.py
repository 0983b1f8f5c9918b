"""Time fisherbook beside other libraries, each in a process and, where it needs one, an environment of its own.

Usage: python benchmarks/compare.py            every task (an hour or more)
       python benchmarks/compare.py matrix     one: matrix, product, loop, diagonal, trace, training, inputs

The first run installs the other libraries into _build/peers (6 GB). What is measured replaces that task's rows in
benchmarks/results.json, from which the book's page is made. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))
import work

HOME, RESULTS = HERE.parent / "_build" / "peers", HERE / "results.json"
ENVIRONMENTS = {  # file of entries: locked requirements; "" is the environment of this process
    "ours.py": "",
    "in_jax.py": "",
    "in_laplax.py": "jax",
    "in_netket.py": "jax",
    "in_kfac_jax.py": "kfac_jax",
    "in_torch.py": "torch",
}
REPORTED = ["fisherbook", "jax", "numpy", "scipy", "optax", "laplax", "netket", "kfac-jax", "torch"]
REPORTED += ["curvlinops-for-pytorch", "nngeometry", "backpack-for-pytorch", "laplace-torch"]
LIMIT = 240  # seconds for one process
MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # arrays from 64 kB on are pages of their own, for glibc
PROCESSES, PATIENCE = 3, 80  # of each library at each task, unless they took so many seconds already


def python_of(environment: str) -> str:
    """The interpreter of an environment, installed from its lock if need be."""
    if not environment:
        return sys.executable
    lock = HERE / "peers" / f"requirements-{environment}.txt"
    folder, stamp = HOME / environment, HOME / environment / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    python = folder / "bin" / "python"
    if not stamp.exists():
        print(f"installing {lock.name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", "--require-hashes", "-r", lock], check=True)
        stamp.touch()
    return str(python)


def run(python: str, file: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    command = [python, str(HERE / "peers" / file), *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"} | more
    return subprocess.run(command, capture_output=True, timeout=LIMIT, env=environment)


def answered(python: str, file: str, *arguments: str, **more: str) -> dict:
    """What a process measured, or why nothing was: too slow, too much memory, an error."""
    try:
        done = run(python, file, *arguments, **more)
    except subprocess.TimeoutExpired:
        return {"failed": f"not within {LIMIT} s"}
    if done.returncode < 0:
        return {"failed": "out of memory" if done.returncode == -9 else f"signal {-done.returncode}"}
    if done.returncode:
        return {"failed": done.stderr.decode().strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def one(python: str, file: str, task: str, name: str, answer: Path) -> dict:
    return answered(python, file, task, name, str(answer))


def memory(python: str, file: str, task: str, name: str) -> dict:
    """MB of a later call, None where that process came to no end."""
    found = answered(python, file, task, name, **MAPPED)
    if "failed" in found:
        print(f"no memory of {name}: {found['failed']}", flush=True)
    return {"memory": found.get("memory")}


def repeated(python: str, file: str, task: str, name: str, answer: Path) -> dict:
    """The middle one of several processes: a machine has moods, and peak memory depends on how threads met."""
    start, rows = time.perf_counter(), []
    while len(rows) < PROCESSES and (not rows or time.perf_counter() - start < PATIENCE):
        rows.append(one(python, file, task, name, answer))
        if "failed" in rows[-1]:
            return rows[-1]
    return middle(rows)


def middle(rows: list[dict]) -> dict:
    """The row whose ratio (or whose time, where there is none) is the median, with the medians of the memories."""
    ordered = sorted(rows, key=lambda row: row["seconds"] / (row.get("beside") or 1))
    fields = [name for name in ("memory", "first_memory") if name in rows[0]]
    memory = {name: statistics.median_low(row[name] for row in rows) for name in fields}
    return ordered[(len(rows) - 1) // 2] | memory | {"processes": len(rows)}


def versions(python: str) -> dict[str, str]:
    names = "{d.name.lower(): d.version for d in m.distributions()}"
    code = f"import importlib.metadata as m, json; print(json.dumps({names}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    return {name: found[name] for name in REPORTED if name in found}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def measured(task: str) -> dict:
    network, answer = work.TASKS[task]
    HOME.mkdir(parents=True, exist_ok=True)
    saved = HOME / f"{task}.npy"
    np.save(saved, answer(network()))
    rows = []
    for file, environment in ENVIRONMENTS.items():
        python = python_of(environment)
        entries = run(python, file)
        if entries.returncode:
            raise RuntimeError(f"{file} does not start:\n{entries.stderr.decode()}")
        for name in [name for t, name in json.loads(entries.stdout.splitlines()[-1]) if t == task]:
            row = {"name": name} | repeated(python, file, task, name, saved)
            rows.append(row | memory(python, file, task, name) if "first_memory" in row else row)
            print(task, rows[-1], flush=True)
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": day, "machine": machine(), "rows": rows}


def main(tasks: list[str]) -> None:
    wrong = set(tasks) - set(work.TASKS)
    if wrong:
        sys.exit(f"no task {', '.join(sorted(wrong))}; there are {', '.join(work.TASKS)}")
    for task in tasks or work.TASKS:
        found = measured(task)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"tasks": {}}
        kept["tasks"][task] = found
        pythons = {environment: python_of(environment) for environment in ENVIRONMENTS.values()}
        kept["versions"] = {environment or "fisherbook": versions(python) for environment, python in pythons.items()}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
