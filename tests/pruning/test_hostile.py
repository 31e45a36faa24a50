"""What strangers' files, full disks, other processes and sudden deaths do to `gkp prune`: one line, nothing executed, nothing
lost, no memory taken that the file does not hold."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_kit import assert_refused, gkp, listing
from image_kit import pictures
from prune_kit import RESNET8, data, network, session

from gkp.converter.sources import open_model
from gkp.converter.sources._torchfile import read_pickle_file
from gkp.errors import FileError, GkpError, UnsafeFileError, UsageError
from gkp.pruning.data import DataSet, Shard, open_data
from gkp.pruning.models import checkpoint
from gkp.pruning.run_folder import open_run
from gkp.pruning.tensor_file import load_tensors, save_tensors
from gkp.pruning.training import Hooks, Recipe

ASKED = {"method": "m", "seed": 0, "settings": {}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a baseline, images, and a finished run of two epochs in `out`."""
    place = tmp_path_factory.mktemp("finished")
    checkpoint.save(place / "dense.pt", network(), RESNET8, {})
    (place / "data").mkdir()
    for name, count in (("train", 32), ("test", 20)):
        images = pictures(count)
        np.savez(place / "data" / f"cifar10_{name}.npz", x=images.x, y=images.y)
    call(place, expect=0)
    return place


@pytest.fixture
def place(tmp_path: Path, finished: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "place"))


def call(place: Path, *options: object, **expected: int) -> Any:
    return gkp("prune", "gconv-prune", "--baseline", place / "dense.pt", "--data", f"cifar10:{place / 'data'}", "-o",
               place / "out", "--epochs", 2, "-q", *options, **expected)


# ---- images ---------------------------------------------------------------------------------------------------------
def npy(header: dict[str, Any] | bytes, content: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else repr(header).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def described(shape: tuple[Any, ...], dtype: str = "|u1") -> dict[str, Any]:
    return {"descr": dtype, "fortran_order": False, "shape": shape}


IMAGES = npy(described((2, 32, 32, 3)), bytes(2 * 3072))
LABELS = npy(described((2,), "<u8"), bytes(16))
HUGE = npy(described((1 << 44,)))


def archived(folder: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Both splits with these members; images of zeros where they are not among them."""
    for split in ("train", "test"):
        with zipfile.ZipFile(folder / f"cifar10_{split}.npz", "w", compression) as archive:
            for name, content in {"x.npy": IMAGES, "y.npy": LABELS, **dict(members)}.items():
                archive.writestr(name, content)
    return folder / "cifar10_train.npz"


def opened(folder: Path) -> DataSet:
    return open_data(f"cifar10:{folder}", (3, 32, 32), read_pickle_file)


@pytest.mark.parametrize("name", ["x", "y"])
def test_a_member_without_npy_does_not_stand_in_for_the_one_that_was_checked(tmp_path: Path, name: str) -> None:
    archived(tmp_path, (name, HUGE))
    assert opened(tmp_path).test_size == 2


@pytest.mark.parametrize("member", [
    npy(b"(" * 9000), npy(b"{'descr': '''"), npy(b"-" * 9000 + b"1"), npy(described((True,)), b"1"), npy(described((-2, -3072))),
    npy(described((1 << 40, 32, 32, 3), "|V0")), HUGE, b"\x93NUMPY\x09\x00", b"",
])
def test_a_header_that_numpy_stumbles_over_is_a_damaged_file(tmp_path: Path, member: bytes) -> None:
    archived(tmp_path, ("x.npy", member))
    with pytest.raises(FileError):
        opened(tmp_path)


def test_an_archive_that_other_readers_might_read_differently_is_refused(tmp_path: Path) -> None:
    path = archived(tmp_path, compression=zipfile.ZIP_LZMA)
    with pytest.raises(UnsafeFileError, match="unknown compression"):
        opened(tmp_path)
    path = archived(tmp_path)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.find(mark) + offset] |= 1
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError, match="encrypted"):
        opened(tmp_path)


def test_labels_that_overflow_are_no_class_numbers(tmp_path: Path) -> None:
    archived(tmp_path, ("y.npy", npy(described((2,), "<u8"), struct.pack("<2Q", 0, (1 << 63) + 5))))
    with pytest.raises(FileError, match="no class numbers"):
        opened(tmp_path)


def test_images_of_more_than_a_gibibyte_are_refused_unread(tmp_path: Path) -> None:
    path = archived(tmp_path)
    content, size = path.read_bytes(), struct.pack("<I", (1 << 30) + 1)
    entry = content.find(b"PK\x01\x02")
    second, more = content.find(b"PK\x03\x04", 4), (1 << 30) + 1 - len(IMAGES)
    other = content.find(b"PK\x01\x02", entry + 4)
    with path.open("wb") as file:  # with a hole where the images would be
        file.write(content[:18] + size * 2 + content[26:second])
        file.seek(more, 1)
        file.write(content[second:entry] + content[entry:entry + 20] + size * 2 + content[entry + 28:other + 42])
        file.write(struct.pack("<I", second + more) + content[other + 46:-6] + struct.pack("<I", entry + more) + bytes(2))
    with pytest.raises(FileError, match="over 1024 MiB"):
        opened(tmp_path)


@pytest.mark.parametrize("chunk", [b"zTXtk\0\0", b"iTXtk\0\1\0\0\0", b"iCCPk\0\0"])
def test_a_bomb_in_the_text_of_a_picture_is_a_damaged_file(tmp_path: Path, chunk: bytes) -> None:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        image.new("RGB", (8, 8)).save(tmp_path / split / "only" / "0.png")
    content = (tmp_path / "val" / "only" / "0.png").read_bytes()
    chunk += zlib.compress(bytes(80 << 20))
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "val" / "only" / "0.png").write_bytes(content[:33] + whole + content[33:])
    folder = open_data(f"folder:{tmp_path}", (3, 8, 8), read_pickle_file)
    with pytest.raises(FileError, match=r"0\.png is not an image"):
        list(folder.test(1, Shard(), torch.device("cpu")))


# ---- baselines ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [[3, 20000, 20000], [3, 1 << 40, 32], [3, 0, 32], [3, -32, 32], [1, 32, 32], [3, 32.0, 32]])
def test_a_checkpoint_for_images_that_nobody_has_takes_no_memory(place: Path, shape: list[Any]) -> None:
    """Planes of that size would be allocated to count multiply-accumulates, and to export."""
    payload = torch.load(place / "dense.pt", weights_only=True)
    payload["arch"]["input_shape"] = shape
    torch.save(payload, place / "dense.pt")
    assert_refused(call(place, "--force"), 6, "architecture", "damaged")
    with pytest.raises(FileError, match="damaged"):
        open_model(place / "dense.pt")


@pytest.mark.parametrize(("mean", "std"), [(float("nan"), 1.0), (0.0, float("inf")), (0.0, 1e-320), (0.0, float("nan"))])
def test_a_normalisation_that_is_none_gives_way_to_the_usual_one(place: Path, mean: float, std: float) -> None:
    usual = torch.load(place / "out" / "baseline", weights_only=True)["meta"]
    checkpoint.save(place / "dense.pt", network(), RESNET8, {"mean": [mean] * 3, "std": [std] * 3})
    call(place, "--force", expect=0)
    meta = torch.load(place / "out" / "baseline", weights_only=True)["meta"]
    assert (meta["mean"], meta["std"]) == (usual["mean"], usual["std"])


# ---- what a run goes on from ----------------------------------------------------------------------------------------
def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        path = out / "checkpoints" / f"{name}.pt"
        payload = torch.load(path, weights_only=True)
        change(payload)
        torch.save(payload, path)

    return write


def unfinished(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        (out / "checkpoints" / "train-finetune.pt").unlink()
        changed("most_recent_checkpoint", lambda p: [p.update(epochs=1), change(p)])(out)

    return write


def noted(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(out: Path) -> None:
        setting = json.loads((out / "setting.json").read_text())
        change(setting)
        (out / "setting.json").write_text(json.dumps(setting))

    return write


@pytest.mark.parametrize("change", [
    changed("groups", lambda p: p.pop("masks")),
    changed("groups", lambda p: p.update(masks={n: m[:2] for n, m in p["masks"].items()})),
    changed("groups", lambda p: p.update(log=5)),
    changed("train-finetune", lambda p: p.pop("accuracy")),
    changed("train-finetune", lambda p: p["model"].clear()),
    unfinished(lambda p: p.update(epochs="many")),
    unfinished(lambda p: p.update(optimizer=None)),
    unfinished(lambda p: [s.update(momentum_buffer=torch.ones(3)) for s in p["optimizer"]["state"].values()]),
    unfinished(lambda p: p["kept"].update(accuracy="good")),
    unfinished(lambda p: p.update(kept=None)),
    noted(lambda s: s["results"]["baseline"].update(accuracy="good")),
])
def test_a_run_that_somebody_changed_goes_on_or_says_so_in_one_line(place: Path, change: Callable[[Path], None]) -> None:
    change(place / "out")
    outcome = call(place)
    assert_refused(outcome, 6, "begin again with --force")
    call(place, "--force", expect=0)


@pytest.mark.parametrize("change", [
    noted(lambda s: s.update(results={"baseline": 5})), noted(lambda s: s.update(results=[])), noted(lambda s: s.pop("format")),
])
def test_results_that_are_none_are_not_gone_on_from(place: Path, change: Callable[[Path], None]) -> None:
    change(place / "out")
    assert_refused(call(place, "--force"), 2, "was not written by gkp prune")


def test_a_run_of_another_form_is_named(place: Path) -> None:
    noted(lambda s: s.update(schema_version=99))(place / "out")
    assert_refused(call(place), 2, "another schema version", "--force")


@pytest.mark.parametrize("name", ["experiment.log", "checkpoints", "public", "setting.json"])
def test_links_in_the_folder_are_not_followed(place: Path, tmp_path: Path, name: str) -> None:
    target, link = tmp_path / "target", place / "out" / name
    if link.exists():
        link.rename(target)
    else:
        target.mkdir()
    link.symlink_to(target)
    before = listing(tmp_path), target.read_bytes() if target.is_file() else b""
    for options in ((), ("--force",)):
        assert_refused(call(place, *options), 2, "was not written by gkp prune")
    assert before == (listing(tmp_path), target.read_bytes() if target.is_file() else b"")


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place / "ran"),)


def test_tensor_files_execute_nothing_and_do_not_unpack(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"x": Evil(tmp_path)}, path)
    with pytest.raises(UnsafeFileError, match="more than tensors"):
        load_tensors(path)
    assert not (tmp_path / "ran").exists()
    save_tensors(path, {"x": torch.ones(3)})
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*members, ("file/data/9", bytes(1 << 20))]:
            archive.writestr(name, content)
    with pytest.raises(UnsafeFileError, match="unpacks to more"):
        load_tensors(path)


def test_whatever_is_wrong_with_a_tensor_file_it_is_one_kind_of_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "file.pt", np.random.default_rng(0)
    save_tensors(path, {"x": torch.ones(3), "y": [1, "z", None]})
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    for _ in range(300):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members:
                damaged = bytearray(content)
                if name.endswith("data.pkl"):
                    damaged[rng.integers(len(damaged))] = rng.integers(256)
                archive.writestr(name, bytes(damaged))
        with contextlib.suppress(GkpError):
            load_tensors(path)
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.")  # 16 TiB
    with pytest.raises(FileError, match="damaged archive"):
        load_tensors(path)


# ---- disks ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets how many bytes a file may have, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "left"), [(100, []), (100_000, []), (400_000, ["checkpoints/groups.pt"])])
def test_a_full_disk_is_one_line_and_nothing_is_half_written(
    place: Path, largest_file: Callable[[int], None], size: int, left: list[str]
) -> None:
    whole = torch.load(place / "out" / "finetuned", weights_only=True)["state_dict"]
    shutil.rmtree(place / "out")
    largest_file(size)
    outcome = call(place)
    largest_file(resource.RLIM_INFINITY)
    assert_refused(outcome, 6, "cannot write", "free some space")
    found = [str(p.relative_to(place / "out")) for p in (place / "out").rglob("*")]
    assert [name for name in found if name.startswith("checkpoints/")] == left
    assert not [name for name in found if Path(name).name.startswith(".")]
    call(place, expect=0)
    again = torch.load(place / "out" / "finetuned", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# ---- other processes, sudden deaths ---------------------------------------------------------------------------------
@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run in which another process is at work."""
    code = ("import sys\nfrom pathlib import Path\nfrom gkp.pruning.run_folder import open_run\n"
            f"folder = open_run(Path({str(tmp_path / 'out')!r}), {ASKED!r})\nprint('open', flush=True)\nsys.stdin.read()\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    yield tmp_path / "out"
    process.kill()
    process.communicate()


def test_two_processes_do_not_work_in_one_folder(busy: Path) -> None:
    before = listing(busy.parent)
    for force in (False, True):
        with pytest.raises(UsageError, match="another process is working"):
            open_run(busy, ASKED, force)
    assert listing(busy.parent) == before


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    folder = open_run(tmp_path, ASKED)
    folder.write("phase", {"x": 1})
    left = [tmp_path / ".grouped.abc_1234", tmp_path / "checkpoints" / ".phase.pt.0a1b2c3d", tmp_path / ".setting.json.12345678"]
    for path in left[:2]:
        path.mkdir()
        (path / "half").write_text("half")
    left[2].write_text("half")
    (tmp_path / ".mine").write_text("mine")
    before = listing(tmp_path)
    assert open_run(tmp_path, ASKED).read("phase") == {"x": 1}
    assert len(before) - len(listing(tmp_path)) == 5
    assert not any(path.exists() for path in left)
    assert (tmp_path / ".mine").exists()


def test_a_process_killed_before_it_wrote_its_settings_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / "experiment.log").touch()
    (tmp_path / ".setting.json.abcd1234").write_text("{")
    folder = open_run(tmp_path, ASKED)
    assert not folder.resumed
    assert sorted(os.listdir(tmp_path)) == ["experiment.log", "setting.json"]
    (tmp_path / "setting.json").unlink()
    folder.log("a line")  # a log with something in it is somebody's
    with pytest.raises(UsageError, match="not written by gkp prune"):
        open_run(tmp_path, ASKED)


def test_a_failure_leaves_a_folder_that_was_there_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    open_run(tmp_path / "out", ASKED).drop_if_not_begun()
    assert listing(tmp_path) == ["out"]


# ---- training that leads nowhere ------------------------------------------------------------------------------------
def test_weights_that_the_last_step_of_an_epoch_destroys_are_not_kept(tmp_path: Path) -> None:
    """The loss is that of the weights before the step: it is finite."""
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    here = session(tmp_path / "out", images=data())
    with pytest.raises(GkpError, match=r"weights are not finite numbers in epoch 1, step 1") as error:
        here.train("phase", network(), Recipe(1, 0.1), Hooks(after_step=spoil))
    assert "learning rate" in error.value.hint
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(("lr", "decay"), [(1e300, 0.0), (float("inf"), 0.0), (0.1, 1e300), (0.1, -1.0), (0.1, float("nan"))])
def test_rates_beyond_float32_are_refused(lr: float, decay: float) -> None:
    with pytest.raises(UsageError, match="cannot train"):
        Recipe(1, lr, weight_decay=decay)


@pytest.mark.parametrize("field", ["max_num_params", "max_num_ops"])
def test_a_budget_without_end_is_refused(place: Path, field: str) -> None:
    (place / "settings.json").write_text(json.dumps({field: 1e308}))
    assert_refused(call(place, "--settings", place / "settings.json", "--force"), 2, field)
