"""TorchScript archives spliced from the grammar of networks: operators with arguments of their declared types and odd
values, methods, loops, lists and text, and here and there what the check must refuse.

Torch's own schemas say what an operator takes. Whatever the check accepts is loaded and run by the caller, so that an
operator on the list that crashes, writes or never ends is found out.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from functools import cache
from math import prod
from random import Random
from typing import Any

HEAD = """class Net(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  count : int
  w : Tensor
  names : List[str]
  sizes : List[int]
  inner : __torch__.parts.Inner
"""
INNER = """class Inner(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  w : Tensor
  def forward(self: __torch__.parts.Inner,
    x: Tensor) -> Tensor:
    return torch.mul(x, self.w)
"""
INTEGERS = (0, 1, 1, 1, 2, 2, 3, 4, 8, -1, -1, -2, 5, 7, 63, 64, 65, 2**31 - 1, 2**31, -2**31, 2**62, -2**63)
FLOATS = ("0.", "1.", "0.5", "-1.", "2.", "1e30", "-1e-30", "inf", "nan")
TEXTS = ("'mean'", "'none'", "'nearest'", "'bilinear'", "'reflect'", "'constant'", "'zeros'", "'same'", "'floor'", "'ij'",
         "'ab,bc->ac'", "'a'", "'{}'", "''")
HOSTILE = ("t{v} = torch.save({x}, 'f')", "while True:\n  pass", "print({x})", "({x}).set_({x})", "(self.w).forward({x})",
           "t{v} = unchecked_cast(__torch__.Net, {x})", "t{v} = ops.prim.PythonOp({x})", "t{v} = self.inner.w.data",
           "torch.warn('\\x1b[31m')", "t{v} = torch.to_sparse({x})", "t{v} = torch._indices({x})", "self.inner = self.inner",
           "t{v} = torch.set_grad_enabled(False)", "t{v} = [self.inner]", "for i{v} in range(torch.numel({x})):\n  pass",
           "t{v} = torch.resize_({x}, [9])", "t{v} = CONSTANTS.c7", "import os", "t{v} = (lambda: 0)()")


@cache
def _schemas() -> list[Any]:
    """Of every operator on the check's list."""
    import torch

    from gkp.converter.sources.script.operators import TORCH

    return sorted((s for s in torch._C._jit_get_all_schemas() if s.name.removeprefix("aten::") in TORCH), key=str)


class Writer:
    """The body of one method. tensors, numbers: names of variables that hold such."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.lines: list[str] = []
        self.tensors, self.numbers, self.lists = ["x", "w"], ["n"], ["l"]
        self.made = 0

    def body(self) -> str:
        self.lines = ["w = self.w", "n = self.count", "l = self.sizes"]
        for _ in range(self.rng.choice((1, 1, 2, 3, 5, 8))):
            self._statement("")
        return "".join(f"    {line}\n" for line in [*self.lines, f"return {self.rng.choice(self.tensors)}"])

    def _statement(self, indent: str) -> None:
        kind = self.rng.random()
        if kind < 0.72 or len(indent) > 4:
            self._operator(indent)
        elif kind < 0.78:
            self._add(indent, f"(self.inner).forward({self.tensor()}, )", self.tensors)
        elif kind < 0.86:
            self._nested(indent)
        elif kind < 0.93:
            self._list(indent)
        else:
            self.made += 1
            text = self.rng.choice(HOSTILE).replace("{v}", str(self.made)).replace("{x}", self.tensor())
            self.lines += [indent + line for line in text.split("\n")]

    def _add(self, indent: str, expression: str, to: list[str]) -> None:
        self.made += 1
        name = f"v{self.made}"
        self.lines.append(f"{indent}{name} = {expression}")
        if not indent:
            to.append(name)

    def _nested(self, indent: str) -> None:
        if self.rng.random() < 0.5:
            bound = self.rng.choice((f"torch.dim({self.tensor()})", "3", f"torch.len({self.rng.choice(self.lists)})",
                                     self.number(), f"torch.len(torch.size({self.tensor()}))"))
            self.made += 1
            self.lines.append(f"{indent}for i{self.made} in range({bound}):")
            self._statement(indent + "  ")
            return
        test = self.rng.choice((f"torch.eq(torch.dim({self.tensor()}), 4)", "torch.__is__(None, None)", "self.training",
                                f"bool({self.tensor()})", f"torch.gt({self.number()}, 1)"))
        self.lines.append(f"{indent}if {test}:")
        self._statement(indent + "  ")
        self.lines.append(f"{indent}else:")
        self._statement(indent + "  ")

    def _list(self, indent: str) -> None:
        one = self.rng.choice(self.lists)
        self._add(indent, self.rng.choice((f"torch.append({one}, {self.number()})", f"torch.add({one}, {one})",
                                           f"torch.mul({one}, {self.number()})", f"[{self.number()}, {self.number()}]",
                                           f"torch.size({self.tensor()})", f"torch.slice({one}, 1)", f"torch.list({one})",
                                           "annotate(List[int], [])", f"torch.extend({one}, {one})",
                                           f"torch.format('{{}}', {one})", "self.names")), self.lists)

    def _operator(self, indent: str) -> None:
        schema = self.rng.choice(_schemas())
        arguments = []
        for argument in schema.arguments:
            value = self._argument(str(argument.type))
            if value is None:
                return
            arguments.append(f"{argument.name}={value}" if argument.kwarg_only else value)
        results = [str(r.type) for r in schema.returns]
        call = f"torch.{schema.name.removeprefix('aten::')}({', '.join(arguments)})"
        self._add(indent, call, self.tensors if results == ["Tensor"] else self.numbers if results == ["int"] else [])

    def tensor(self) -> str:
        return self.rng.choice(self.tensors)

    def number(self) -> str:
        return self.rng.choice((self.rng.choice(self.numbers), str(self.rng.choice(INTEGERS))))

    def _argument(self, kind: str) -> str | None:
        """An expression of this type of torch's; None: there is none here."""
        rng = self.rng
        if kind.startswith("Optional["):
            return "None" if rng.random() < 0.5 else self._argument(kind[len("Optional["):-1])
        match kind:
            case "Tensor":
                return self.tensor()
            case "int":
                return self.number()
            case "float":
                return rng.choice(FLOATS)
            case "number":
                return rng.choice((self.number(), rng.choice(FLOATS)))
            case "bool":
                return rng.choice(("True", "False"))
            case "str":
                return rng.choice(TEXTS)
            case "List[int]":
                return "[" + ", ".join(self.number() for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 4, 5)))) + "]"
            case "List[float]":
                return "[" + ", ".join(rng.choice(FLOATS) for _ in range(rng.choice((1, 2)))) + "]"
            case "List[bool]":
                return "[True, False]"
            case "List[Tensor]":
                return "[" + ", ".join(self.tensor() for _ in range(rng.choice((1, 2, 3)))) + "]"
            case "List[Optional[Tensor]]":
                return "annotate(List[Optional[Tensor]], [" + self.tensor() + "])"
            case "Device":
                return None
        return None


def script(rng: Random) -> bytes:
    """One archive."""
    methods = "".join(f"  def {name}(self: __torch__.Net,\n    x: Tensor) -> Tensor:\n{Writer(rng).body()}"
                      for name in ("forward", *(("helper",) if rng.random() < 0.2 else ())))
    members = {"data.pkl": _data(rng), "code/__torch__.py": (HEAD + methods).encode(),
               "code/__torch__/parts.py": INNER.encode(), "data/0": bytes(range(1, 97)) * 4,
               "data/1": bytes(rng.choices(range(8), k=128)), "data/2": bytes(4), "constants.pkl": b"\x80\x02).",
               "version": b"3\n"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"net/{name}"), data)
    return buffer.getvalue()


def _data(rng: Random) -> bytes:
    """The module: a tensor of floats or integers, of one to four axes."""
    shape = rng.choice(((96,), (4, 24), (2, 4, 12), (1, 4, 4, 6), (2, 3, 4, 4), (8, 3, 2, 2)))
    whole = rng.random() < 0.2
    weight = _tensor("LongStorage" if whole else "FloatStorage", "1" if whole else "0", 16 if whole else 96,
                     (4, 4) if whole else shape)
    inner = (b"c__torch__.parts\nInner\n)\x81}(" + _text("training") + b"\x89" + _text("w")
             + _tensor("FloatStorage", "2", 1, (1,)) + b"ub")
    sizes = b"ctorch.jit._pickle\nbuild_intlist\n](K\x01K\x02e\x85R"
    names = b"ctorch.jit._pickle\nrestore_type_tag\n](" + _text("a") + b"e" + _text("List[str]") + b"\x86R"
    fields = {"training": b"\x89", "count": b"K\x03", "w": weight, "names": names, "sizes": sizes, "inner": inner}
    state = b"".join(_text(name) + value for name, value in fields.items())
    return b"\x80\x02c__torch__\nNet\n)\x81}(" + state + b"ub."


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _tensor(kind: str, key: str, numel: int, shape: tuple[int, ...]) -> bytes:
    strides = tuple(prod(shape[axis + 1:]) for axis in range(len(shape)))
    count = pickle.dumps(numel, 2)[2:-1]
    storage = b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(key) + _text("cpu") + count + b"tQ"
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + _numbers(shape) + _numbers(strides)
            + b"\x89ccollections\nOrderedDict\n)RtR")


def _numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(b"K" + bytes([value]) for value in values) + b"t"
