"""Predictions against numbers worked out by hand. LINK: 1,000 bytes hold the link for 2 ms, and are there 1 ms later."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from edge_plans import LINK, chain, plan, replicas
from hypothesis import given
from hypothesis import strategies as st

from gkp.edge.forecast.predict import busy_ms, cpu_ms, device_memory, period_ms, predict
from gkp.edge.forecast.profile import plan_times
from gkp.edge.forecast.simulate import Ran, message_ms, simulate
from gkp.edge.plan.schema import COORDINATOR, Device, Link, Plan
from gkp.errors import UsageError

C = COORDINATOR


def path(p: Plan) -> float:
    return predict(p).critical_path_ms


def fork(**options: object) -> Plan:
    """Device 0 makes a and b, keeps a, sends b to device 1, which sends c back; device 0 puts a and c together."""
    return plan([(0, ["v0"], ["a", "b"], 10.0), (0, ["a"], ["d"], 5.0), (1, ["b"], ["c"], 20.0), (0, ["c", "d"], ["y"], 1.0)],
                {"v0": 1000, "a": 400, "b": 3000, "c": 1000, "d": 400, "y": 1000},
                [("v0", C, 0), ("b", 0, 1), ("c", 1, 0), ("y", 0, C)], **options)


# ---- one request ----------------------------------------------------------------------------------------------------
def test_a_message_holds_the_link_for_overhead_plus_bytes_over_bandwidth() -> None:
    assert message_ms(LINK, 1000) == pytest.approx(1 + 1)
    assert message_ms(LINK, 0) == pytest.approx(1)


def test_a_chain_is_the_sum_of_its_segments_and_messages() -> None:
    # 3 messages of 2 + 1 ms, segments of 4 and 6 ms
    assert path(chain()) == pytest.approx(3 * 3 + 4 + 6)


def test_the_critical_path_takes_the_longer_of_two_ways() -> None:
    # input 3; segment 0: 10; b: 1 + 3 + 1 = 5; segment 2: 20; c: 3; segment 3: 1; output: 3. Segment 1 (5) hides behind it.
    assert path(fork()) == pytest.approx(3 + 10 + 5 + 20 + 3 + 1 + 3)


def test_the_other_way_counts_when_it_is_longer() -> None:
    times = [10.0, 50.0, 20.0, 1.0]
    assert simulate(fork(), times).finished == (pytest.approx(3 + 10 + 50 + 1 + 3),)


def test_a_device_computes_one_segment_at_a_time() -> None:
    both = plan([(0, ["v0"], ["a"], 7.0), (0, ["v0"], ["b"], 8.0), (0, ["a", "b"], ["y"], 1.0)],
                {"v0": 1000, "a": 4, "b": 4, "y": 1000}, [("v0", C, 0), ("y", 0, C)], devices=1)
    assert path(both) == pytest.approx(3 + 7 + 8 + 1 + 3)


def test_a_sender_sends_one_message_at_a_time_and_a_receiver_takes_one_at_a_time() -> None:
    # two inputs of 2 ms one after the other: there at 3 and 5; answers at 3+4+... both to device 0
    scatter = plan([(0, ["v0"], ["a"], 4.0), (1, ["v0"], ["b"], 4.0), (2, ["a", "b"], ["y"], 1.0)],
                   {"v0": 1000, "a": 1000, "b": 1000, "y": 1000},
                   [("v0", C, 0), ("v0", C, 1), ("a", 0, 2), ("b", 1, 2), ("y", 2, C)], devices=3)
    # a: ready 7, sent 7 to 9; b: ready 9, sent 9 to 11, there 12; segment 2 ends 13; output there 16
    assert path(scatter) == pytest.approx(16)
    wide = msgspec.structs.replace(scatter, segments=[msgspec.structs.replace(s, measured_ms=4.0 if s.index else 6.0)
                                                      for s in scatter.segments])
    # now both are ready at 9: the second waits until the receiver is free at 11, is there at 14
    assert path(wide) == pytest.approx(14 + 4 + 3)


def test_a_message_whose_receiver_is_busy_lets_the_next_one_pass() -> None:
    # every device sends to both others at once: two rounds of three messages, not more
    exchange = plan([*((k, ["v0"], [f"a{k}"], 1.0) for k in range(3)),
                     *((k, [f"a{n}" for n in range(3)], [f"b{k}"], 1.0) for k in range(3))],
                    {"v0": 0, **{f"{x}{k}": 1000 for x in "ab" for k in range(3)}},
                    [(f"a{s}", s, t) for s in range(3) for t in range(3) if s != t], devices=3, output="b0")
    timeline = simulate(exchange, [1.0] * 6)
    assert max(sent.end for sent in timeline.sent) == pytest.approx(1 + 2 * 2)
    assert timeline.finished[0] == pytest.approx(1 + 2 * 2 + 1 + 1)


def test_a_shared_medium_carries_one_message_at_a_time() -> None:
    pairs = plan([(0, ["v0"], ["a"], 1.0), (1, ["v0"], ["b"], 1.0), (2, ["a"], ["c"], 1.0), (3, ["b"], ["d"], 1.0),
                  (3, ["c", "d"], ["y"], 1.0)],
                 {"v0": 0, "a": 1000, "b": 1000, "c": 0, "d": 0, "y": 0}, [("a", 0, 2), ("b", 1, 3), ("c", 2, 3)], devices=4)
    switched = simulate(pairs, [1.0] * 5).finished[0]  # a and b at once: 1 + 3, c: 1 + 1 + 1, y: 1
    assert switched == pytest.approx(1 + 3 + 1 + 2 + 1)
    shared = msgspec.structs.replace(pairs, link=msgspec.structs.replace(LINK, shared=True))
    # a from 1 to 3, b from 3 to 5; c is ready at 5 and goes at once; d is done at 7, and so is c
    assert simulate(shared, [1.0] * 5).finished[0] == pytest.approx(8)
    assert [(s.transfer, s.start, s.end) for s in simulate(shared, [1.0] * 5).sent] == [(0, 1, 3), (1, 3, 5), (2, 5, 6)]


def test_sending_overlaps_with_computing() -> None:
    timeline = simulate(fork(), [10.0, 5.0, 20.0, 1.0])
    local, sent = next(r for r in timeline.runs if r.segment == 1), next(s for s in timeline.sent if s.transfer == 1)
    assert local == Ran(0, 1, 0, 13.0, 18.0)
    assert (sent.start, sent.end, sent.arrival) == (13.0, 17.0, 18.0)


def test_a_faster_device_takes_less_time() -> None:
    devices = [Device(name="slow", speed=0.5), Device(name="fast", speed=4.0)]
    assert path(chain()) - path(msgspec.structs.replace(chain(), devices=devices)) == pytest.approx(
        (4 - 4 / 0.5) + (6 - 6 / 4))


def test_a_plan_that_waits_for_ever_is_refused() -> None:
    broken = plan([(0, ["v0"], ["a"], 1.0), (1, ["a"], ["y"], 1.0)], {"v0": 4, "a": 4, "y": 4}, [])
    with pytest.raises(UsageError, match="segment 1 on device 1 waits for a"):
        predict(broken)


# ---- many requests --------------------------------------------------------------------------------------------------
def test_the_period_of_a_chain_is_its_slowest_stage() -> None:
    assert predict(chain((4.0, 6.0))).period_ms == pytest.approx(6)


def test_the_period_is_the_busiest_direction_of_the_link_when_that_is_slower() -> None:
    # device 0 sends 10,000 bytes: 1 + 10 ms
    assert predict(chain((4.0, 6.0), size=10_000)).period_ms == pytest.approx(11)


def test_the_period_on_a_shared_medium_is_the_sum_of_all_messages() -> None:
    shared = chain((4.0, 6.0), link=msgspec.structs.replace(LINK, shared=True))
    assert predict(shared).period_ms == pytest.approx(3 * 2)
    assert busy_ms(shared, [4.0, 6.0]) == {("compute", 0): 4.0, ("compute", 1): 6.0, ("medium", 0): pytest.approx(6.0)}


def test_replicas_add_their_rates() -> None:
    # 1/20 + 1/30 requests per ms; a lone request takes 3 + 30 + 3 on the slower one
    p = predict(replicas((20.0, 30.0)))
    assert (p.period_ms, p.critical_path_ms) == (pytest.approx(12), pytest.approx(36))
    assert p.cpu_ms == pytest.approx((20 / 20 + 30 / 30) / (1 / 20 + 1 / 30))
    assert (p.bytes, p.messages) == (0, 0)


def test_replicas_end_where_the_coordinators_link_is_full() -> None:
    # 8 devices could answer every 0.5 ms, but every input holds the coordinator's link for 2 ms
    assert predict(replicas([4.0] * 8)).period_ms == pytest.approx(2)


@pytest.mark.parametrize("made", [chain(), chain((4.0, 6.0), size=10_000), fork(), replicas((20.0, 30.0)), replicas([4.0] * 8),
                                  chain(link=msgspec.structs.replace(LINK, shared=True))])
def test_requests_can_come_at_the_predicted_period_and_not_faster(made: Plan) -> None:
    times, _ = plan_times(made)
    period = period_ms(made, times)

    def late(interval: float) -> float:
        """How much longer the last of 300 requests takes than the first hundred at most."""
        finished = simulate(made, times, requests=300, interval_ms=interval).finished
        taken = [end - n * interval for n, end in enumerate(finished)]
        return max(taken[-50:]) - max(taken[:100])

    assert late(period * 1.001) < 1e-6 + 2 * period
    assert late(period * 0.9) > 10 * period


def test_requests_that_come_slowly_do_not_wait_for_each_other() -> None:
    alone = simulate(fork(), [10.0, 5.0, 20.0, 1.0]).finished[0]
    finished = simulate(fork(), [10.0, 5.0, 20.0, 1.0], requests=4, interval_ms=1000).finished
    assert [end - 1000 * n for n, end in enumerate(finished)] == [pytest.approx(alone)] * 4


# ---- the rest -------------------------------------------------------------------------------------------------------
def test_bytes_and_messages_are_those_between_devices_and_cpu_is_the_sum() -> None:
    p = predict(fork())
    assert (p.bytes, p.messages, p.cpu_ms, p.based_on) == (4000, 2, pytest.approx(36), "measured")


def test_memory_is_weights_plus_what_lies_there_at_once() -> None:
    p = fork(weights=[100, 20, 3, 7])
    held = device_memory(p, [simulate(p, [10.0, 5.0, 20.0, 1.0])])
    # device 0: after segment 0 it holds v0 (which has been read until then), a and b at the same instant
    assert held == [127 + 1000 + 400 + 3000, 3 + 3000 + 1000]
    assert predict(p).memory_bytes == held[0]
    roomy = msgspec.structs.replace(p, segments=[msgspec.structs.replace(s, working_bytes=50) for s in p.segments])
    assert predict(roomy).memory_bytes == held[0] + 50


def test_estimates_are_called_estimates() -> None:
    assert predict(chain(measured=False)).based_on == "estimated"
    mixed = chain()
    mixed = msgspec.structs.replace(mixed, segments=[mixed.segments[0], msgspec.structs.replace(mixed.segments[1], measured_ms=None)])
    assert predict(mixed).based_on == "estimated"


def test_a_segment_without_any_time_is_refused() -> None:
    p = chain()
    p = msgspec.structs.replace(p, segments=[msgspec.structs.replace(s, measured_ms=None, estimated_ms=None) for s in p.segments])
    with pytest.raises(UsageError, match="segment 0 has no time"):
        predict(p)


@given(times=st.lists(st.floats(0.01, 50), min_size=1, max_size=6), size=st.integers(0, 5000),
       rtt=st.floats(0, 0.02), shared=st.booleans())
def test_a_prediction_lies_between_the_work_of_one_device_and_everything_in_a_row(times: list[float], size: int, rtt: float,
                                                                                   shared: bool) -> None:
    link = Link(name="x", bandwidth=1e6, rtt=rtt, overhead=1e-4, shared=shared)
    p = predict(chain(times, size=size, link=link))
    row = sum(times) + (len(times) + 1) * (message_ms(link, size) + rtt / 2 * 1e3)
    assert p.critical_path_ms == pytest.approx(row)
    assert max(times) <= p.period_ms * (1 + 1e-9) <= row * (1 + 1e-9)
    assert p.cpu_ms == pytest.approx(sum(times))


@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=4), st.floats(1.0, 4.0))
def test_faster_links_and_segments_never_make_a_fork_slower(times: list[float], factor: float) -> None:
    quick = msgspec.structs.replace(fork(), link=replace_link(factor))
    slow, fast = simulate(fork(), times).finished[0], simulate(quick, [t / factor for t in times]).finished[0]
    assert fast <= slow + 1e-9


def replace_link(factor: float) -> Link:
    return msgspec.structs.replace(LINK, bandwidth=LINK.bandwidth * factor, rtt=LINK.rtt / factor, overhead=LINK.overhead / factor)


def test_times_have_to_fit_the_plan() -> None:
    with pytest.raises(UsageError, match="2 times for 4 segments"):
        simulate(fork(), [1.0, 2.0])
    assert replace(simulate(chain(), [1.0, 1.0]), runs=()).finished == (pytest.approx(11),)


# ---- processors that handle messages -----------------------------------------------------------------------------------
def test_handling_is_a_part_of_the_overhead_and_adds_nothing_between_idle_devices() -> None:
    busy = msgspec.structs.replace(LINK, cpu=LINK.overhead / 2)
    handled = msgspec.structs.replace(chain(), link=busy)
    assert simulate(handled, [1.0, 1.0]).finished == (pytest.approx(simulate(chain(), [1.0, 1.0]).finished[0]),)


def test_a_processor_that_handles_messages_computes_nothing_meanwhile() -> None:
    times = [10.0, 5.0, 20.0, 1.0]
    handled = msgspec.structs.replace(fork(), link=msgspec.structs.replace(LINK, cpu=LINK.overhead))
    alone, busy = busy_ms(fork(), times), busy_ms(handled, times)
    ends = Counter(d for t in fork().transfers for d in (t.source, t.target))
    for device, messages in ends.items():
        extra = busy.get(("compute", device), 0.0) - alone.get(("compute", device), 0.0)
        assert extra == pytest.approx(messages * LINK.overhead / 2 * 1e3)
    assert cpu_ms(handled, times) == pytest.approx(sum(times) + sum(
        n * LINK.overhead / 2 * 1e3 for d, n in ends.items() if d != COORDINATOR))
    assert simulate(handled, times).finished[0] >= simulate(fork(), times).finished[0]


def test_what_follows_a_message_takes_the_processors_time_too() -> None:
    # each of the three messages leaves 1.5 overheads of work at each end; the two segments' devices have four such ends
    link = msgspec.structs.replace(LINK, cpu=LINK.overhead * 4)
    ends, rest = 4, 1.5 * LINK.overhead * 1e3
    idle, busy = (simulate(msgspec.structs.replace(chain(), link=used), [1.0, 1.0]).finished[0] for used in (LINK, link))
    assert idle < busy <= idle + ends * rest + 1e-9


def test_a_slow_device_that_has_rested_computes_its_first_milliseconds_at_full_speed() -> None:
    slow = msgspec.structs.replace(chain((10.0, 40.0)), devices=[msgspec.structs.replace(d, speed=0.2) for d in chain().devices])
    plain, burst = (predict(slow, burst_ms=ms).critical_path_ms for ms in (0.0, 1.0))
    assert burst == pytest.approx(plain - 2 * 1.0 * (1 / 0.2 - 1)), "1 ms on each device takes 1 ms in place of 5"
    assert predict(slow, burst_ms=1e6).critical_path_ms == pytest.approx(plain - (50 + 200) * 0.8), "all at full speed"
    assert predict(chain(), burst_ms=1.0) == predict(chain()), "devices of full speed save nothing"


def test_what_a_slow_device_saves_comes_back_while_it_rests() -> None:
    slow = msgspec.structs.replace(chain((10.0,)), devices=[msgspec.structs.replace(d, speed=0.5) for d in chain((10.0,)).devices])
    took = [r.end - r.start for r in simulate(slow, [10.0], requests=3, interval_ms=11.0, burst_ms=2.0).runs]
    assert took == pytest.approx([10 - 2, 10 - 0.5 * (11 - 8), 10 - 0.5 * (11 - 8.5)]), "half of the time it rested, in milliseconds"
