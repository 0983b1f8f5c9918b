"""Inputs spread over devices and over processes give the same operators, with the sums made where the data are."""

import os
import socket
import subprocess
import sys

import pytest

SETUP = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import fisherbook as fb

keys = jax.random.split(jax.random.key(0), 4)
theta = {"W": jax.random.normal(keys[0], (3, 5)), "b": jnp.ones(5), "V": jax.random.normal(keys[1], (5, 4))}
x = np.asarray(jax.random.normal(keys[2], (64, 3)))
v = jax.random.normal(keys[3], (40,))
model = lambda t, x: dist.Categorical(logits=jnp.tanh(x @ t["W"] + t["b"]) @ t["V"])
builds = (fb.dense_fisher, fb.diagonal_fisher, fb.kronecker_fisher, fb.implicit_fisher, fb.low_rank_fisher)
labels = np.arange(64) % 4
laws = (fb.Exact(), fb.MonteCarlo(jax.random.key(1), 2), fb.Data(labels))
"""

EIGHT = """
mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 8
spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
for law in laws:
    for build in builds:
        here, there = build(model, theta, jnp.asarray(x), law=law), build(model, theta, spread, law=law)
        np.testing.assert_allclose(there.diagonal(), here.diagonal(), atol=1e-12)
        np.testing.assert_allclose(there @ v, here @ v, atol=1e-12)
for device in (jax.devices()[3], jax.devices()[5]):  # one program text, another device
    at = fb.dense_fisher(model, jax.device_put(theta, device), jax.device_put(x, device)).as_matrix()
    assert at.devices() == {device}
np.testing.assert_allclose(
    fb.observed_information(model, theta, spread, law=fb.Data(labels)) @ v,
    fb.observed_information(model, theta, jnp.asarray(x), law=fb.Data(labels)) @ v, atol=1e-12)
for build in builds[:4]:
    here, there = build(model, theta, jnp.asarray(x)), build(model, theta, spread)
    np.testing.assert_allclose(there.solve(v, 0.1), here.solve(v, 0.1), atol=1e-9)
    np.testing.assert_allclose(there.logdet(0.1), here.logdet(0.1), atol=1e-10)

calls = {
    "dense": lambda t, x: fb.dense_fisher(model, t, x).as_matrix(),
    "empirical": lambda t, x: fb.dense_fisher(model, t, x, law=fb.Data(labels)).as_matrix(),
    "diagonal": lambda t, x: fb.diagonal_fisher(model, t, x).diagonal(),
    "Kronecker": lambda t, x: fb.kronecker_fisher(model, t, x) @ v,
    "implicit": lambda t, x: fb.implicit_fisher(model, t, x) @ v,
}
from fisherbook.operators import implicit, row_blocks
for cap in (row_blocks.CAP, 100):  # all rows at once; and blocks of them, of which each device has its share
    row_blocks.CAP = implicit.CAP = cap
    jax.clear_caches()
    for name, call in calls.items():
        program = jax.jit(call)
        np.testing.assert_allclose(program(theta, spread), program(theta, x), atol=1e-12)
        text = program.lower(theta, spread).compile().as_text()
        assert "all-reduce" in text, name
        assert (" while(" in text) == (cap == 100), (name, cap)  # a loop over blocks
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute")), (name, cap)
row_blocks.CAP = implicit.CAP = 2**26
inside = jax.jit(lambda t, x: fb.dense_fisher(model, t, x).as_matrix())
np.testing.assert_allclose(inside(theta, spread), fb.dense_fisher(model, theta, x).as_matrix(), atol=1e-12)
text = inside.lower(theta, spread).compile().as_text()
typed = jax.device_put(x, NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")))  # explicit axes
for call in (lambda t, x: fb.dense_fisher(model, t, x), inside):
    try:
        call(theta, typed)
    except ValueError as error:
        assert "axis_types=(jax.sharding.AxisType.Auto,)" in str(error)
    else:
        raise AssertionError("explicit axes went through")
assert "all-reduce" in text and "all-gather" not in text  # the sum travels, not the data
print("same")
"""

JOIN = """
import sys
import jax
process, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=process)
"""

TWO = """
assert jax.process_count() == 2
mesh = Mesh(np.array(jax.devices()), ("data",))
sharding = NamedSharding(mesh, PartitionSpec("data"))
spread = jax.make_array_from_process_local_data(sharding, x[32 * process : 32 * process + 32])
everywhere = NamedSharding(mesh, PartitionSpec())
for call in (
    lambda t, x: fb.dense_fisher(model, t, x).as_matrix(),
    lambda t, x: fb.diagonal_fisher(model, t, x).diagonal(),
    lambda t, x: fb.kronecker_fisher(model, t, x) @ v,
    lambda t, x: fb.implicit_fisher(model, t, x) @ v,
):
    there = jax.jit(call, out_shardings=everywhere)(theta, spread)
    np.testing.assert_allclose(there, call(theta, x), atol=1e-12)
print("same")
"""


def start(program, *args, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"  # compiled in full: the text of programs is looked at
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_eight_devices():
    process = start(SETUP + EIGHT, devices=8)
    assert process.communicate(timeout=300)[0].strip().endswith("same")


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(JOIN + SETUP + TWO, str(i), address) for i in range(2)]
    try:
        for process in processes:
            assert process.communicate(timeout=300)[0].strip().endswith("same")
    finally:
        for process in processes:
            process.kill()
