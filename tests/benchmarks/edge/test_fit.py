"""A link's alpha and beta from the times of real messages."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.benchmarks.edge import fit
from gkp.benchmarks.edge.job import Counted, Taken
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.plan.schema import COORDINATOR

ALPHA, BETA = st.floats(0.01, 20), st.floats(0.01, 500)


def taken(ms: float, compute_ms: float = 0.0) -> Taken:
    return Taken(ms=[ms * 0.9, ms, ms * 1.3], counted=Counted(shares=[], hops=[], compute_ms=compute_ms))


@given(ALPHA, BETA)
def test_a_straight_line_is_found_again(alpha: float, beta: float) -> None:
    found = fit.straight_line([(size, alpha + beta * size / 1e6) for size in fit.SIZES])
    assert found.alpha_ms == pytest.approx(alpha, rel=1e-6, abs=1e-9)
    assert found.beta_ns_per_byte == pytest.approx(beta, rel=1e-6)
    assert found.residual < 1e-6


@given(st.lists(st.floats(0.01, 1000), min_size=4, max_size=4))
def test_neither_number_is_negative_and_the_residual_is_the_worst_point(times: list[float]) -> None:
    found = fit.straight_line(list(zip(fit.SIZES, times, strict=True)))
    assert found.alpha_ms >= 0
    assert found.beta_ns_per_byte >= 0
    off = [abs((found.alpha_ms + found.beta_ns_per_byte * s / 1e6) / t - 1) for s, t in zip(fit.SIZES, times, strict=True)]
    assert found.residual == pytest.approx(max(off), rel=1e-6)


@given(ALPHA, BETA, st.none() | st.floats(0, 50))
def test_as_a_link_a_message_still_takes_alpha_and_beta(alpha: float, beta: float, rtt_ms: float | None) -> None:
    link = fit.Fitted(alpha, beta, 0.0).link("x, fitted", rtt_ms, shared=False)
    assert (link.overhead + link.rtt / 2) * 1e3 == pytest.approx(alpha)
    assert link.overhead >= 0
    assert 1e9 / link.bandwidth == pytest.approx(beta)


def test_what_the_coordinator_and_the_segments_cost_is_no_part_of_a_hop() -> None:
    hop, fixed, compute = 0.5, 3.0, 0.25
    times = {fit.chain_name(size, hops): taken(fixed + hops * hop + (hops + 1) * compute, (hops + 1) * compute)
             for size in fit.SIZES for hops in fit.HOPS}
    assert fit.hop_times(times) == [(size, pytest.approx(hop)) for size in fit.SIZES]
    assert fit.request_ms(times, hop) == pytest.approx(fixed)
    assert fit.segment_ms(times) == pytest.approx(compute)
    assert fit.segment_ms({}) is None


@given(ALPHA, st.floats(0, 50))
def test_the_answer_is_what_a_request_costs_beside_the_input(alpha: float, request_ms: float) -> None:
    link = fit.Fitted(alpha, 1.0, 0.0).link("x, fitted", 0.0, shared=False, request_ms=request_ms)
    assert link.answer is not None
    assert 0 <= link.answer <= link.overhead
    assert link.answer * 1e3 == pytest.approx(min(max(request_ms - alpha, 0), alpha))


def test_a_chain_that_failed_leaves_its_size_out() -> None:
    times = {fit.chain_name(size, hops): taken(1.0 + hops) for size in fit.SIZES for hops in fit.HOPS}
    times[fit.chain_name(fit.SIZES[1], fit.HOPS[1])] = Taken(failed="device-1 is lost")
    assert [size for size, _ in fit.hop_times(times)] == [s for s in fit.SIZES if s != fit.SIZES[1]]
    assert fit.request_ms({}, 1.0) is None


def test_the_processor_time_of_a_message_is_that_of_the_longer_chain_more_less_its_segment(tmp_path: Path) -> None:
    chains = {path.name: (path, plan) for path, plan in fit.write_chains(tmp_path, 2).items()}
    times = {fit.chain_name(fit.SIZES[0], hops): Taken(ms=[1.0], cpu_ms=2.0 + 0.7 * hops) for hops in fit.HOPS}
    assert fit.message_cpu_ms(times) is None
    times[fit.hops(chains)[0].name] = Taken(ms=[0.1], own_cpu_ms=0.2)
    assert fit.message_cpu_ms(times) == pytest.approx(0.5)
    assert fit.message_cpu_ms({}) is None


def test_what_a_message_costs_between_segments_that_use_the_caches_is_told_apart(tmp_path: Path) -> None:
    chains = {path.name: (path, plan) for path, plan in {**fit.write_chains(tmp_path, 2), **fit.write_cold_chains(tmp_path, 2)}.items()}
    times = {fit.chain_name(fit.SIZES[0], hops, cold): Taken(ms=[1.0], cpu_ms=2.0 + (4.0 if cold else 0.7) * hops)
             for hops in fit.HOPS for cold in (False, True)}
    warm, _, cold = fit.hops(chains)
    times |= {warm.name: Taken(ms=[0.1], own_cpu_ms=0.2), cold.name: Taken(ms=[3.0], own_cpu_ms=3.0)}
    assert fit.message_cpu_ms(times) == pytest.approx(0.5)
    assert fit.message_cpu_ms(times, cold=True) == pytest.approx(1.0)


def test_the_chains_are_plans_that_run_and_send_what_their_names_say(tmp_path: Path) -> None:
    for folder, plan in {**fit.write_chains(tmp_path, 3), **fit.write_cold_chains(tmp_path, 3)}.items():
        between = [t.bytes for t in plan.transfers if COORDINATOR not in (t.source, t.target)]
        assert folder.name.removesuffix("-cold") == fit.chain_name(between[0], len(between))
        assert len(set(between)) == 1
        executor = InProcessExecutor.open(plan, folder)
        sign = (-1) ** (len(between) - 1)
        assert executor.run(np.full((1, 1), 2.0, np.float32)).item() == 2.0 * sign
        assert [t.bytes for t in executor.moved] == [t.bytes for t in plan.transfers]
        executor.close()
    assert statistics.median(fit.HOPS) > 1
