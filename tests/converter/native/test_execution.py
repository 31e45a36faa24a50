"""The generated program: any number of threads and images gives the same, under sanitizers and on other processors too."""

from __future__ import annotations

import numpy as np
import pytest
from native_kit import grouped_plan, native_run, native_runs, qemu_run, sanitized_run, two_port_plan, two_step_plan

from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.cpu import CPUS

CPU = host_cpu()


def images(batch: int, *shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(batch).standard_normal((batch, *shape)).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("shared", [True, False])
def test_every_batch_is_computed_with_every_number_of_threads(threads: int, shared: bool) -> None:
    x = images(19, 3, 5, 7)
    whole = native_run(two_step_plan(CPU), {"x": x}, threads, shared)[0]
    np.testing.assert_allclose(whole, 3 * x + 1, rtol=1e-6, atol=1e-6)


def test_several_inputs_and_outputs() -> None:
    a, b = images(5, 40), images(6, 40)[:5]
    total, triple = native_run(two_port_plan(CPU), {"a": a, "b": b}, 2)
    np.testing.assert_allclose(total, a + b + 1, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(triple, 3 * a, rtol=1e-6)


def test_images_in_groups_are_what_they_are_alone() -> None:
    """Whatever the batch leaves for the last group, and for each thread."""
    x = images(23, 40)
    runs = [(x[:batch], threads) for threads in (1, 2, 5) for batch in (1, 2, 3, 4, 7, 23)]
    for shared in (False, True):
        found = native_runs(grouped_plan(CPU), [({"x": part}, threads) for part, threads in runs], shared)
        for (part, threads), (y,) in zip(runs, found, strict=True):
            np.testing.assert_allclose(y, 6 * part + 16, rtol=1e-5, atol=1e-5, err_msg=f"{len(part)} images, {threads} threads")


def test_without_memory_for_groups_images_are_computed_alone() -> None:
    x = images(9, 40)
    y, = native_run(grouped_plan(CPU, own=1 << 44), {"x": x}, 2)  # no address space has so much
    np.testing.assert_allclose(y, 6 * x + 16, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_the_sanitizers_find_nothing_in_groups(sanitize: str) -> None:
    x = images(17, 40)
    y, = sanitized_run(grouped_plan(CPU), {"x": x}, 3, False, sanitize)
    np.testing.assert_allclose(y, 6 * x + 16, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("threads", "batch", "shared"), [(1, 1, True), (1, 7, False), (2, 5, True), (3, 7, False), (8, 3, True)])
def test_address_and_undefined_behaviour_sanitizers_find_nothing(threads: int, batch: int, shared: bool) -> None:
    x = images(batch, 3, 5, 7)
    np.testing.assert_allclose(sanitized_run(two_step_plan(CPU), {"x": x}, threads, shared)[0], 3 * x + 1, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("threads", "batch"), [(2, 5), (4, 23), (8, 3)])
def test_the_thread_sanitizer_finds_no_race(threads: int, batch: int) -> None:
    x = images(batch, 3, 5, 7)
    np.testing.assert_allclose(sanitized_run(two_step_plan(CPU), {"x": x}, threads, 2, sanitize="thread")[0], 3 * x + 1, rtol=1e-6,
                               atol=1e-6)


def test_the_sanitizers_would_find_an_overrun() -> None:
    plan = two_step_plan(CPU)
    wrong = type(plan)(plan.cpu, plan.calls, plan.arena, plan.inputs, (type(plan.outputs[0])("y", 1, (3, 5, 6)),))
    with pytest.raises(AssertionError, match=r"AddressSanitizer[\s\S]*in kernel_1"):
        sanitized_run(wrong, {"x": images(2, 3, 5, 7)})


@pytest.mark.parametrize(("threads", "batch"), [(1, 2), (3, 4)])
def test_aarch64(threads: int, batch: int) -> None:
    x = images(batch, 3, 5, 7)
    np.testing.assert_allclose(qemu_run(two_step_plan(CPUS["aarch64"]), {"x": x}, threads)[0], 3 * x + 1, rtol=1e-6, atol=1e-6)


def test_a_processor_without_the_instructions_gets_words_not_a_signal() -> None:
    haswell = ("qemu-x86_64", "-cpu", "Haswell")
    x = images(1, 3, 5, 7)
    with pytest.raises(AssertionError, match="the kernels need AVX-512F, which this processor or operating system lacks"):
        qemu_run(two_step_plan(CPUS["x86-64-v4"]), {"x": x}, command=haswell)
    np.testing.assert_allclose(qemu_run(two_step_plan(CPUS["x86-64-v3"]), {"x": x}, command=haswell)[0], 3 * x + 1, rtol=1e-6, atol=1e-6)
