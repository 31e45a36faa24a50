"""plan.json: known by its bytes, refused by its version, and who answers a request in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
from cli_kit import assert_refused, gkp
from edge_plans import chain, plan, replicas

from gkp.edge.plan.schema import COORDINATOR, SCHEMA_VERSION, Plan, device_folder, read_plan, write_plan
from gkp.errors import FileError

C = COORDINATOR


# ---- the file -------------------------------------------------------------------------------------------------------
def test_a_written_plan_is_read_again_with_the_hash_of_its_bytes_on_every_device(tmp_path: Path) -> None:
    made = chain((4.0, 6.0, 2.0))
    write_plan(made, tmp_path)
    digest = hashlib.sha256((tmp_path / "plan.json").read_bytes()).hexdigest()
    for folder in (tmp_path, *(device_folder(tmp_path, k) for k in range(3))):
        assert (read_plan(folder), read_plan(folder).hash) == (made, digest)
    assert made.hash == digest
    about = [json.loads((device_folder(tmp_path, k) / "manifest.json").read_text()) for k in range(3)]
    assert about == [{"schema_version": 1, "device": k, "plan": digest} for k in range(3)]


def test_a_field_that_was_added_later_does_not_change_the_hash(tmp_path: Path) -> None:
    """As a plan looks that was written before `wire` was there: the field has a default, the file does not name it."""
    fields = msgspec.to_builtins(chain())
    del fields["wire"]
    data = json.dumps(fields).encode()
    (tmp_path / "plan.json").write_bytes(data)
    found = read_plan(tmp_path)
    assert found == chain()
    assert found.hash == hashlib.sha256(data).hexdigest() != chain().hash


def test_a_changed_plan_has_another_hash(tmp_path: Path) -> None:
    write_plan(chain(), tmp_path)
    found = read_plan(tmp_path)
    other = msgspec.structs.replace(found, model="another")
    assert other.hash == msgspec.structs.replace(chain(), model="another").hash != found.hash


@pytest.mark.parametrize("change", [{}, {"parts": []}, {"segments": None}])
def test_a_plan_of_another_version_is_refused_for_that_whatever_fields_it_has(tmp_path: Path, change: dict[str, object]) -> None:
    for version in (SCHEMA_VERSION - 1, SCHEMA_VERSION + 1):
        fields = {**msgspec.to_builtins(chain()), **change, "schema_version": version}
        (tmp_path / "plan.json").write_text(json.dumps(fields))
        with pytest.raises(FileError) as caught:
            read_plan(tmp_path)
        assert caught.value.message == (f"{tmp_path / 'plan.json'} has schema version {version}, this gkp reads "
                                        f"{SCHEMA_VERSION}")
        assert caught.value.hint == "split the model again"


def test_a_split_model_of_an_older_version_is_refused_by_the_command_in_one_line(tmp_path: Path) -> None:
    write_plan(chain(), tmp_path)
    file = tmp_path / "plan.json"
    file.write_bytes(file.read_bytes().replace(b'"schema_version": 2', b'"schema_version": 1'))
    assert_refused(gkp("edge", "keys", tmp_path, "-o", tmp_path / "keys"), 6, "schema version 1", "split the model again")


# ---- who answers ----------------------------------------------------------------------------------------------------
def two_pairs() -> Plan:
    """Devices 0 and 2 answer together, and devices 1 and 3."""
    return plan([(0, ["v0"], ["a"], 1.0), (2, ["a"], ["y"], 1.0), (1, ["v0"], ["b"], 1.0), (3, ["b"], ["y"], 1.0)],
                {"v0": 4, "a": 4, "b": 4, "y": 4},
                [("v0", C, 0), ("a", 0, 2), ("y", 2, C), ("v0", C, 1), ("b", 1, 3), ("y", 3, C)], devices=4)


@pytest.mark.parametrize(("made", "groups"), [
    (chain((1.0,)), [(0,)]), (chain((1.0, 2.0, 3.0)), [(0, 1, 2)]), (replicas([1.0, 2.0]), [(0,), (1,)]),
    (two_pairs(), [(0, 2), (1, 3)])])
def test_devices_that_hand_values_to_each_other_answer_together(made: Plan, groups: list[tuple[int, ...]]) -> None:
    assert made.replicas == groups
    assert made.busy_devices == sorted(d for group in groups for d in group)


def test_a_device_that_does_not_lead_to_the_answer_takes_no_part() -> None:
    idle = plan([(0, ["v0"], ["y"], 1.0), (1, ["v0"], ["a"], 1.0)], {"v0": 4, "a": 4, "y": 4},
                [("v0", C, 0), ("v0", C, 1), ("y", 0, C)])
    assert idle.replicas == [(0,)]
