"""The file readers: equal to torch's own on honest files, and a GkpError in time on every other."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.converter.sources._records import Record
from gkp.converter.sources._torchfile import (
    attribute,
    container_kind,
    read_object_npy,
    read_pickle_file,
    read_torch,
    state_dict_of,
    submodules,
)
from gkp.errors import FileError, GkpError, UnsafeFileError, UnsupportedModelError

torch = pytest.importorskip("torch")

CHECKPOINTS = Path(__file__).resolve().parents[3] / ".." / "shared" / "checkpoints"
TMI_GKP = CHECKPOINTS / "tmi_gkp" / "resnet20_cifar10"
real_files = pytest.mark.skipif(not TMI_GKP.is_dir(), reason="the published checkpoints are not here")
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch should_not_exist",)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3)
        self.body = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1)))
        self.again = self.stem
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.in_list = torch.tensor([3, 1, 2])


def save(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        wanted = theirs.float() if theirs.dtype == torch.bfloat16 else theirs
        np.testing.assert_array_equal(ours, wanted.detach().numpy())
        assert ours.dtype == wanted.detach().numpy().dtype
        assert ours.flags.c_contiguous
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for left, right in zip(ours, theirs, strict=True):
            assert_same(left, right)
    else:
        assert ours == theirs


# --- honest files -----------------------------------------------------------------------------------------------------


@FORMATS
def test_every_tensor_type_layout_and_tie_equals_torchs(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64]
    value = {
        "types": [base.to(kind) for kind in [*kinds, torch.uint8, torch.bool]],
        "views": [base, base.transpose(0, 2), base[1, :, ::2], base[0, 1, 3], base[:0]],
        "parameter": torch.nn.Parameter(base[0]),
        "rest": [1, 2.5, "text", None, True, (1, 2), {"best": 92.35}],
    }
    loaded = read_torch(save(value, tmp_path / "file", zipped))
    assert_same(loaded, value)


@FORMATS
def test_a_pickled_module_gives_torchs_state_dict_and_plain_attributes(tmp_path: Path, zipped: bool) -> None:
    net = Net().eval()
    record = read_torch(save(net, tmp_path / "model", zipped))
    assert record.name == f"{__name__}.Net"
    assert_same(state_dict_of(record), dict(net.state_dict()))
    assert_same(attribute(record, "in_list"), net.in_list)
    assert attribute(record, "training") is False
    assert attribute(attribute(record, "stem"), "kernel_size") == (3, 3)
    assert_same(attribute(attribute(record, "stem"), "weight"), net.stem.weight)
    assert [name for name, _ in submodules(record)] == [
        *("", "stem", "body", "body.0", "body.1", "body.1.0", "again"),
    ]
    with pytest.raises(FileError, match="no attribute out_list"):
        attribute(record, "out_list")


@FORMATS
def test_optimizer_and_scheduler_states_are_read(tmp_path: Path, zipped: bool) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [80, 120])
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    value = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    loaded = read_torch(save(value, tmp_path / "checkpoint", zipped))
    assert_same(loaded["optimizer"], value["optimizer"])
    assert loaded["scheduler"]["milestones"] == {80: 1, 120: 1}


@real_files
def test_a_published_snapshot_equals_torchs_reading() -> None:
    path = TMI_GKP / "snapshots" / "epoch_35.pt"
    assert_same(read_torch(path), torch.load(path, map_location="cpu", weights_only=True))


@real_files
def test_the_published_grouped_module_is_the_baseline_regrouped() -> None:
    base, grouped = state_dict_of(read_torch(TMI_GKP / "baseline")), read_torch(TMI_GKP / "grouped")
    assert grouped.name == "group_cifar.GroupResNet"
    assert sum(value.size for name, value in base.items() if "running" not in name and "num_b" not in name) == 269_722
    for layer in (1, 2, 3):
        for index in range(3):
            block = dict(submodules(grouped))[f"layer{layer}.{index}"]
            lists = zip(attribute(block, "in_list"), attribute(block, "out_list"), strict=True)
            for number, (in_list, out_list) in enumerate(lists):
                weight = state_dict_of(block)[f"conv{number + 1}.weight"]
                dense = base[f"stage_{layer}.{index}.conv_{'ab'[number]}.weight"]
                rows, channels = np.argsort(out_list), np.asarray(in_list).reshape(8, -1)
                for row in range(len(rows)):
                    group = row // (len(rows) // 8)
                    np.testing.assert_array_equal(weight[row], dense[rows[row]][channels[group]])


def test_a_legacy_storage_view_is_a_window_of_its_storage(tmp_path: Path) -> None:
    """PyTorch before 0.4 wrote storages that were parts of another as (key, offset, size) of it."""
    path = tmp_path / "old"
    path.write_bytes(legacy_file(numel=6, view=("v", 2, 3), size=(3,), count=6))
    np.testing.assert_array_equal(read_torch(path), [2, 3, 4])
    path.write_bytes(legacy_file(numel=6, view=("v", 4, 3), size=(3,), count=6))
    with pytest.raises(FileError, match="leaves its storage"):
        read_torch(path)


def legacy_file(numel: int, view: Any, size: tuple[int, ...], count: int, system: Any = None) -> bytes:
    def fragment(value: Any) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    persistent_id = b"(" + fragment("storage") + b"ctorch\nFloatStorage\n" + fragment("0") + fragment("cpu")
    persistent_id += fragment(numel) + fragment(view) + b"tQ"
    tensor = b"\x80\x02ctorch._utils\n_rebuild_tensor\n(" + persistent_id + fragment(0) + fragment(size)
    tensor += fragment((1,)) + b"tR."
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True} if system is None else system)
    numbers = np.arange(count, dtype="<f4").tobytes()
    start = b"".join(pickle.dumps(head, 2) for head in heads)
    return start + tensor + pickle.dumps(["0"], 2) + struct.pack("<q", count) + numbers


def test_a_big_endian_archive_is_swapped(tmp_path: Path) -> None:
    value = {"w": torch.arange(4.0), "n": torch.tensor([1, -2])}
    path = rezip(
        save(value, tmp_path / "f.pt"),
        lambda name, data: {
            "byteorder": b"big",
            "data/0": np.frombuffer(data, "<f4").astype(">f4").tobytes() if name == "data/0" else data,
            "data/1": np.frombuffer(data, "<i8").astype(">i8").tobytes() if name == "data/1" else data,
        }.get(name, data),
    )
    assert_same(read_torch(path), value)


def test_block_files_and_plain_pickles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "conv1.block"
    for protocol in range(6):
        path.write_bytes(pickle.dumps([([0, 5], [1, 2, 3]), ([7], [9])], protocol))
        assert read_pickle_file(path) == [([0, 5], [1, 2, 3]), ([7], [9])]
        assert container_kind(path) == "pickle"
        assert read_torch(path) == [([0, 5], [1, 2, 3]), ([7], [9])]


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.eye(3, dtype=">f4")), np.array(2.5)]
)
def test_plain_npy_files_equal_numpys_reading(tmp_path: Path, array: Any) -> None:
    np.save(tmp_path / "a.npy", array)
    loaded = read_object_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(loaded, array)
    assert loaded.dtype == array.dtype.newbyteorder("=")
    assert loaded.flags.c_contiguous


def test_an_object_npy_of_masks_is_read(tmp_path: Path) -> None:
    masks = np.empty((2, 2), object)
    for index in np.ndindex(2, 2):
        masks[index] = [np.arange(4) > index[0], np.ones(3, bool)]
    np.save(tmp_path / "mask.npy", masks, allow_pickle=True)
    loaded = read_object_npy(tmp_path / "mask.npy")
    assert loaded.shape == (2, 2)
    np.testing.assert_array_equal(loaded[1, 0][0], [False, False, True, True])


def test_kinds_are_told_apart_by_content(tmp_path: Path) -> None:
    def kind(data: bytes) -> str:
        path = tmp_path / "model.pt"
        path.write_bytes(data)
        return container_kind(path)

    def saved(write: Any, *args: Any, **keywords: Any) -> bytes:
        buffer = io.BytesIO()
        write(*args, buffer, **keywords)
        return buffer.getvalue()

    layer = torch.nn.Conv2d(1, 1, 1).eval()
    image = torch.zeros(1, 1, 2, 2)
    npz, npy = io.BytesIO(), io.BytesIO()
    np.savez(npz, a=np.zeros(2))
    np.save(npy, np.zeros(2))
    assert kind(saved(torch.save, {})) == "torch-zip"
    assert kind(saved(torch.save, {}, _use_new_zipfile_serialization=False)) == "torch-legacy"
    assert kind(saved(torch.jit.save, torch.jit.trace(layer, image))) == "torchscript"
    assert kind(saved(torch.export.save, torch.export.export(layer, (image,)))) == "pt2"
    assert (kind(npz.getvalue()), kind(npy.getvalue())) == ("npz", "npy")
    assert kind(b"\x08\x0a\x12\x04test") == "onnx"
    assert (kind(b""), kind(b"hello")) == ("unknown", "unknown")
    with pytest.raises(FileError, match="not a torch checkpoint but unknown"):
        read_torch(tmp_path / "model.pt")


# --- hostile and damaged files ----------------------------------------------------------------------------------------


def rezip(path: Path, change: Any, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    """Rewrite an archive with member data changed and members added; names relative to its folder."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in members.items():
            target.writestr(name, change(name.partition("/")[2], data))
        for name, data in (extra or {}).items():
            target.writestr(name, data)
    return path


@FORMATS
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    for protocol in range(2, 5):
        path = tmp_path / "evil.pt"
        torch.save(
            {"w": torch.ones(1), "x": Evil()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
        )
        with pytest.raises(UnsafeFileError, match=r"(posix|nt).system"):
            read_torch(path)


def test_code_in_object_arrays_blocks_and_pickles_is_refused(tmp_path: Path) -> None:
    array = np.array([Evil()], object)
    np.save(tmp_path / "mask.npy", array, allow_pickle=True)
    (tmp_path / "a.block").write_bytes(pickle.dumps([Evil()], 0))
    for read, name in ((read_object_npy, "mask.npy"), (read_pickle_file, "a.block"), (read_torch, "a.block")):
        with pytest.raises(UnsafeFileError, match=r"(posix|nt).system"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["f/../../x", "/f/x", "f\\x", "f/C:x", "f/data.pkl", "f/DATA.pkl"])
def test_archive_names_that_leave_or_repeat_are_refused(tmp_path: Path, name: str) -> None:
    path = save({"w": torch.ones(1)}, tmp_path / "f.pt")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(UnsafeFileError, match=r"leaves the archive|twice"):
        read_torch(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("f/data.pkl", pickle.dumps({}))
        archive.writestr("f/data/0", bytes(200 << 20))
    start = time.perf_counter()
    with pytest.raises(UnsafeFileError, match="unpacks to"):
        read_torch(path)
    assert time.perf_counter() - start < 1


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "overlap.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", pickle.dumps(bytes(1000)))
        first = archive.infolist()[0]
        for number in range(3):
            twin = zipfile.ZipInfo(f"f/data/{number}")
            twin.header_offset, twin.CRC = first.header_offset, first.CRC
            twin.compress_size = twin.file_size = first.file_size
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    with pytest.raises(UnsafeFileError, match="overlap"):
        read_torch(path)


def test_encrypted_members_and_other_compressions_are_refused(tmp_path: Path) -> None:
    path = save({}, tmp_path / "f.pt")
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UnsafeFileError, match="encrypted"):
        read_torch(path)
    path = rezip(save({}, tmp_path / "g.pt"), lambda name, data: data, method=zipfile.ZIP_BZIP2)
    with pytest.raises(UnsafeFileError, match="unknown compression"):
        read_torch(path)


@pytest.mark.parametrize("change", [lambda d: b"MZ" + d, lambda d: d + b"tail", lambda d: d[:-2] + b"\x04\x00tail"])
def test_archives_that_two_readers_could_read_differently_are_refused(tmp_path: Path, change: Any) -> None:
    path = save({"w": torch.ones(3)}, tmp_path / "f.pt")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FileError):
        read_torch(path)


def test_missing_and_missized_storages_are_refused(tmp_path: Path) -> None:
    path = save({"w": torch.ones(3)}, tmp_path / "f.pt")
    with pytest.raises(FileError, match="wrong size"):
        read_torch(rezip(path, lambda name, data: data[:-4] if name == "data/0" else data))
    path = save({"w": torch.ones(3)}, tmp_path / "f.pt")
    with zipfile.ZipFile(path) as source:
        members = {
            info.filename: source.read(info) for info in source.infolist() if not info.filename.endswith("data/0")
        }
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            target.writestr(name, data)
    with pytest.raises(FileError, match="no member data/0"):
        read_torch(path)


def test_a_legacy_file_that_promises_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old"
    for numel in (2**47, 10**9, 7):
        path.write_bytes(legacy_file(numel=numel, view=None, size=(numel,), count=6))
        with pytest.raises(FileError, match=r"promises more|wrong size"):
            read_torch(path)


def test_tensor_types_without_a_numpy_twin_are_unsupported(tmp_path: Path) -> None:
    path = save(torch.ones(2, dtype=torch.complex64), tmp_path / "f.pt")
    with pytest.raises(UnsupportedModelError, match="ComplexFloatStorage"):
        read_torch(path)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(GkpError):
        read_torch(save(quantized, tmp_path / "q.pt"))


def test_a_tensor_expanded_from_one_number_is_refused(tmp_path: Path) -> None:
    path = save(torch.ones(1).expand(10**6), tmp_path / "f.pt")
    with pytest.raises(FileError, match="outside its storage"):
        read_torch(path)


@FORMATS
def test_a_file_cut_anywhere_is_a_file_error(tmp_path: Path, zipped: bool) -> None:
    path = save({"w": torch.ones(3, 4), "net": torch.nn.Linear(2, 2)}, tmp_path / "f.pt", zipped)
    data = path.read_bytes()
    for end in [*range(0, len(data), 29), len(data) - 1]:
        path.write_bytes(data[:end])
        with pytest.raises(FileError):
            read_torch(path)


def test_an_npy_file_cut_anywhere_or_with_a_lying_header_is_a_file_error(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (np.arange(6.0), np.array([None, [1]], object)):
        np.save(path, array, allow_pickle=True)
        data = path.read_bytes()
        for end in range(0, len(data), 7):
            path.write_bytes(data[:end])
            with pytest.raises(FileError):
                read_object_npy(path)
    for header in (
        "(6,)'--",
        "9" * 60,
        "'" + "-" * 60,
        "{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999,)}",
    ):
        text = header.encode().ljust(117) + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(48))
        with pytest.raises(FileError):
            read_object_npy(path)


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_damaged_bytes_give_a_result_or_a_gkp_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    zipped = data.draw(st.booleans())
    save({"w": torch.ones(2, 3), "net": torch.nn.Linear(1, 1)}, path, zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(GkpError):  # any other exception fails the test
        read_torch(path)


def test_paths_that_are_no_files_are_file_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", Path("/dev/zero")):
        for read in (read_torch, read_pickle_file, read_object_npy, container_kind):
            with pytest.raises(FileError):
                read(path)


def test_modules_that_contain_themselves_or_multiply_are_refused() -> None:
    loop = Record("net.Loop", state={"_modules": {}})
    loop.state["_modules"]["inner"] = loop
    with pytest.raises(FileError, match="contain themselves"):
        state_dict_of(loop)
    level = Record("net.Leaf", state={"_modules": {}})
    for _ in range(40):
        level = Record("net.Pair", state={"_modules": {"a": level, "b": level}})
    with pytest.raises(UnsafeFileError, match=r"asks for over .* nodes"):
        state_dict_of(level)
