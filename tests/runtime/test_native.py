"""Native libraries through ctypes: what goes in is checked, handles and libraries keep out of each other's way."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_kit import Array, scale_kernel, two_port_plan, two_step_plan

from gkp.converter.native.building import source
from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.planning.plan import Call, Place, Plan
from gkp.converter.native.program import Port
from gkp.errors import FileError, UnsafeFileError, UsageError
from gkp.runtime.native import NativeRunner

CPU = host_cpu()
OK, BAD_ARGUMENT, BUSY = 0, 1, 4


def built(plan: Plan, folder: Path, shared: bool | None = None) -> Path:
    source.write(plan, folder, shared)
    return build(folder, plan.cpu)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """[3, 5, 7] -> 3 * x + 1."""
    return built(two_step_plan(CPU), tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """[3, 5, 7] -> 11 * x + 1."""
    return built(two_step_plan(CPU, factor=10.0), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_ports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(two_port_plan(CPU), tmp_path_factory.mktemp("ports"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """[8] -> 3 * x, after half a second."""
    kernel = scale_kernel(8, 3.0)
    waiting = "#include <time.h>\n" + kernel.source.replace(
        "  (void)r, (void)data;", "  const timespec half = {0, 500000000};\n  nanosleep(&half, nullptr);")
    assert waiting.count("nanosleep") == 1
    calls = (Call(Kernel(waiting, kernel.data), Place("input", 0), None, Place("output", 0)),)
    return built(Plan(CPU, calls, 0, (Port("x", 0, (8,)),), (Port("y", 1, (8,)),)), tmp_path_factory.mktemp("slow"))


def image(batch: int = 2, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 3, 5, 7)).astype(np.float32)


def assert_is(actual: Array, expected: Array) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


# ---- inputs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [1, 2, 8])
def test_runs_any_batch_again_and_again(library: Path, threads: int) -> None:
    runner = NativeRunner(library, threads)
    assert (runner.inputs, runner.outputs) == (["x"], ["y"])
    for batch in (1, 2, 3, 17, 1):
        x = image(batch, batch)
        assert_is(runner.run({"x": x})[0], 3 * x + 1)
    runner.close()


def test_any_layout_and_float_kind_is_taken(library: Path) -> None:
    runner = NativeRunner(library, 1)
    x = image()
    big = np.zeros((4, 7, 5, 3), np.float32)
    big[::2] = x.transpose(0, 3, 2, 1)
    assert_is(runner.run({"x": big[::2].transpose(0, 3, 2, 1)})[0], 3 * x + 1)
    assert_is(runner.run({"x": x.astype(np.float64)})[0], 3 * x + 1)
    assert_is(runner.run({"x": np.asfortranarray(x)})[0], 3 * x + 1)
    runner.close()


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 12, 20, 60])
def test_inputs_may_lie_at_any_address(library: Path, offset: int) -> None:
    x = image()
    memory = np.zeros(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    shifted = memory[start:start + x.nbytes].view(np.float32) if offset % 4 == 0 else np.ndarray(
        x.shape, np.float32, memory, start)
    shifted = shifted.reshape(x.shape)
    shifted[...] = x
    runner = NativeRunner(library, 2)
    assert_is(runner.run({"x": shifted})[0], 3 * x + 1)
    runner.close()


@pytest.mark.parametrize("x", [
    np.zeros((0, 3, 5, 7), np.float32), np.zeros((3, 5, 7), np.float32), np.zeros((1, 3, 5, 8), np.float32),
    np.zeros((1, 3, 7, 5), np.float32), np.zeros((1, 105), np.float32), np.zeros((), np.float32), np.float32(1),
    np.zeros((1, 3, 5, 7), np.int32), np.zeros((1, 3, 5, 7), complex), np.zeros((1, 3, 5, 7), object),
    np.full((1, 3, 5, 7), "a"), np.zeros((1, 3, 5, 7, 1), np.float32), None])
def test_what_does_not_fit_is_a_usage_error(library: Path, x: Any) -> None:
    runner = NativeRunner(library, 1)
    with pytest.raises(UsageError) as caught:
        runner.run({"x": x})
    assert caught.value.hint
    assert_is(runner.run({"x": image()})[0], 3 * image() + 1)
    runner.close()


def test_names_and_batches_must_fit(two_ports: Path) -> None:
    runner = NativeRunner(two_ports, 2)
    a = np.arange(80, dtype=np.float32).reshape(2, 40)
    for feeds, words in (({"a": a}, "'b' is missing"), ({"a": a, "b": a[:1]}, "batch sizes"),
                         ({"a": a, "b": a, "c": a}, "no input 'c'")):
        with pytest.raises(UsageError, match=words):
            runner.run(feeds)
    total, triple = runner.run({"b": 2 * a, "a": a})
    assert_is(total, 3 * a + 1)
    assert_is(triple, 3 * a)
    runner.close()


def test_outputs_are_new_arrays(library: Path) -> None:
    runner = NativeRunner(library, 1)
    x = image()
    before = x.copy()
    first = runner.run({"x": x})[0]
    kept = first.copy()
    runner.run({"x": x + 1})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(x, before)
    runner.close()


# ---- time -----------------------------------------------------------------------------------------------------------
def test_every_step_is_timed(library: Path) -> None:
    runner = NativeRunner(library, 4)
    times = runner.profile({"x": image(50)})
    assert [(t.layer, t.kind, t.macs) for t in times] == [("first", "scale", 105), ("second", "add", 0)]
    assert all(0 < t.seconds < 1 for t in times)
    with pytest.raises(UsageError):
        runner.profile({"x": image(0)})
    runner.close()


def test_an_idle_pool_costs_no_time(library: Path) -> None:
    runner = NativeRunner(library, 4)
    runner.run({"x": image(8)})
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
    runner.close()


def test_other_python_threads_run_meanwhile(slow: Path) -> None:
    runner = NativeRunner(slow, 1)
    x, counted, done = np.ones((1, 8), np.float32), 0, threading.Event()

    def call() -> None:
        runner.run({"x": x})
        done.set()

    worker = threading.Thread(target=call)
    worker.start()
    while not done.is_set():
        counted += 1
        time.sleep(0.001)
    worker.join()
    assert counted > 10
    runner.close()


# ---- several at once ------------------------------------------------------------------------------------------------
def test_threads_may_share_a_runner(library: Path) -> None:
    runner = NativeRunner(library, 2)
    images = [image(1 + n % 5, n) for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for x, y in zip(images, pool.map(lambda x: runner.run({"x": x})[0], images), strict=True):
            assert_is(y, 3 * x + 1)
    runner.close()


def test_handles_run_side_by_side(library: Path, other: Path) -> None:
    runners = [NativeRunner(path, 1 + n % 3) for n, path in enumerate((library, other) * 4)]

    def work(n: int) -> None:
        for seed in range(50):
            x = image(1 + seed % 4, seed)
            assert_is(runners[n].run({"x": x})[0], (3 + 8 * (n % 2)) * x + 1)

    with ThreadPoolExecutor(len(runners)) as pool:
        list(pool.map(work, range(len(runners))))
    for runner in runners:
        runner.close()


def test_the_file_of_now_is_opened_whatever_was_open_before(library: Path, other: Path, tmp_path: Path) -> None:
    x, path = image(), tmp_path / "model.so"
    for closed in (True, False):
        kept = []
        for origin, factor in ((library, 3), (other, 11)) * 3:
            shutil.copy(origin, path)
            runner = NativeRunner(path, 1)
            assert_is(runner.run({"x": x})[0], factor * x + 1)
            if closed:
                runner.close()
            kept.append((runner, factor))
        for runner, factor in kept:
            if not closed:
                assert_is(runner.run({"x": x})[0], factor * x + 1)
                runner.close()


def test_a_closed_runner_says_so(library: Path) -> None:
    runner = NativeRunner(library, 2)
    runner.close()
    runner.close()
    for call in (runner.run, runner.profile):
        with pytest.raises(UsageError, match="closed"):
            call({"x": image()})


def test_a_runner_that_is_forgotten_gives_back_its_threads(library: Path) -> None:
    before = threads_of_this_process()
    for _ in range(3):
        NativeRunner(library, 5).run({"x": image()})
    assert threads_of_this_process() == before


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_forked_process_is_told_to_open_its_own(library: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    runner = NativeRunner(library, 2)
    runner.run({"x": image()})

    def child() -> None:
        try:
            runner.run({"x": image()})
        except UsageError as e:
            answers.put(e.message)
        fresh = NativeRunner(library, 2)
        answers.put(float(fresh.run({"x": np.ones((1, 3, 5, 7), np.float32)})[0].flat[0]))
        runner.close()

    process = context.Process(target=child)
    process.start()
    assert "after the fork" in answers.get(timeout=30)
    assert answers.get(timeout=30) == 4
    process.join(30)
    assert process.exitcode == 0
    runner.close()


# ---- the file -------------------------------------------------------------------------------------------------------
def test_the_bytes_that_are_opened_are_the_ones_that_were_hashed(library: Path, other: Path) -> None:
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    NativeRunner(library, 1, digest).close()
    with pytest.raises(UnsafeFileError, match="checksum"):
        NativeRunner(other, 1, digest)


def test_changing_the_file_does_not_change_what_runs(library: Path, tmp_path: Path) -> None:
    path, x = tmp_path / "model.so", image()
    shutil.copy(library, path)
    runner = NativeRunner(path, 1)
    path.write_bytes(bytes(path.stat().st_size))
    assert_is(runner.run({"x": x})[0], 3 * x + 1)
    runner.close()


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library" * 1000, None])
def test_what_is_no_native_model_is_a_file_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        NativeRunner(path, 1)
    assert caught.value.hint


def test_half_a_library_is_refused_before_the_loader_sees_it(library: Path, tmp_path: Path) -> None:
    """The loader would crash on it."""
    whole = library.read_bytes()
    (tmp_path / "model.so").write_bytes(whole[:3000])
    with pytest.raises(UnsafeFileError):
        NativeRunner(tmp_path / "model.so", 1, hashlib.sha256(whole).hexdigest())


@pytest.mark.parametrize("part", [0.03, 0.1, 0.5, 0.8, 0.999])
def test_a_library_that_was_cut_before_it_was_hashed_is_a_file_error(part: float, library: Path, tmp_path: Path) -> None:
    """Nothing but its own headers tells; the loader would end this process (SIGBUS, SIGSEGV), or open it half."""
    whole = library.read_bytes()
    cut = whole[:int(part * len(whole))]
    (tmp_path / "model.so").write_bytes(cut)
    with pytest.raises(FileError, match=rf"is cut short: {len(cut):,} bytes of at least {len(whole):,}") as caught:
        NativeRunner(tmp_path / "model.so", 1, hashlib.sha256(cut).hexdigest())
    assert caught.value.hint


def test_a_library_without_a_table_of_sections_opens(library: Path, tmp_path: Path) -> None:
    """No loader needs it, some tools remove it."""
    content = bytearray(library.read_bytes())
    content[40:48], content[60:64] = bytes(8), bytes(4)
    (tmp_path / "model.so").write_bytes(content)
    runner = NativeRunner(tmp_path / "model.so", 1)
    assert_is(runner.run({"x": image()})[0], 3 * image() + 1)
    runner.close()


def test_another_library_is_a_file_error(tmp_path: Path) -> None:
    found = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    shutil.copy(found, tmp_path / "model.so")
    with pytest.raises(FileError, match="gkp_create"):
        NativeRunner(tmp_path / "model.so", 1)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"format": 2', '"format": 1', "has format 1, this gkp reads 2"),
    ('"dtype": "float32"', '"dtype": "bfloat16"', "has arrays of bfloat16, this gkp knows float32")])
def test_a_library_that_speaks_another_language_is_a_file_error(old: str, new: str, message: str, tmp_path: Path) -> None:
    plan = two_step_plan(host_cpu())
    source.write(plan, tmp_path)
    about = tmp_path / "describe.json"
    assert old in about.read_text()
    about.write_text(about.read_text().replace(old, new))
    with pytest.raises(FileError, match=message):
        NativeRunner(build(tmp_path, plan.cpu), 1)


def test_nothing_stays_open(library: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def mapped() -> int:  # other tests have libraries of that name open
        return Path("/proc/self/maps").read_text().count("model.so")

    before, mappings = descriptors(), mapped()
    for _ in range(3):
        NativeRunner(library, 2).close()
        with pytest.raises(UnsafeFileError):
            NativeRunner(library, 1, "0" * 64)
        with pytest.raises(UsageError):
            NativeRunner(library, 0)
    assert descriptors() == before
    assert mapped() == mappings


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**31 - 1])
def test_absurd_thread_counts_are_refused(library: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        NativeRunner(library, threads)


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    path = built(replace(two_step_plan(CPU), arena=1 << 30), tmp_path)  # 1 GiB for each thread
    code = ("import resource\nfrom pathlib import Path\nfrom gkp.errors import UsageError\n"
            "from gkp.runtime.native import NativeRunner\n"
            "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
            f"try:\n    NativeRunner(Path({str(path)!r}), 64)\nexcept UsageError as e:\n    print(e.message)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "out of memory" in done.stdout, done.stderr


# ---- the C interface ------------------------------------------------------------------------------------------------
@pytest.fixture
def c(library: Path, tmp_path: Path) -> Any:
    shutil.copy(library, tmp_path / "raw.so")
    found = ctypes.CDLL(str(tmp_path / "raw.so"))
    found.gkp_last_error.restype = ctypes.c_char_p
    return found


def arrays(*pointers: int | None) -> Any:
    return (ctypes.c_void_p * len(pointers))(*pointers)


def test_bad_arguments_are_codes_and_words(c: Any) -> None:
    handle = ctypes.c_void_p()
    assert c.gkp_create(1, None) == BAD_ARGUMENT
    assert c.gkp_create(0, ctypes.byref(handle)) == BAD_ARGUMENT
    assert b"threads" in c.gkp_last_error(None)
    assert c.gkp_create(2, ctypes.byref(handle)) == OK
    assert c.gkp_last_error(handle) == b""
    x, y = np.ones(105, np.float32), np.ones(105, np.float32)
    good, seconds = (arrays(x.ctypes.data), arrays(y.ctypes.data)), (ctypes.c_double * 2)()
    long = ctypes.c_long
    for arguments, words in (((long(0), *good), b"batch"), ((long(-5), *good), b"batch"),
                             ((long(1), None, good[1]), b"NULL"),
                             ((long(1), good[0], None), b"NULL"), ((long(1), arrays(None), good[1]), b"NULL"),
                             ((long(1), good[0], arrays(None)), b"NULL"),
                             ((long(1), arrays(x.ctypes.data + 2), good[1]), b"multiple of 4")):
        assert c.gkp_run(handle, *arguments) == BAD_ARGUMENT
        assert words in c.gkp_last_error(handle)
        assert c.gkp_profile(handle, *arguments, seconds) == BAD_ARGUMENT
    assert c.gkp_profile(handle, long(1), *good, None) == BAD_ARGUMENT
    assert c.gkp_run(None, long(1), *good) == c.gkp_profile(None, long(1), *good, seconds) == BAD_ARGUMENT
    assert (y == 1).all()
    assert c.gkp_run(handle, long(1), *good) == OK
    assert (y == 4).all()
    c.gkp_destroy(handle)
    c.gkp_destroy(None)


def test_a_handle_in_use_is_busy(slow: Path, tmp_path: Path) -> None:
    shutil.copy(slow, tmp_path / "raw.so")
    found, handle = ctypes.CDLL(str(tmp_path / "raw.so")), ctypes.c_void_p()
    found.gkp_last_error.restype = ctypes.c_char_p
    x, y = np.ones(8, np.float32), np.zeros(8, np.float32)
    inputs, outputs = arrays(x.ctypes.data), arrays(y.ctypes.data)
    assert found.gkp_create(1, ctypes.byref(handle)) == OK
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(found.gkp_run, handle, ctypes.c_long(1), inputs, outputs)
        time.sleep(0.05)
        assert found.gkp_run(handle, ctypes.c_long(1), inputs, outputs) == BUSY
        assert b"in use" in found.gkp_last_error(handle)
        assert running.result() == OK
    assert (y == 3).all()
    assert found.gkp_run(handle, ctypes.c_long(1), inputs, outputs) == OK
    found.gkp_destroy(handle)


def test_the_example_program_links_it(library: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = Path(__file__).resolve().parents[2] / "examples" / "native_c" / "classify.c"
    subprocess.run([compiler, "-Wall", "-Werror", "-I", library.parent, program, library, f"-Wl,-rpath,{library.parent}", "-o",
                    "classify"], cwd=tmp_path, check=True)
    x = image(1)
    x.tofile(tmp_path / "image")
    done = subprocess.run(["./classify", "image"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"class {int(x.argmax())}, score ")
    assert subprocess.run(["./classify"], cwd=tmp_path, capture_output=True, check=False).returncode == 2
