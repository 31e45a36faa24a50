"""The TorchScript check: ordinary CNNs pass, and whatever could run or write anything is refused by its name."""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.converter.budget import Budget
from gkp.converter.sources.script import check
from gkp.errors import FileError, GkpError, UnsafeFileError

torch = pytest.importorskip("torch")

import torch_nets  # noqa: E402 - it imports torch
from torch import nn  # noqa: E402

DSP = Path(__file__).resolve().parents[4] / ".." / "shared" / "checkpoints" / "dsp" / "resnet20_g4.pt"


class Block(torch.nn.Module):
    """A residual block in DSP's manner: gathered channels, index_add into the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(2)
        self.register_buffer("index", torch.tensor([3, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x[:, self.index]))
        return torch.relu_(x.clone().index_add_(1, self.index, y))


class Controlled(torch.nn.Module):
    """Control flow, lists, strings and a helper method: what torch.jit.script makes of a CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
        self.names = ["a", "b"]
        self.scales = {"a": 0.5}

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scales["a"]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        assert x.dim() == 4, "four dimensions"
        parts = [torch.zeros_like(x)]
        for block in self.blocks:
            if x.size(1) == 4:
                x = block(x)
                parts.append(x)
            else:
                x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.classifier(self.scaled(x + parts[-1])), self.names


class Saving(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "should_not_exist")
        return x


class Reading(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("/etc/hostname", False, 1)


class WithState(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.ones(1)

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.w = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


Save = Callable[[Any], Path]


def check_torchscript(path: Path) -> None:
    check.check_torchscript(path, Budget(path.stat().st_size))


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(module: Any) -> Path:
        path = tmp_path / "model.pt"
        torch.jit.save(module if isinstance(module, torch.jit.ScriptModule) else torch.jit.script(module), path)
        return path

    return write


def replace(path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> Path:
    """Rewrite the archive; `change` gives a member's new content, None to leave it out."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    folder = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            changed = change(name.partition("/")[2], data)
            if changed is not None:
                target.writestr(name, changed)
        for name, data in (extra or {}).items():
            target.writestr(f"{folder}/{name}", data)
    return path


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DSP.is_file(), reason="the published checkpoints are not here")
def test_a_published_traced_model_passes() -> None:
    check_torchscript(DSP)


@pytest.mark.parametrize("training", [True, False])
def test_a_scripted_cnn_with_control_flow_passes(save: Save, training: bool) -> None:
    check_torchscript(save(Controlled().train(training)))


def test_frozen_and_traced_models_pass(save: Save) -> None:
    check_torchscript(save(torch.jit.freeze(torch.jit.script(Controlled().eval()))))
    layers = [Block(), torch.nn.GELU(), torch.nn.MaxPool2d(2), torch.nn.Hardswish(), torch.nn.GroupNorm(2, 4)]
    layers += [torch.nn.PixelShuffle(2), torch.nn.Upsample(scale_factor=2), torch.nn.ReflectionPad2d(1)]
    check_torchscript(save(torch.jit.trace(torch.nn.Sequential(*layers).eval(), torch.rand(1, 4, 8, 8))))


def test_half_precision_weights_pass(save: Save) -> None:
    check_torchscript(save(torch.jit.script(torch.nn.Conv2d(1, 1, 1).half())))


LAYERS = [
    *(nn.ReLU6(), nn.LeakyReLU(inplace=True), nn.PReLU(), nn.ELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardswish()),
    *(nn.Hardsigmoid(), nn.Hardtanh(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.LogSigmoid(), nn.Softmax(1), nn.Identity()),
    *(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(2, 8), nn.LocalResponseNorm(2)),
    *(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.LPPool2d(2, 2)),
    *(nn.AdaptiveAvgPool2d((3, 1)), nn.AdaptiveMaxPool2d(4), nn.Upsample(scale_factor=2, mode="bilinear")),
    *(nn.UpsamplingNearest2d(scale_factor=2), nn.ConvTranspose2d(8, 8, 2, 2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1)),
    *(nn.ConstantPad2d(1, 0.5), nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    *(nn.ChannelShuffle(2), nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"), nn.Conv2d(8, 8, 3, groups=4)),
]
NETWORKS = [torch_nets.MobileNet, torch_nets.EfficientNet, torch_nets.DenseNet, torch_nets.ShuffleNet]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_every_layer_of_a_cnn_passes_scripted_frozen_and_traced(save: Save, layer: nn.Module) -> None:
    model = nn.Sequential(layer).eval()
    scripted = torch.jit.script(model)
    for made in (scripted, torch.jit.freeze(scripted), torch.jit.trace(model, torch.rand(2, 8, 16, 16))):
        check_torchscript(save(made))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_pass_scripted_and_traced(save: Save, network: type[nn.Module]) -> None:
    model = network().eval()
    check_torchscript(save(torch.jit.script(model)))
    check_torchscript(save(torch.jit.trace(model, torch.rand(1, 3, 16, 16))))


# --- what torch itself writes and must be refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (Saving, "calls torch.save in __torch__.*Saving.forward"),
        (Reading, "calls torch.from_file in __torch__.*Reading.forward"),
        (WithState, "defines __(get|set)state__"),
    ],
)
def test_what_touches_files_or_runs_at_load_is_refused_by_name(save: Save, module: Any, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        check_torchscript(save(module()))


# --- code that only an attacker writes --------------------------------------------------------------------------------

HEAD = """class Plain(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  count : int
  scale : Tensor
  inner : __torch__.parts.Inner
"""
INNER = b"""class Inner(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
  def forward(self: __torch__.parts.Inner,
    x: Tensor) -> Tensor:
    return torch.relu(x)
"""


def method(body: str, parameters: str = "x: Tensor", name: str = "forward") -> str:
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return f"  def {name}(self: __torch__.Plain, {parameters}) -> Tensor:\n{lines}"


HARMLESS = HEAD + method("inner = self.inner\nreturn torch.mul((inner).forward(x, ), self.count)")


def fragment(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def data_pickle(
    count: bytes = b"K\x03", inner: bytes = b"c__torch__.parts\nInner\n)\x81}(" + fragment("training") + b"\x89ub"
) -> bytes:
    storage = b"(" + fragment("storage") + b"ctorch\nFloatStorage\n" + fragment("0") + fragment("cpu") + b"K\x02tQ"
    scale = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + fragment(0) + fragment((2,)) + fragment((1,))
    scale += b"\x89ccollections\nOrderedDict\n)RtR"
    state = fragment("training") + b"\x89" + fragment("count") + count + fragment("scale") + scale
    return b"\x80\x02c__torch__\nPlain\n)\x81}(" + state + fragment("inner") + inner + b"ub."


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A TorchScript archive made by hand, so that its code and pickles can say anything."""
    path = tmp_path / "plain.pt"
    members = {
        "data.pkl": data_pickle(),
        "code/__torch__.py": HARMLESS.encode(),
        "code/__torch__/parts.py": INNER,
        "data/0": bytes(8),
        "constants.pkl": b"\x80\x02).",
        "version": b"3\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"plain/{name}", data)
    return path


def checked(path: Path, code: str) -> None:
    check_torchscript(replace(path, lambda name, data: code.encode() if name == "code/__torch__.py" else data))


def test_the_archive_made_by_hand_is_harmless_and_torch_runs_it(plain: Path) -> None:
    check_torchscript(plain)
    assert torch.jit.load(plain)(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 6.0]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("f = torch.save\nf(x, 'p')\nreturn x", "uses torch.save"),
        ("f = x.save\nf('p')\nreturn x", "takes the attribute save of what is no module"),
        ("(x).save('p')\nreturn x", "calls x.save"),
        ("(torch.relu(x)).save('p')\nreturn x", "calls an expression"),
        ("getattr(x, 'save')('p')\nreturn x", "calls an expression"),
        ("return ops.aten.save(x, 'p')", "calls ops.aten.save"),
        ("return ops.aten.from_file('p')", "calls ops.aten.from_file"),
        ("return ops.prim.PythonOp(x)", "calls ops.prim.PythonOp"),
        ("return ops.mylib.run(x)", "calls ops.mylib.run"),
        ("return torch.ops.mylib.run(x)", "calls torch.ops.mylib.run"),
        ("return torch.set_(x, x)", "calls torch.set_"),
        ("return torch.as_strided(x, [9], [9], 0)", "calls torch.as_strided"),
        ("return fork(self.forward, x)", "calls fork"),
        ("return eval('x')", "calls eval"),
        ("t = torch\nreturn t.save(x, 'p')", "calls t.save"),
        ("torch = x\nreturn x", "redefines a name"),
        ("return (lambda: x)()", "calls an expression"),
        ("y = [torch.save(v, 'p') for v in [x]]\nreturn x", "ListComp"),
        ("y = f'{torch.save(x)}'\nreturn x", "is not what torch.jit.save writes"),
        ("import os\nreturn x", "Import"),
        ("def g():\n  pass\nreturn x", "FunctionDef"),
        ("try:\n  pass\nexcept:\n  pass\nreturn x", "Try"),
        ("y = annotate(__torch__.torch.classes.a.B, x)\nreturn x", "uses the type __torch__.torch.classes.a.B"),
        ("y = __torch__.torch.classes.a.B.__new__(__torch__.torch.classes.a.B)\nreturn x", "torch.classes.a.B"),
        ("return __torch__.elsewhere.f(x)", "calls __torch__.elsewhere.f"),
        ("if torch.save(x, 'p'):\n  pass\nreturn x", "calls torch.save"),
        ("return torch.add(x, torch.mul(x, torch.load('p')))", "calls torch.load"),
        ("return torch.relu(input=torch.load('p'))", "calls torch.load"),
        ("return torch.mul(x, 3, out=x)", "tells mul where to write"),
        ("return ops.aten.tril(x, 0, out=x)", "tells tril where to write"),
        ("y, z = torch.topk(x, 1, values=x, indices=x)\nreturn y", "tells topk where to write"),
    ],
)
def test_every_way_to_call_something_else_is_refused_by_name(plain: Path, body: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        checked(plain, HEAD + method(body))


@pytest.mark.parametrize(
    "body",
    [
        "(x).save('p', )\nreturn x",
        "y = self\ny = x\n(y).save('p', )\nreturn x",
        "if bool(x):\n  y = x\nelse:\n  y = self\n(y).save('p', )\nreturn x",
        "y, z = self, x\n(z).save('p', )\nreturn x",
        "y, (z, w) = self, (x, x)\n(w).save('p', )\nreturn x",
        "for y in [x]:\n  (y).save('p', )\nreturn x",
        "y : Tensor = x\n(y).save('p', )\nreturn x",
        "y = self.count\n(y).save('p', )\nreturn x",
        "y = (self).save('p', )\n(y).save('p', )\nreturn x",
    ],
)
def test_a_method_of_the_archive_does_not_lend_its_name_to_tensors(plain: Path, body: str) -> None:
    own = method("return torch.zeros([1])", "path: str", "save")
    checked(plain, HEAD + own + method("return (self).save('p', )"))
    with pytest.raises(UnsafeFileError, match=r"calls [yzwx].save|gives y values of two kinds|a loop over something other"):
        checked(plain, HEAD + own + method(body))


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (HEAD + method("return x", "x: Tensor, y: Tensor=torch.load('p')"), "computes a constant at load"),
        (HEAD + "  secret : Final[Tensor] = torch.load('p')\n", "computes a constant at load"),
        (HEAD + "  @torch.jit.unused\n" + method("return x"), "unknown signature"),
        (HEAD + method("return x") + method("return x"), "defines forward twice"),
        (HEAD + HEAD, "twice"),
        (HEAD + "  count : Tensor\n", "defines count twice"),
        (HEAD + "  print('now')\n", "holds a Expr statement"),
        (HEAD.replace("(Module)", "(Exception)"), "unknown kind"),
        (HEAD + "  engine : __torch__.torch.classes.tensorrt.Engine\n", "uses the type __torch__.torch.classes"),
        (HEAD + "  hook : Future[Tensor]\n", "uses the type Future"),
        ("import os\n" + HEAD, "Import statement"),
        ("print('now')\n" + HEAD, "Expr statement"),
        (HEAD + method("return x") + "# note\n", "is not what torch.jit.save writes"),
        (HEAD + method("y = r'a'\nreturn x"), "is not what torch.jit.save writes"),
        (HEAD + method("y = '''a'''\nreturn x"), "is not what torch.jit.save writes"),
        (HEAD + method("y = 'a\\\n'\nreturn x"), "is not what torch.jit.save writes"),
        (HEAD + method("y = 1; return x"), "is not what torch.jit.save writes"),
        (HEAD + method("y = 1\r    return x"), "is not what torch.jit.save writes"),
        (HEAD + method("ｙ = 1\nreturn x"), "cannot be parsed"),
        (HEAD + method("return x x"), "cannot be parsed"),
        (HEAD + method("return " + "-" * 20_000 + "x"), "cannot be parsed|nested too deep"),
        (HEAD + method("return x" + ".y" * 20_000), "cannot be parsed|nested too deep"),
        (HEAD + method("return x" + " + x" * 5_000), "cannot be parsed|nested too deep"),
    ],
)
def test_code_that_the_serializer_never_writes_is_refused(plain: Path, code: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        checked(plain, code)


# --- values that are taken for something else -------------------------------------------------------------------------


def test_self_is_the_class_around_the_method_and_nothing_else(plain: Path) -> None:
    """Torch ignores the annotation, so that a check which believes it looks methods up in another class."""
    fake = HEAD.replace("class Plain", "class Fake").replace("scale : Tensor", "scale : __torch__.parts.Inner")
    lie = HEAD + method("return (self.scale).forward(x, )").replace("self: __torch__.Plain", "self: __torch__.Fake")
    with pytest.raises(UnsafeFileError, match="takes a self that is not of its class"):
        checked(plain, fake + lie)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("return (self.scale).forward(x, )", "calls self.scale.forward, which is no method of a module"),
        ("scale = self.scale\nreturn (scale).forward(x, )", "calls scale.forward, which is no method"),
        ("return (getattr(self, 'scale')).forward(x, )", "calls a method of an expression"),
        ("y = [self.inner]\nreturn x", "puts a list or a module into a list"),
        ("return torch.relu(self.inner)", "hands a module to relu"),
        ("y = unchecked_cast(__torch__.parts.Inner, x)\nreturn x", "uses the type __torch__.parts.Inner"),
        ("y = annotate(__torch__.Plain, self)\nreturn x", "uses the type __torch__.Plain"),
        ("y = uninitialized(__torch__.Plain)\nreturn x", "uses the type __torch__.Plain"),
        ("y = unchecked_cast(Any, x)\nreturn x", "uses the type Any"),
        ("y : __torch__.Plain = self\nreturn x", "uses the type __torch__.Plain"),
        ("y = isinstance(x, [__torch__.Plain])\nreturn x", "uses the type __torch__.Plain"),
        ("self.inner = self.inner\nreturn x", "sets inner"),
        ("return self.absent", "takes the attribute absent"),
        ("y = x.shape\nreturn x", "takes the attribute shape of what is no module"),
        ("return CONSTANTS.c0", "uses CONSTANTS.c0"),
        ("y = torch\nreturn x", "uses torch"),
        ("y = range(3)\nreturn x", "calls range"),
    ],
)
def test_only_modules_have_methods_and_only_data_is_data(plain: Path, body: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named) as caught:
        checked(plain, HEAD + method(body))
    assert "__torch__.Plain.forward, line " in caught.value.message


def test_numbers_of_the_module_may_be_set_and_read(plain: Path) -> None:
    checked(plain, HEAD + method("self.count = torch.add(self.count, 1)\nreturn torch.mul(x, self.count)"))


# --- no end, no measure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "for i in range(3):\n  x = torch.relu(x)\nreturn x",
        "for i in range(self.count):\n  x = torch.relu(x)\nreturn x",
        "for i in range(torch.sub(torch.len(torch.size(x)), 2)):\n  x = torch.relu(x)\nreturn x",
        "l = [1, 2, 3]\nfor i in range(torch.len(l)):\n  x = torch.add(x, l[i])\nreturn x",
        "l = annotate(List[int], [])\nfor i in range(torch.dim(x)):\n  y = torch.append(l, i)\nreturn x",
    ],
)
def test_loops_that_the_code_or_a_rank_bounds_pass(plain: Path, body: str) -> None:
    checked(plain, HEAD + method(body))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("while True:\n  x = torch.relu(x)\nreturn x", "holds a While"),
        ("for i in range(torch.numel(x)):\n  pass\nreturn x", "a loop that nothing bounds"),
        ("for i in range(int(x)):\n  pass\nreturn x", "a loop that nothing bounds"),
        ("for i in range(1000000):\n  pass\nreturn x", "a loop that nothing bounds"),
        ("n = 2\nfor i in range(60):\n  n = torch.mul(n, n)\nfor j in range(n):\n  pass\nreturn x", "nothing bounds"),
        ("for i in range(50000):\n  for j in range(50000):\n    pass\n  pass\nreturn x", "over 2,000,000 statements"),
        ("l = [1]\nfor i in range(50):\n  for j in range(torch.len(l)):\n    y = torch.append(l, 1)\nreturn x",
         "makes a list longer in a loop that looks at its length"),
        ("l = [1]\nm = l\nfor i in range(50):\n  for j in range(torch.len(l)):\n    y = torch.append(m, 1)\nreturn x",
         "makes a list longer in a loop that looks at its length"),
        ("l = [1]\n" + "l = torch.add(l, l)\n" * 40 + "return x", "makes a list of unknown length by add"),
        ("l = [1]\nfor i in range(40):\n  l = torch.add(l, l)\nreturn x", "anew in every turn of a loop"),
        ("l = [1]\nfor i in range(40):\n  y = torch.extend(l, l)\nreturn x", "makes a list longer in a loop that looks at its length"),
        ("l = torch.mul([1], 1000000000)\nreturn x", "makes a list of unknown length by mul"),
        ("l = [[1]]\nreturn x", "puts a list or a module into a list"),
        ("s = 'a'\n" + "s = torch.add(s, s)\n" * 40 + "return x", "computes text by add"),
        ("s = 'a'\n" + "s = torch.format('{}{}', s, s)\n" * 40 + "return x", "puts long text together"),
        ("t = ['a']\ns = torch.add(t[0], t[0])\nreturn x", "computes text by add"),
        ("if bool(x):\n  return x\nelse:\n  pass\nreturn x", "holds a Return"),
    ],
)
def test_what_has_no_end_or_grows_without_measure_is_refused(plain: Path, body: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        checked(plain, HEAD + method(body))


def test_calls_that_multiply_are_refused_in_time(plain: Path) -> None:
    """Each of 40 functions calls the next one twice: torch would copy them into one another."""
    functions = "".join(f"def f{n}(x: Tensor) -> Tensor:\n  _0 = __torch__.f{n + 1}\n  y = _0(x, )\n  return _0(y, )\n"
                        for n in range(40)) + "def f40(x: Tensor) -> Tensor:\n  return torch.relu(x)\n"
    with pytest.raises(UnsafeFileError, match=r"over [\d,]+ steps"):
        checked(plain, functions + HEAD + method("return __torch__.f0(x, )"))
    with pytest.raises(UnsafeFileError, match="calls itself"):
        checked(plain, HEAD + method("return (self).forward(x, )"))


@pytest.mark.parametrize(
    "call",
    ["torch.arange(8, dtype=-2)", "torch.to(x, 99)", "torch.softmax(x, 1, self.count)", "torch.zeros([1], layout=7)",
     "torch.to(x, torch.item(x))", "torch.contiguous(x, memory_format=9)", "torch.sum(x, dtype=int(x))"],
)
def test_numbers_that_torch_looks_up_in_tables_are_numbers_of_a_table(plain: Path, call: str) -> None:
    """`arange` with the dtype -2 ends the process."""
    with pytest.raises(UnsafeFileError, match="that is not known to be one"):
        checked(plain, HEAD + method(f"for i in range(2):\n  self.count = 9\nreturn {call}"))
    for valid in ("torch.to(x, 6)", "torch.to(x, ops.prim.dtype(x))", "torch.softmax(x, 1, 6)", "torch.to(x, self.scale)"):
        checked(plain, HEAD + method(f"return {valid}"))


# --- what would reach the terminal, or the caller's process -----------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "named"),
    [
        (HEAD + method("print('now')\nreturn x"), "calls print"),
        (HEAD + method("torch.warn('\\x1b[31mred')\nreturn x"), "text that is not printable"),
        (HEAD + method("ops.prim.RaiseException('\\x1b]0;title\\x07')\nreturn x"), "text that is not printable"),
        (HEAD + method("return x", "x: Tensor, y: str='\\x1b[31m'"), "text that is not printable"),
        (HEAD + "  label : Final[str] = '\\u202e'\n" + method("return x"), "text that is not printable"),
        (HEAD + method("torch.warn(x)\nreturn x"), "calls warn with what is no text"),
        (HEAD + method("y = torch.set_grad_enabled(False)\nreturn x"), "calls torch.set_grad_enabled"),
        (HEAD + method("y = torch.requires_grad_(x, True)\nreturn x"), "calls torch.requires_grad_"),
        (HEAD + method("y = torch.chr(27)\nreturn x"), "calls torch.chr"),
        (HEAD + "  __forward_hooks__ = ['scaled']\n" + method("return x"), "sets __forward_hooks__"),
        (HEAD + "  __forward_pre_hooks__ = ['scaled']\n" + method("return x"), "sets __forward_pre_hooks__"),
        (HEAD + method("return x", name="__setattr__"), "defines __setattr__"),
        ("class Handle:\n  count : int\n" + HEAD + method("return x"), "only modules belong to a network"),
        ("class Pair(NamedTuple):\n  a : Tensor\n" + HEAD + method("return x"), "only modules belong to a network"),
    ],
)
def test_nothing_reaches_the_terminal_or_the_callers_process(plain: Path, code: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        checked(plain, code)


def test_warnings_and_errors_of_layers_pass(plain: Path) -> None:
    """Dropout2d and BatchNorm2d say of a wrong rank what they got."""
    checked(plain, HEAD + method("if torch.ne(torch.dim(x), 4):\n  t = torch.format('got {}D', torch.dim(x))\n"
                                 "  ops.prim.RaiseException(t, 'builtins.ValueError')\nelse:\n  torch.warn('fine')\nreturn x"))


# --- archives and pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "named"),
    [
        ("code/__torch__.evil.py", "has code in"),
        ("CODE/evil.PY", "has code in"),
        ("code/__torch__/torch/classes/evil.py", "defines __torch__.torch.classes.evil"),
        ("model.json", "older than PyTorch 1.4"),
        ("DATA.PKL", "twice"),
    ],
)
def test_members_that_torch_would_read_differently_are_refused(plain: Path, member: str, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        check_torchscript(replace(plain, lambda name, data: data, {member: b"pass\n"}))


def test_extra_files_and_debug_records_are_ignored(plain: Path) -> None:
    check_torchscript(replace(plain, lambda name, data: data, {"extra/notes.txt": b"x", "code/a.debug_pkl": b"\xff"}))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x80\x02cos\nsystem\n.", "data.pkl refers to os.system"),
        (b"\x80\x02c__torch__.torch.classes.a\nB\n)\x81.", "refers to __torch__.torch.classes.a.B"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "not of protocol 2"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02cnumpy\ndtype\n.", "refers to numpy.dtype"),
    ],
)
def test_pickles_that_name_anything_but_the_archive_are_refused(plain: Path, data: bytes, named: str) -> None:
    with pytest.raises(UnsafeFileError, match=named):
        check_torchscript(replace(plain, lambda name, old: data if name == "data.pkl" else old))


@pytest.mark.parametrize("wrong", [b"N", b"\x88", b"G" + bytes(8), b"]", b"c__torch__.parts\nInner\n)\x81}b"])
def test_an_attribute_of_another_type_than_declared_is_refused(plain: Path, wrong: bytes) -> None:
    with pytest.raises(UnsafeFileError, match=r"is not of its declared type"):
        check_torchscript(replace(plain, lambda name, data: data_pickle(wrong) if name == "data.pkl" else data))
    with pytest.raises(UnsafeFileError, match=r"is not of its declared type"):
        check_torchscript(replace(plain, lambda name, data: data_pickle(inner=wrong) if name == "data.pkl" else data))


def test_an_attribute_that_no_class_declares_is_refused(plain: Path) -> None:
    state = data_pickle().replace(fragment("count"), fragment("other") + b"K\x01" + fragment("count"))
    with pytest.raises(UnsafeFileError, match="holds what its class does not declare"):
        check_torchscript(replace(plain, lambda name, data: state if name == "data.pkl" else data))


def test_a_missing_pickle_or_a_short_storage_is_a_file_error(plain: Path) -> None:
    with pytest.raises(FileError, match="wrong size"):
        check_torchscript(replace(plain, lambda name, data: data[:2] if name == "data/0" else data))
    with pytest.raises(FileError, match=r"no member constants.pkl"):
        check_torchscript(replace(plain, lambda name, data: None if name == "constants.pkl" else data))


def test_a_file_cut_anywhere_is_a_file_error(plain: Path) -> None:
    data = plain.read_bytes()
    for end in [*range(0, len(data), 97), len(data) - 1]:
        plain.write_bytes(data[:end])
        with pytest.raises(FileError):
            check_torchscript(plain)


def test_other_archives_are_not_taken_for_torchscript(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "f.pt")
    with pytest.raises(FileError, match=r"no member constants.pkl"):
        check_torchscript(tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("code/__torch__.py", "")
    with pytest.raises(FileError, match="not a TorchScript archive"):
        check_torchscript(tmp_path / "g.pt")


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_bytes_give_a_gkp_error_or_pass(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    member = data.draw(st.sampled_from(["data.pkl", "code/__torch__/torch/nn/modules/linear.py"]))

    def damage(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        changed = bytearray(content)
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        return bytes(changed)

    with contextlib.suppress(GkpError):  # any other exception fails the test
        check_torchscript(replace(path, damage))
