"""--target native with AMX: what the kernel grants or denies decides, and what is made for other processors is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import save
from denied_kit import denied
from int8_kit import by_hand, quantised
from integer_kit import AMX_FLAGS, has
from onnx_kit import Net, feeds_of, run_ort

import gkp
from gkp.converter import calibration
from gkp.converter.graph import Graph
from gkp.converter.native.building import toolchain
from gkp.converter.native.building.roofline import network_roofline
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8
from gkp.converter.recognise import recognise, simplify
from gkp.converter.targets import make_target
from gkp.errors import UsageError
from gkp.manifest import Roofline
from gkp.options.targets import NativeOptions
from gkp.runtime.environment import cpu_flags, vector_floats
from gkp.runtime.native import NativeRunner

needs_amx = pytest.mark.skipif(not has(*AMX_FLAGS), reason="this processor has no AMX")
granted = pytest.mark.skipif(AMX_INT8 not in host_cpu().instructions, reason="this processor has no AMX, or the kernel denies it")


def network() -> onnx.ModelProto:
    """Wide enough for tiles to be chosen."""
    net = Net(1, 64, 12, 12)
    y = net.relu(net.conv("x", net.weight(64, 64, 3, 3), pads=[1] * 4))
    return net.model(net.relu(net.conv(y, net.weight(128, 64, 1, 1))))


def convert(folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str, **options: Any) -> Any:
    monkeypatch.setattr(calibration, "import_nncf", lambda: None)
    monkeypatch.setattr(calibration, "quantise", lambda graph, *rest: quantised(graph.copy()))
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((4, 64, 12, 12)).astype(np.float32))
    options |= {"precision": precision} | ({"calibration": str(folder / "x.npy")} if precision == "int8" else {})
    return gkp.convert(save(network(), folder / "m.onnx"), target="native", output=folder / "out", threads=1, benchmark=False,
                       keep_source=True, **options)


def steps(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out" / "source" / "describe.json").read_text())["steps"]
    return found


@granted
@pytest.mark.parametrize(("precision", "need"), [("int8", AMX_INT8), ("bf16", AMX_BF16)])
def test_both_precisions_run_on_tiles(precision: str, need: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = convert(tmp_path, monkeypatch, precision, cpu="x86-64-v4-amx")
    assert made.manifest.verification.passed
    assert made.manifest.verification.engine.endswith("x86-64-v4-amx"), "the artefact itself"
    assert sum(need in step["needs"] for step in steps(tmp_path)) == 2
    x = feeds_of(network())
    full = run_ort(network(), x)[0]
    error = float(np.abs(made.run(x) - full).max() / np.abs(full).max())
    assert 1e-5 < error < (0.2 if precision == "int8" else 3e-2)
    found = measured(tmp_path / "out" / "model.so", precision)
    assert list(found.peaks) == [need]
    assert all(layer.share == pytest.approx(layer.gflops / found.peaks[need]) for layer in found.layers)
    assert all(0 < layer.share < 1.05 for layer in found.layers)


def measured(library: Path, precision: str) -> Roofline:
    runner = NativeRunner(library, 1)
    try:
        graph = by_hand(network()) if precision == "int8" else simplify(recognise(Graph(network())))
        return network_roofline(runner, graph, seconds=0)
    finally:
        runner.close()


@needs_amx
def test_where_the_kernel_denies_tiles_conversions_do_without_and_say_so(tmp_path: Path) -> None:
    """bf16 is refused: nothing else here is faster in it than in float32."""
    path = save(network(), tmp_path / "m.onnx")
    found = denied(
        "import json\nfrom pathlib import Path\nimport numpy as np\nimport gkp\nfrom int8_kit import quantised\n"
        "from gkp.converter import calibration\nfrom gkp.errors import UsageError\n"
        "calibration.import_nncf = lambda: None\ncalibration.quantise = lambda graph, *rest: quantised(graph.copy())\n"
        f"folder = Path({str(tmp_path)!r})\nnp.save(folder / 'x.npy', np.random.default_rng(0).random((4, 64, 12, 12), 'float32'))\n"
        "def convert(precision, name, **options):\n"
        f"    return gkp.convert({str(path)!r}, target='native', output=folder / name, threads=1, precision=precision, benchmark=False,\n"
        "                       keep_source=True, **options)\n"
        "made = convert('int8', 'out', calibration=str(folder / 'x.npy')).manifest\n"
        "assert made.verification.passed\nprint(json.dumps(made.notes))\n"
        "made = convert('fp32', 'other', cpu='x86-64-v4-amx').manifest\n"
        "assert made.verification.passed\nprint(json.dumps(made.notes))\n"
        "try:\n    convert('bf16', 'never')\nexcept UsageError as e:\n    print(e.message)\n")
    notes, abroad, refused = found.splitlines()
    why = "the system's kernel denies AMX to this process (Operation not permitted)"
    assert f"{why}: kernels without it were chosen" in json.loads(notes)
    assert {need for step in steps(tmp_path) for need in step["needs"]} >= {"vnni"}
    assert not any(AMX_INT8 in step["needs"] for step in steps(tmp_path))
    assert any(note.endswith(f"the library is for x86-64-v4-amx, {why}") for note in json.loads(abroad))
    assert refused == f"--target native has no bf16 for host: {why}"


def test_a_processor_with_less_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 for tiles is verified in float32 where there is none."""
    flags = cpu_flags() - set(AMX_FLAGS)
    monkeypatch.setattr(toolchain, "cpu_flags", lambda: flags)
    if vector_floats() < 16:
        pytest.skip("this processor has shorter vectors")
    made = convert(tmp_path, monkeypatch, "bf16", cpu="x86-64-v4-amx").manifest
    assert made.verification.passed
    assert any("this machine is a processor without vnni, permute, amx-int8, amx-bf16; it was verified in float32" in note
               for note in made.notes)


def test_bf16_is_offered_for_the_name_with_tiles_whatever_is_here() -> None:
    make_target(NativeOptions(cpu="x86-64-v4-amx"), "bf16").require("bf16")
    with pytest.raises(UsageError, match="has no AMX, and lacks AVX512-BF16"):
        make_target(NativeOptions(cpu="x86-64-v4-vnni"), "bf16").require("bf16")
