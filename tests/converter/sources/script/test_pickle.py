"""Pickles of TorchScript archives: what torch writes is read as torch reads it, and what the two could read differently is not."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.converter.sources._records import Record
from gkp.converter.sources.script.pickle import Device, ScriptDict, ScriptList, read_script_pickle
from gkp.errors import FileError, UnsafeFileError

torch = pytest.importorskip("torch")

DSP = Path(__file__).resolve().parents[4] / ".." / "shared" / "checkpoints" / "dsp" / "resnet20_g4.pt"
NET, OTHER = "__torch__.Net", "__torch__.Other"


class Everything(torch.nn.Module):
    """An attribute of each kind that torch's pickler knows, and some that share what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 1)
        self.tied = self.conv.weight
        self.ints, self.floats, self.flags, self.words = [1, 300, -5, 2**40], [0.5, float("inf")], [True, False], ["a", "ä"]
        self.nested = [["a"], ["b", "c"]]
        self.table = {"a": 1, "b": 2**33}
        self.numbered = {1: 0.5}
        self.tensors = [torch.ones(2), torch.zeros(0)]
        self.mixed = (1, 2.0, "x", None)
        self.where = torch.device("cpu")
        self.z = 1 + 2j
        self.none: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.tensor([[1.0]]) * self.ints[0]


def read(path: Path, member: str = "data.pkl", names: Callable[[str], bool] = lambda name: True) -> Any:
    with Archive(path) as archive:
        return read_script_pickle(archive, member, names, Budget(path.stat().st_size))


def archive(path: Path, data: bytes, **storages: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", data)
        for name, content in storages.items():
            file.writestr(f"m/data/{name[1:]}", content)
    return path


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert np.array_equal(ours, theirs.detach().numpy())
        assert ours.dtype == theirs.detach().numpy().dtype
    elif isinstance(theirs, torch.device):
        assert ours == Device(str(theirs))
    elif isinstance(ours, (list, tuple)):
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


# --- what torch writes ------------------------------------------------------------------------------------------------


def test_every_kind_of_attribute_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(Everything()), path)
    ours, theirs = read(path), torch.jit.load(path)
    assert isinstance(ours, Record)
    assert ours.name.endswith("Everything")
    for name in ("ints", "floats", "flags", "words", "nested", "table", "numbered", "tensors", "mixed", "where", "z", "none"):
        assert_same(ours.state[name], getattr(theirs, name))
    conv = ours.state["conv"]
    assert_same(conv.state["weight"], theirs.conv.weight)
    assert ours.state["tied"] is conv.state["weight"]
    assert read(path, "constants.pkl") == ()


def test_containers_carry_the_types_that_torch_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(torch.jit.script(Everything()), path)
    state = read(path).state
    expected = {"ints": "List[int]", "floats": "List[float]", "flags": "List[bool]", "words": "List[str]",
                "nested": "List[List[str]]", "table": "Dict[str, int]", "numbered": "Dict[int, float]",
                "tensors": "List[Tensor]"}
    assert {name: state[name].tag for name in expected} == expected
    assert state["nested"][1].tag == "List[str]"


def test_constants_of_a_frozen_module_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    module = torch.jit.freeze(torch.jit.script(Everything().eval()))
    torch.jit.save(module, path)
    constants = read(path, "constants.pkl")
    assert sum(isinstance(value, np.ndarray) for value in constants) >= 2


@pytest.mark.skipif(not DSP.is_file(), reason="the published checkpoints are not here")
def test_a_published_model_is_read_as_torch_reads_it() -> None:
    ours, theirs = read(DSP), torch.jit.load(DSP, map_location="cpu")
    parameters = dict(theirs.named_parameters()) | dict(theirs.named_buffers())

    def compare(record: Record, prefix: str) -> int:
        count = 0
        for name, value in record.state.items():
            if isinstance(value, Record):
                count += compare(value, f"{prefix}{name}.")
            elif isinstance(value, np.ndarray):
                assert_same(value, parameters[f"{prefix}{name}"])
                count += 1
        return count

    assert compare(ours, "") == len(parameters) > 100


# --- what only an attacker writes -------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return b"c%s\n%s\n" % (module.encode(), attribute.encode())


def net(*attributes: tuple[str, bytes]) -> bytes:
    """An object of the class Net."""
    return name(NET) + b")\x81}(" + b"".join(text(key) + value for key, value in attributes) + b"ub"


def whole(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


STORAGE = b"(" + text("storage") + name("torch.FloatStorage") + text("0") + text("cpu") + b"K\x02tQ"
HOOKS = name("collections.OrderedDict") + b")R"


def tensor(offset: bytes = b"K\0", size: bytes = b"K\x02", stride: bytes = b"K\x01", grad: bytes = b"\x89",
           hooks: bytes = HOOKS, more: bytes = b"", storage: bytes = STORAGE) -> bytes:
    arguments = storage + offset + b"(" + size + b"t(" + stride + b"t" + grad + hooks + more
    return name("torch._utils._rebuild_tensor_v2") + b"(" + arguments + b"tR"


def test_the_pieces_of_these_tests_are_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", whole(net(("x", tensor()), ("n", b"K\x05"))), _0=struct.pack("<2f", 1, 2))
    record = read(path)
    assert record.name == NET
    assert record.state["x"].tolist() == [1, 2]
    assert record.state["n"] == 5


INTS = name("torch.jit._pickle.build_intlist")
TAG = name("torch.jit._pickle.restore_type_tag")
HOSTILE = {
    "another protocol": (b"\x80\x04N.", "is not of protocol 2"),
    "no protocol": (b"N.", "is not of protocol 2"),
    "two protocols": (b"\x80\x02\x80\x02N.", "is not of protocol 2"),
    "something behind the end": (whole(b"N") + b"N.", "goes on after its end"),
    "DUP": (whole(b"N2\x86"), "the opcode DUP"),
    "POP": (whole(b"NN0"), "the opcode POP"),
    "LIST": (whole(b"(l"), "the opcode LIST"),
    "DICT": (whole(b"(d"), "the opcode DICT"),
    "APPEND": (whole(b"]Na"), "the opcode APPEND"),
    "SETITEM": (whole(b"}K\1K\1s"), "the opcode SETITEM"),
    "MEMOIZE": (whole(b"N\x94"), "the opcode MEMOIZE"),
    "LONG4": (whole(b"\x8b\1\0\0\0\1"), "the opcode LONG4"),
    "bytes": (whole(b"U\1a"), "the opcode SHORT_BINSTRING"),
    "a short LONG1": (whole(b"\x8a\1\5"), "not of 64 bits"),
    "a long LONG1": (whole(b"\x8a\x09" + bytes(8) + b"\1"), "not of 64 bits"),
    "a large number in the memo": (whole(b"Nr\xff\xff\xff\x7f"), "remembers a value as number 2147483647"),
    "two states": (whole(net(("a", b"N"))[:-1] + b"b}b"), "a second state"),
    "two states through the memo": (whole(b"(" + name(NET) + b")\x81q\0}b" + b"h\0}bt"), "an object without state"),
    "an object without state": (whole(name(NET) + b")\x81"), "holds a unbuilt"),
    "an object in itself": (whole(name(NET) + b")\x81q\0}(" + text("me") + b"h\0ub"), "an object without state"),
    "a state that is shared": (whole(b"(" + name(NET) + b")\x81}(uq\0b" + b"h\0t"), "a dict of its own"),
    "a state with a type": (whole(name(NET) + b")\x81" + TAG + b"}" + text("Dict[str, int]") + b"\x86Rb"), "a dict of its own"),
    "a state that is no dict": (whole(name(NET) + b")\x81Nb"), "a dict of its own"),
    "an attribute that is a number": (whole(name(NET) + b")\x81}(K\1K\1ub"), "by something other than text"),
    "an attribute twice": (whole(net(("a", b"N"), ("a", b"N"))), "sets an item twice"),
    "arguments for an object": (whole(name(NET) + b"N\x85\x81}b"), "other than an object"),
    "a class that is called": (whole(name(NET) + b")R"), "other than a function"),
    "a number that is called": (whole(b"K\0)R"), "other than a function"),
    "a function as a class": (whole(name("collections.OrderedDict") + b")\x81}b"), "other than an object"),
    "a class as a value": (whole(name(NET)), "holds a name"),
    "a class in a tuple": (whole(name(NET) + b"\x85"), "holds a name"),
    "a storage as a value": (whole(b"]" + b"(" + STORAGE + b"e"), "holds a storage"),
    "a storage twice": (whole(STORAGE + STORAGE + b"\x86"), "describes the storage 0 twice"),
    "a storage of more": (whole(STORAGE[:-2] + b"NtQ"), "other than a storage"),
    "a list in itself": (whole(b"]q\0(h\0e"), "other than a new container"),
    "a list filled twice": (whole(b"](Ne(Ne"), "other than a new container"),
    "a dict filled twice": (whole(b"}(K\1Nu(K\2Nu"), "other than a new container"),
    "a key twice": (whole(b"}(K\1NG?\xf0\0\0\0\0\0\0Nu"), "sets an item twice"),
    "a key that is not itself": (whole(b"}(G\x7f\xf8\0\0\0\0\0\0Nu"), "sets an item twice"),
    "a tuple as a key": (whole(b"}()Nu"), "has a tuple as a key"),
    "a name in another split": (whole(b"ctorch\n_utils._rebuild_tensor_v2\n"), "refers to"),
    "a name with a space": (whole(b"c__torch__ x\nNet\n"), "refers to"),
    "a function for bytes": (whole(b"c_codecs\nencode\n"), r"refers to _codecs.encode"),
    "a parameter": (whole(b"ctorch._utils\n_rebuild_parameter\n"), "refers to"),
    "the old list": (whole(b"c__main__\nIntList\n"), r"refers to __main__.IntList"),
    "hooks of something": (whole(name("collections.OrderedDict") + b"]\x85R"), "makes an OrderedDict"),
    "a list of another kind": (whole(INTS + b"(](" + text("a") + b"etR"), r"makes a List\[int\]"),
    "truth among integers": (whole(INTS + b"(](\x88etR"), r"makes a List\[int\]"),
    "a list with two types": (whole(TAG + INTS + b"(]tR" + text("List[str]") + b"\x86R"), "a second type"),
    "a type of another kind": (whole(TAG + b"]" + text("Dict[str, int]") + b"\x86R"), "gives the type"),
    "a type of another class": (whole(TAG + b"]" + text("List[__torch__.torch.classes.x.Y]") + b"\x86R"), "uses the type"),
    "a type that is code": (whole(TAG + b"]" + text("List[int](x)]") + b"\x86R"), "gives the type|uses the type"),
    "a type without an end": (whole(TAG + b"]" + text("List[" * 50) + b"\x86R"), "gives the type"),
    "a device of many": (whole(name("torch.device") + text("cpu") + b"K\1\x86R"), "makes a device"),
    "complex of integers": (whole(name("builtins.complex") + b"K\1K\1\x86R"), "makes a complex"),
    "a tensor with a flag": (whole(tensor(more=b"}(" + text("conj") + b"\x88u")), "makes a tensor"),
    "a tensor without hooks": (whole(tensor(hooks=b"")), "makes a tensor"),
    "a size of truths": (whole(tensor(size=b"\x88")), "makes a tensor"),
    "a gradient that is a number": (whole(tensor(grad=b"K\0")), "makes a tensor"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_torch_might_read_differently_is_refused(case: str, tmp_path: Path) -> None:
    data, named = HOSTILE[case]
    path = archive(tmp_path / "m.pt", data, _0=struct.pack("<2f", 1, 2))
    with pytest.raises(UnsafeFileError, match=named) as caught:
        read(path, names=lambda name: name == NET)
    assert caught.value.hint


@pytest.mark.parametrize("data", [
    whole(b"h\0"), whole(b""), whole(b"(N"), whole(b"NN"), whole(b"\x86"), whole(b"t"), whole(b"}(K\1u"), whole(b"X\1\0\0\0\xff"),
    whole(tensor(size=b"K\x03")), whole(tensor(offset=b"K\x01")), whole(tensor(stride=b"K\x02")), b"\x80\x02N", b"",
    whole(b"N" + b"\x85" * 300), whole(tensor(storage=STORAGE.replace(b"K\x02t", b"K\x03t"))),
])
def test_a_damaged_pickle_is_a_file_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(FileError):
        read(archive(tmp_path / "m.pt", data, _0=struct.pack("<2f", 1, 2)))


def test_only_classes_that_the_caller_allows_are_named(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", whole(net()))
    assert read(path, names=lambda name: name == NET).name == NET
    with pytest.raises(UnsafeFileError, match=r"data.pkl refers to __torch__.Net"):
        read(path, names=lambda name: name == OTHER)


def test_hooks_are_nothing_as_in_torch(tmp_path: Path) -> None:
    assert read(archive(tmp_path / "m.pt", whole(net(("x", HOOKS))))).state["x"] is None


def test_shared_branches_cost_what_they_unfold_to(tmp_path: Path) -> None:
    doubled = b"N\x85q\0" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40))
    with pytest.raises(UnsafeFileError, match="objects"):
        read(archive(tmp_path / "m.pt", whole(doubled)))


def test_containers_without_a_type_are_read_as_old_files_have_them(tmp_path: Path) -> None:
    value = read(archive(tmp_path / "m.pt", whole(b"](K\1e}(K\1K\2u\x86")))
    assert value == ([1], {1: 2})
    assert isinstance(value[0], ScriptList)
    assert isinstance(value[1], ScriptDict)
    assert value[0].tag is value[1].tag is None
