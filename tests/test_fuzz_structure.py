"""The files that the fuzzer writes by structure: they are read far, and what they are to find is among them."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import onnx
import pytest
import torch

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.converter.sources import SOURCES, OpenOptions, SourceFile, _pickle, _torchfile, open_model
from gkp.converter.sources._constructors import CONSTRUCTORS
from gkp.converter.sources._records import Storage
from gkp.errors import FileError, GkpError, UnsafeFileError

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

import fuzz_checkpoint  # noqa: E402
import fuzz_dialect  # noqa: E402
import fuzz_mutate  # noqa: E402
import fuzz_networks  # noqa: E402
import fuzz_proto  # noqa: E402
import fuzz_safetensors  # noqa: E402
import fuzz_script  # noqa: E402
import fuzz_torch  # noqa: E402
import fuzz_zip  # noqa: E402


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(6.0), "epoch": 3}, buffer)
    return buffer.getvalue()


GENERATORS: dict[str, Callable[[Random], bytes | None]] = {
    "network": fuzz_networks.network,
    "checkpoint": fuzz_torch.checkpoint, "npy": fuzz_torch.object_array, "dialect": fuzz_dialect.script,
    "script": fuzz_script.script, "safetensors": fuzz_safetensors.safetensors, "proto": lambda rng: fuzz_proto.model(rng, "a.onnx"), "zip": lambda rng: fuzz_zip.surgery(rng, torch_zip())}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_file_follows_from_its_random_generator_alone(name: str) -> None:
    make = GENERATORS[name]
    files = [make(Random(number)) for number in range(12)]
    assert files == [make(Random(number)) for number in range(12)]
    assert len(set(files)) > 9


def test_half_of_the_runs_are_written_by_structure_and_fit_their_names() -> None:
    corpus = {"a.onnx": b"\x08\x01" * 50, "b.pt": torch_zip(), "c.json": b'{"a": [1, 2]}' * 5, "d.npy": b"\x93NUMPY" + bytes(200)}
    made = {name: [fuzz_mutate.mutate(Random(number), name, corpus) for number in range(400)] for name in corpus}
    assert 100 < sum(b"GlobalAveragePool" in data for data in made["a.onnx"]) < 300
    assert all(data[:1] != b"P" for data in made["c.json"])
    assert sum(b"'descr': '|O'" in data for data in made["d.npy"]) > 100
    kinds = {data[:2] for data in made["b.pt"]}
    assert {b"PK", b"\x80\x02", b"\x08\x08"} <= kinds


# ---- pickles -------------------------------------------------------------------------------------------------------------
class Counting(Budget):
    """A budget that says how many operations were paid for."""

    count = 0

    def objects(self, count: int = 1) -> None:
        self.count += 1
        super().objects(count)


def pickles(count: int) -> list[bytes]:
    return [fuzz_torch.pickled(rng, fuzz_checkpoint.Checkpoint(rng)) for rng in map(Random, range(count))]


def test_most_generated_pickles_are_read_to_their_end_and_the_others_are_refused_late() -> None:
    opened = late = 0
    for data in pickles(200):
        budget = Counting(len(data))
        try:
            _pickle.load_pickle(data, budget=budget)
            opened += 1
        except GkpError:
            late += budget.count > 10
    assert opened > 100
    assert late > 0.8 * (200 - opened)


def test_generated_pickles_hold_every_opcode_that_is_known() -> None:
    refused = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    elsewhere = {"PERSID"}  # its storages are text, and torch's are not
    seen = set()
    for data in pickles(300):
        with contextlib.suppress(ValueError):  # numbers of 5,000 digits
            seen |= {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert {opcode.name for opcode in pickletools.opcodes} - refused - elsewhere <= seen


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_that_is_known_is_called_with_arguments_that_it_takes(name: str) -> None:
    def is_taken(seed: int) -> bool:
        writer = fuzz_checkpoint.Checkpoint(Random(seed), outside=True)
        writer.call(name, 3)
        try:
            _pickle.load_pickle(b"".join(writer.out) + b".", lambda pid: Storage("f4", pid[4]))
        except GkpError:
            return False
        return True

    assert any(is_taken(seed) for seed in range(40))


def test_whole_checkpoints_with_storages_are_opened_too(tmp_path: Path) -> None:
    opened: dict[str, int] = {}
    path = tmp_path / "a.pt"
    for number in range(100):
        path.write_bytes(fuzz_torch.checkpoint(Random(number)))
        try:
            kind = SourceFile(path).kind
            _torchfile.read_torch(path)
            opened[kind] = opened.get(kind, 0) + 1
        except GkpError:
            pass
    assert all(opened.get(kind, 0) > 8 for kind in ("torch-zip", "torch-legacy", "pickle"))


def test_safetensors_are_opened_or_refused_at_many_places(tmp_path: Path) -> None:
    path, said = tmp_path / "a.safetensors", set()
    for number in range(300):
        path.write_bytes(fuzz_safetensors.safetensors(Random(number)))
        try:
            _torchfile.read_torch(path)
            said.add("opened")
        except GkpError as error:
            said.add(error.message)
    wanted = ("opened", "stands there twice", "impossible shape", "impossible offsets", "behind a gap", "overlaps", "contradict",
              "described by", "ends before", "cannot be read", "promises", "metadata")
    assert [words for words in wanted if not any(words in message for message in said)] == []


@pytest.mark.slow
def test_checkpoints_of_a_known_network_reach_every_source_of_pruned_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    found: dict[str, int] = {}
    for number in range(60):
        path.write_bytes(fuzz_networks.network(Random(number)))
        file = SourceFile(path)
        with contextlib.suppress(GkpError):
            source = next(source for source in SOURCES if source.matches(file)).__name__.rpartition(".")[2]
            found[source] = found.get(source, 0) + 1
    assert {"gkp_checkpoint", "tmi_gkp", "gconv_prune", "structure_lth", "dsp", "state_dict"} <= set(found)
    assert min(found.values()) > 1


BOMBS = {
    "object arrays in object arrays": lambda data: data.count(b"_reconstruct\ncnumpy\nndarray") >= 1000,
    "modules that share their children": lambda data: data.count(b"_modules}(X\x3c\0\0\0nnn") > 25,
    "tuples that share their parts": lambda data: data.count(b"t" + b"r") > 25 and data.count(b"0(j") > 25,
    "instances that share a state": lambda data: data.count(b"ca\nb\n)\x81j") >= 1000,
    "an index far beyond the memo": lambda data: data.count(b"r\xff\xff\xff\xff") > 0,
    "numbers whose hashes are equal": lambda data: data.count((2**61 - 1).to_bytes(10, "little") + b"N") > 0,
}


def test_bombs_of_every_class_are_among_the_first_thousand_pickles() -> None:
    made = pickles(1000)
    assert [name for name, is_it in BOMBS.items() if not any(map(is_it, made))] == []


# ---- archives ------------------------------------------------------------------------------------------------------------
def surgeries(count: int) -> list[bytes]:
    given = torch_zip()
    return [data for number in range(count) if (data := fuzz_zip.surgery(Random(number), given)) is not None]


def test_no_archive_that_is_opened_is_read_otherwise_by_python_or_torch(tmp_path: Path) -> None:
    opened = agreed = 0
    path = tmp_path / "a.zip"
    for data in surgeries(500):
        path.write_bytes(data)
        try:
            with Archive(path) as archive:
                ours, folder = {name: archive.read(name) for name in archive.names}, archive.folder
        except (FileError, UnsafeFileError):
            continue
        opened += 1
        prefix = f"{folder}/" if folder else ""
        with zipfile.ZipFile(path) as python:
            assert {f"{prefix}{name}": content for name, content in ours.items()} == {
                i.filename: python.read(i) for i in python.infolist()}
        try:
            reader = torch._C.PyTorchFileReader(str(path))
            names = reader.get_all_records()
        except (RuntimeError, UnicodeDecodeError):  # it refuses names that are not in one folder, or not UTF-8
            continue
        agreed += 1
        assert ours == {name: reader.get_record(name) for name in names}
    assert opened > 70
    assert agreed > 50


def test_fields_that_rename_a_member_are_among_the_surgeries_and_refused(tmp_path: Path) -> None:
    heads = [struct.pack("<BI", 1, zlib.crc32(b"archive/" + name)) for name in (b"data.pkl", b"version", b"data/0")]
    renaming = [data for data in surgeries(500) if b"\x75\x70" in data and any(head in data for head in heads)]
    for data in renaming:
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(GkpError):
            Archive(tmp_path / "a.zip")
    assert len(renaming) > 2


# ---- TorchScript's pickles -----------------------------------------------------------------------------------------------
AGREE = """
import json, sys
import numpy as np, torch
from pathlib import Path
from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.converter.sources.script.check import check_torchscript
from gkp.converter.sources.script.pickle import Device, read_script_pickle
from gkp.converter.sources._records import Record
from gkp.errors import GkpError

def same(ours, theirs):
    if isinstance(ours, Record):
        return all(same(value, getattr(theirs, name)) for name, value in ours.state.items() if name != "more")  # not declared
    if isinstance(ours, np.ndarray):
        theirs = theirs.detach().float() if theirs.dtype == torch.bfloat16 else theirs.detach()
        return np.array_equal(ours, theirs.numpy(), equal_nan=ours.dtype.kind == "f")
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, Device):
        return ours.name == str(theirs)
    return type(ours) is type(theirs) and (ours == theirs or ours != ours)

accepted, failed = 0, []
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        check_torchscript(path, Budget(path.stat().st_size))
    except GkpError:
        continue
    accepted += 1
    with Archive(path) as archive:
        root = read_script_pickle(archive, "data.pkl", lambda name: True, Budget(path.stat().st_size))
    if not same(root, torch.jit.load(str(path))):
        failed.append(path.name)
print(json.dumps([accepted, failed]))
"""


@pytest.mark.slow
def test_what_the_check_of_torchscript_accepts_torch_reads_in_the_same_way(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.pt").write_bytes(fuzz_dialect.script(Random(number)))
    done = subprocess.run([sys.executable, "-c", AGREE, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    accepted, failed = json.loads(done.stdout)
    assert accepted > 120
    assert not failed


# ---- ONNX ----------------------------------------------------------------------------------------------------------------
def test_generated_models_are_opened_or_refused_for_what_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    outcomes: list[str] = []
    for number in range(100):
        path.write_bytes(fuzz_proto.model(Random(number), path.name))
        try:
            open_model(path, OpenOptions())
            outcomes.append("opened")
        except GkpError as error:
            outcomes.append(error.message.split(":")[0])
    assert outcomes.count("opened") > 20
    assert len(set(outcomes)) > 20
    assert sum("is not an ONNX file" in outcome for outcome in outcomes) < 10


def models(count: int) -> list[onnx.ModelProto]:
    found = []
    for number in range(count):
        try:
            found.append(onnx.load_model_from_string(fuzz_proto.model(Random(number), "a.onnx")))
        except Exception:  # deeper than protobuf reads
            continue
    return found


def test_hidden_tensors_functions_and_growing_constants_are_among_the_first_models() -> None:
    made = models(300)
    attributes = [a for model in made for node in model.graph.node for a in node.attribute]
    assert any(a.HasField("t") and a.t.data_location == onnx.TensorProto.EXTERNAL for a in attributes)
    for kind in ("tensors", "sparse_tensors", "graphs", "type_protos"):
        assert any(getattr(a, kind) for a in attributes), kind
    for kind in ("g", "sparse_tensor", "tp"):
        assert any(a.HasField(kind) for a in attributes), kind
    assert any(len(model.functions) >= 25 and len(model.functions[5].node) > 1 for model in made)
    operators = {node.op_type for model in made for node in model.graph.node}
    assert {"ConstantOfShape", "Tile", "Expand", "Concat", "Range", "Pad", "Resize", "OneHot", "Gather"} <= operators
