"""Every module imports without the packages it does not need: each in a process in which those are blocked."""

from __future__ import annotations

import pytest
from cli_kit import blocked, commands
from layout import packages

RUNTIMES = ("onnxruntime", "openvino", "ncnn", "pnnx")
CONVERT = ("onnx", "onnx_graphsurgeon", "google")
PRUNE = ("accelerate", "mtkahypar", "sklearn", "scipy")
EDGE = ("grpc", "cryptography", "networkx", "yaml", "ray")
EXTRAS = ("torch", "onnxscript", "safetensors", "jinja2", "PIL", *PRUNE, *EDGE, *RUNTIMES, *CONVERT)
DEVELOPMENT = ("pytest", "hypothesis", "mypy", "setuptools")
# What a package's modules may import when they are loaded, of all that is not in the base install.
NEEDS: dict[str, tuple[str, ...]] = {
    "gkp": (),
    "gkp.runtime": (),
    "gkp.report": (),
    "gkp.images": (),
    "gkp.benchmarks": CONVERT,
    "gkp.benchmarks.gpu": ("torch", *CONVERT),
    "gkp.benchmarks.edge": CONVERT,
    "gkp.edge": (),  # what a device needs of it: tests/edge/device/test_service_process.py
    "gkp.edge.wire": ("google",),
    "gkp.edge.device": ("grpc", "google"),
    "gkp.edge.coordinate": ("google",),
    "gkp.edge.ray": ("grpc", "google"),
    "gkp.edge.divide": CONVERT,
    "gkp.converter": CONVERT,
    "gkp.converter.lower": CONVERT,
    "gkp.converter.passes": CONVERT,
    "gkp.converter.sources": CONVERT,
    "gkp.converter.targets": CONVERT,
    "gkp.pruning": ("torch",),
    "gkp.pruning.methods": ("torch", "scipy", "sklearn"),
}


def modules(package: str) -> list[str]:
    return [package, *(f"{package}.{file.stem}" for file in sorted(packages()[package].glob("*.py"))
                       if file.stem != "__init__")]


def test_every_package_is_listed_here() -> None:
    named = {name for name in packages() if any(name == k or name.startswith(f"{k}.") for k in NEEDS)}
    assert named == set(packages())


@pytest.mark.parametrize("package", sorted(packages()))
def test_every_module_imports_without_what_it_does_not_need(package: str) -> None:
    """All modules of a package in one process, each newly imported."""
    need = NEEDS[max((k for k in NEEDS if package == k or package.startswith(f"{k}.")), key=len)]
    others = [name for name in (*EXTRAS, *DEVELOPMENT) if name not in need]
    body = (f"names = {modules(package)!r}\n"
            "import importlib\n"
            "for name in names:\n"
            "    importlib.import_module(name)\n"
            "print(len(names))\n")
    outcome = blocked(others, body)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split() == [str(len(modules(package)))]


def test_importing_gkp_and_its_command_line_loads_nothing_heavy() -> None:
    body = ("import sys, gkp, gkp.cli\n"
            f"print([n for n in {EXTRAS!r} if n in sys.modules])\n")
    outcome = blocked([], body)
    assert (outcome.code, outcome.out.strip()) == (0, "[]"), outcome.err


def test_the_help_needs_the_base_install_only() -> None:
    """Of every command, groups and what is in them too, one after the other in one process."""
    asked = [(), *commands()]
    body = ("import contextlib, io\n"
            "from gkp.cli import main\n"
            f"for words in {asked!r}:\n"
            "    shown = io.StringIO()\n"
            "    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):\n"
            "        main([*words, '--help'], prog_name='gkp')\n"
            "    print(' '.join(['gkp', *words]), f\"Usage: {' '.join(['gkp', *words])} \" in shown.getvalue())\n")
    outcome = blocked((*EXTRAS, *DEVELOPMENT), body)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [f"{' '.join(('gkp', *words))} True" for words in asked]


def test_the_public_names_exist() -> None:
    import gkp

    assert set(gkp.__all__) <= set(dir(gkp))
    assert [name for name in gkp.__all__ if getattr(getattr(gkp, name), "__name__", None) not in (name, None)] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gkp.nothing  # noqa: B018


def test_the_runtime_package_never_loads_the_converter() -> None:
    body = ("import sys, gkp.runtime.load, gkp.runtime.measure\n"
            "print([n for n in sys.modules if n.startswith(('gkp.converter', 'gkp.pruning', 'torch', 'onnx'))])\n")
    outcome = blocked([], body)
    assert (outcome.code, outcome.out.strip()) == (0, "[]"), outcome.err
