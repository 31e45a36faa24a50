"""What a message costs depends on the network between whose segments it travels."""

from __future__ import annotations

from pathlib import Path

import cluster_kit as kit
import msgspec
import pytest

from gkp.benchmarks.edge.group import Site
from gkp.benchmarks.edge.plans import DENSE, GROUPED, SPATIAL_DENSE, Kernels, Split, Splits
from gkp.benchmarks.edge.results import LinkFit
from gkp.benchmarks.edge.suite import fitted_link
from gkp.edge.forecast.simulate import handling_ms, message_ms


def test_a_network_is_small_while_it_leaves_room_in_the_caches(tmp_path: Path) -> None:
    plan = kit.split(tmp_path / "local", "local", 2).plan
    large = msgspec.structs.replace(plan, segments=[msgspec.structs.replace(s, weights_bytes=100 << 20) for s in plan.segments])
    assert Splits(plan.devices, {"local": Split(tmp_path, plan)}).small
    assert not Splits(plan.devices, {"local": Split(tmp_path, large)}).small
    assert not Splits(plan.devices).small  # not known


@pytest.mark.parametrize("speed", [1.0, 0.2])
def test_between_segments_of_a_small_network_a_message_costs_what_it_does_in_a_row_of_them(speed: float) -> None:
    found = LinkFit(link="loopback", devices=2, emulator="", stated=None, dilation=1.0, alpha_ms=0.9, beta_ns_per_byte=1.0, rtt_ms=0.02,
                    cpu_ms=0.8, warm_cpu_ms=0.3, cpu_ns_per_byte=0.5, device_speed=speed)
    site = Site(2, None, (0, 1), speed=speed)
    warm, cold = (fitted_link(found, site, small, dilated=True) for small in (True, False))
    assert warm is not None
    assert cold is not None
    assert (sum(handling_ms(warm, 0)), sum(handling_ms(cold, 0))) == (pytest.approx(0.15), pytest.approx(0.4))  # of one end
    assert message_ms(warm, 0) < message_ms(cold, 0)
    unknown = fitted_link(msgspec.structs.replace(found, warm_cpu_ms=None), site, True, dilated=True)
    assert unknown is not None
    assert unknown.cpu == cold.cpu


@pytest.mark.parametrize(("network", "mode", "native"), [
    (DENSE, "replicas", True), (DENSE, SPATIAL_DENSE, True), (GROUPED, "local", True), (GROUPED, "spatial", True),
    (GROUPED, "replicas", False), (GROUPED, "branch", False)])
def test_many_small_segments_are_native_and_large_ones_where_nothing_is_faster(network: str, mode: str, native: bool) -> None:
    assert Kernels([DENSE, GROUPED], [DENSE]).compute(network, mode) == native
    assert not Kernels([], []).compute(network, mode)
