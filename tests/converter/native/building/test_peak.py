"""The machine's own limits, measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from gkp.converter.native.building.peak import FP32, INT8, Peak
from gkp.converter.native.building.toolchain import find, host_cpu
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, BF16, FP16
from gkp.errors import BackendMissingError

INSTRUCTIONS = host_cpu().instructions


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
        short, long = max(short, peak.gflops(seconds=0.0005)), max(long, peak.gflops(seconds=0.002))
        if turn >= 40 and short == pytest.approx(long, rel=0.4):
            break
    assert 10 < short < 1000
    assert short == pytest.approx(long, rel=0.4)


def best(peak: Peak, units: str) -> float:
    return max(peak.gflops(units) for _ in range(40))


def test_sums_of_bytes_are_not_slower_than_multiply_adds(peak: Peak) -> None:
    floats, found = (best(peak, units) for units in (FP32, INT8))
    assert 0.7 * floats < found < 5000


@pytest.mark.skipif(BF16 not in INSTRUCTIONS, reason="this processor's bf16 is no faster than float32, or is AMX")
def test_where_bf16_is_offered_it_multiplies_faster_than_float32(peak: Peak) -> None:
    floats, pairs = (best(peak, units) for units in (FP32, BF16))
    assert 1.4 * floats < pairs < 5000


@pytest.mark.skipif(FP16 not in INSTRUCTIONS, reason="this processor has no arithmetic in fp16")
def test_where_fp16_is_offered_it_multiplies_faster_than_float32(peak: Peak) -> None:
    floats, halves = (best(peak, units) for units in (FP32, FP16))
    assert 1.4 * floats < halves < 5000


@pytest.mark.skipif(AMX_INT8 not in INSTRUCTIONS, reason="this processor has no AMX, or the kernel denies it")
def test_tiles_multiply_several_times_faster_than_vectors(peak: Peak) -> None:
    """A product of tiles is 16384 of bytes, in 16 cycles, where a vector has 64 in half a cycle: 8 times; bf16: half of that."""
    vectors = tiles = pairs = 0.0
    for turn in range(1000):  # two threads of a core share its only unit for tiles: it takes some turns to have it alone
        vectors, tiles = max(vectors, peak.gflops(INT8)), max(tiles, peak.gflops(AMX_INT8))
        if AMX_BF16 in INSTRUCTIONS:
            pairs = max(pairs, peak.gflops(AMX_BF16))
        if turn >= 40 and 6 * vectors < tiles:
            break
    assert 4 * vectors < tiles < 12 * vectors
    if AMX_BF16 in INSTRUCTIONS:
        assert 0.3 * tiles < pairs < 0.7 * tiles


def test_a_processor_has_peaks_for_its_own_units(peak: Peak) -> None:
    assert {FP32, INT8} <= set(peak.units) <= {FP32, INT8, *INSTRUCTIONS}
    assert {BF16, FP16, AMX_INT8, AMX_BF16} & set(INSTRUCTIONS) <= set(peak.units)
    for units in peak.units:
        assert peak.gflops(units) > 0


def test_memory_is_slower_than_any_cache_and_faster_than_a_disk(peak: Peak) -> None:
    assert 0.5 < peak.bandwidth() < 500


def test_no_file_is_left_behind(peak: Peak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Peak().gflops() > 0
    assert list(tmp_path.iterdir()) == []
