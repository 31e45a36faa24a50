"""Devices and links: numbers, names and devices.yaml, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkp.edge.plan.devices import ANSWER, CPU, OVERHEAD, parse_devices, parse_link
from gkp.errors import FileError, GkpError, UsageError

KITCHEN = '{name: kitchen, speed: 0.12, memory: 2G, address: "192.0.2.20:7000"}'


def inventory(folder: Path, *entries: str, text: str | None = None) -> str:
    path = folder / "devices.yaml"
    path.write_text(text if text is not None else "devices:\n" + "".join(f"  - {entry}\n" for entry in entries))
    return str(path)


# ---- devices --------------------------------------------------------------------------------------------------------
def test_a_number_makes_equal_devices_without_limits() -> None:
    devices = parse_devices("3")
    assert [(d.name, d.speed, d.memory_bytes, d.address) for d in devices] == [(f"device-{k}", 1.0, None, None) for k in range(3)]
    assert len(parse_devices("256")) == 256


@pytest.mark.parametrize("text", ["0", "-1", "257", "99999999999999999999"])
def test_a_number_of_devices_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of devices") as e:
        parse_devices(text)
    assert "from 1 to 256" in e.value.hint


def test_an_inventory_says_names_speeds_memory_and_addresses(tmp_path: Path) -> None:
    path = inventory(tmp_path, KITCHEN, "{name: hall, memory: 1048576}", '{name: six, address: "[2001:db8::1]:7000"}')
    kitchen, hall, six = parse_devices(path)
    assert (kitchen.name, kitchen.speed, kitchen.memory_bytes, kitchen.address) == ("kitchen", 0.12, 2 << 30, "192.0.2.20:7000")
    assert (hall.speed, hall.memory_bytes, hall.address) == (1.0, 1 << 20, None)
    assert six.memory_bytes is None
    assert parse_devices(inventory(tmp_path, "{name: a, memory: 1.5 GiB}"))[0].memory_bytes == 3 << 29
    assert six.address == "[2001:db8::1]:7000"


@pytest.mark.parametrize(("entry", "words"), [
    ("{name: a, speed: 0}", "speed 0"), ("{name: a, speed: -1}", "speed"), ("{name: a, speed: .nan}", "speed nan"),
    ("{name: a, speed: .inf}", "speed inf"), ("{name: a, speed: fast}", "speed"), ("{name: ''}", "not a name"),
    ("{name: ../a}", "not a name"), ("{name: 'a b'}", "not a name"), ("{speed: 1}", "name"), ("{name: a, memory: 0}", "memory"),
    ("{name: a, memory: lots}", "memory"), ("{name: a, memory: 2X}", "memory"), ("{name: a, address: host}", "HOST:PORT"),
    ("{name: a, address: 'host:70000'}", "HOST:PORT"), ("{name: a, address: 'http://h:1'}", "HOST:PORT"),
    ("{name: a, cores: 4}", "cores"), ("just words", "devices"),
])
def test_an_entry_that_makes_no_sense_is_refused(tmp_path: Path, entry: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_devices(inventory(tmp_path, entry))


def test_two_devices_of_one_name_or_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the name kitchen"):
        parse_devices(inventory(tmp_path, KITCHEN, "{name: kitchen}"))
    with pytest.raises(UsageError, match=r"the address 192\.0\.2\.20:7000"):
        parse_devices(inventory(tmp_path, KITCHEN, KITCHEN.replace("kitchen", "hall")))


@pytest.mark.parametrize(("text", "error"), [
    ("", UsageError), ("devices: []\n", UsageError), ("devices: {a: 1}\n", UsageError), ("[1, 2]\n", UsageError),
    ("devices: [\n", FileError), ("\x00\x01", FileError), ("a: &x [1]\nb: *x\n", FileError),
    ("devices: !!python/object/apply:os.system ['true']\n", FileError), ("x: '" + "y" * 300_000 + "'\n", FileError),
    ("devices:\n" + "  - {name: a}\n" * 300, UsageError), ("[" * 5000, FileError), ("[" * 200_000, FileError),
])
def test_a_file_that_is_no_inventory_is_refused(tmp_path: Path, text: str, error: type[GkpError]) -> None:
    with pytest.raises(error):
        parse_devices(inventory(tmp_path, text=text))


def test_a_missing_file_says_what_could_be_given(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file") as e:
        parse_devices(str(tmp_path / "nothing.yaml"))
    assert "a number of devices" in e.value.hint


# ---- links ----------------------------------------------------------------------------------------------------------
def test_links_by_name() -> None:
    gbe, wifi, loopback = (parse_link(name) for name in ("1gbe", "WiFi", "loopback"))
    assert (gbe.bandwidth, gbe.rtt, gbe.shared) == (117e6, 2e-4, False)
    assert (wifi.bandwidth, wifi.rtt, wifi.shared) == (6.25e6, 3e-3, True)
    assert loopback.bandwidth > gbe.bandwidth


def test_a_message_costs_the_same_software_on_every_link() -> None:
    links = [parse_link(text) for text in ("1gbe", "wifi", "loopback", "100mbit,2ms")]
    assert {(link.overhead, link.cpu, link.answer) for link in links} == {(OVERHEAD, CPU, ANSWER)}
    assert 0 < ANSWER <= OVERHEAD <= CPU  # what follows a message costs processors too


@pytest.mark.parametrize(("text", "bandwidth", "rtt", "shared"), [
    ("100mbit,2ms", 12.5e6, 2e-3, False), ("1gbit, 200us", 125e6, 2e-4, False), ("12MB,0.5ms", 12e6, 5e-4, False),
    ("2.5Gbit/s,0ms", 312.5e6, 0, False), ("800kbit,1s,shared", 1e5, 1, True), ("10Mb,1ms", 1.25e6, 1e-3, False),
    ("10MB/s,1ms", 1e7, 1e-3, False)])
def test_links_in_numbers(text: str, bandwidth: float, rtt: float, shared: bool) -> None:
    link = parse_link(text)
    assert (link.bandwidth, link.rtt, link.shared) == (pytest.approx(bandwidth), pytest.approx(rtt), shared)


@pytest.mark.parametrize("text", ["", "2gbe", "100mbit", "100,2ms", "0mbit,2ms", "100mbit,2", "100mbit,-2ms", "nan,2ms",
                                  "100mbit,2ms,loud", "100mbit,2ms,shared,x", "1e9mbit,2ms", "100mbit,90s"])
def test_a_link_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--link"):
        parse_link(text)
