"""What is shown of one request."""

from __future__ import annotations

from rich.table import Table

from gkp.edge.coordinate.trace import DeviceShare, Step, Trace, tables


def test_a_request_that_no_device_took_part_in_is_told_without_empty_tables() -> None:
    trace = Trace(plan="0" * 64, ran="coordinator", attempts=1, total_ms=7.5, shares=[], steps=[])
    assert tables(trace) == ["one request: 7.50 ms, 0 bytes moved", "computed by the coordinator"]


def test_a_request_that_moves_nothing_shows_who_computed_it() -> None:
    share = DeviceShare(device="hall", compute_ms=2.0, sent_bytes=0, sent_messages=0, received_bytes=0, received_messages=0)
    step = Step(device="hall", what="segment", name="segment_0", peer=None, bytes=None, start_ms=0.0, ms=2.0)
    hops, shares = tables(Trace(plan="0" * 64, ran="devices", attempts=1, total_ms=7.5, shares=[share], steps=[step]))
    assert hops == "one request: 7.50 ms, 0 bytes moved"
    assert isinstance(shares, Table)
    assert shares.row_count == 1
