"""The machine's own limits, measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from gkp.converter.native.building.peak import Peak
from gkp.converter.native.building.toolchain import find, host_cpu
from gkp.converter.native.kernels.cpu import BF16, FP16
from gkp.errors import BackendMissingError


@pytest.fixture(scope="module")
def peak() -> Peak:
    try:
        find()
    except BackendMissingError as e:
        pytest.skip(e.message)
    return Peak()


def test_the_peak_is_that_of_vector_units_and_does_not_depend_on_how_long_it_runs(peak: Peak) -> None:
    """A scalar loop or one that waits for its own results stays below 10; the compiler leaving work out has no limit."""
    short = long = 0.0
    for turn in range(1000):  # on a busy machine it takes some turns until both have had the core to themselves
        short, long = max(short, peak.gflops(0.0005)), max(long, peak.gflops(0.002))
        if turn >= 40 and short == pytest.approx(long, rel=0.4):
            break
    assert 10 < short < 1000
    assert short == pytest.approx(long, rel=0.4)


def test_sums_of_bytes_are_not_slower_than_multiply_adds(peak: Peak) -> None:
    integers = Peak("int8")
    floats, found = (max(p.gflops() for _ in range(40)) for p in (peak, integers))
    assert 0.7 * floats < found < 5000


@pytest.mark.skipif(BF16 not in host_cpu().instructions, reason="this processor has no bf16 that is worth having")
def test_where_bf16_is_offered_it_multiplies_faster_than_float32(peak: Peak) -> None:
    floats, pairs = (max(p.gflops() for _ in range(40)) for p in (peak, Peak("bf16")))
    assert 1.4 * floats < pairs < 5000


@pytest.mark.skipif(FP16 not in host_cpu().instructions, reason="this processor has no arithmetic in fp16")
def test_where_fp16_is_offered_it_multiplies_faster_than_float32(peak: Peak) -> None:
    floats, halves = (max(p.gflops() for _ in range(40)) for p in (peak, Peak("fp16")))
    assert 1.4 * floats < halves < 5000


def test_memory_is_slower_than_any_cache_and_faster_than_a_disk(peak: Peak) -> None:
    assert 0.5 < peak.bandwidth() < 500


def test_no_file_is_left_behind(peak: Peak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Peak().gflops() > 0
    assert list(tmp_path.iterdir()) == []
