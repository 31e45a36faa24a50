"""Which package is taken, in processes of their own: a process can use Polygraphy with one of the packages only."""

import pytest
from engine_kit import python

from gkp.converter.trt.backend import find_backend
from gkp.errors import UsageError

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
CLASSIC_10 = "'10.13.0', {'EXPLICIT_BATCH': 0, 'STRONGLY_TYPED': 1}, {'FP16': 0}"
PROLOGUE = """
from engine_kit import grouped_net, pose_as_classic
from gkp.converter.trt.backend import find_backend
from gkp.converter.trt.build import build_engines
from gkp.options.trt import TrtOptions
from gkp.errors import GkpError
def attempt(function, *arguments):
    try:
        return function(*arguments)
    except GkpError as e:
        print(type(e).__name__, e.exit_code, e.message, '|', e.hint)
"""


def said(code: str) -> str:
    return python(PROLOGUE + code).stdout


def test_an_unknown_backend_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown backend 'cuda'") as caught:
        find_backend("cuda")
    assert "tensorrt, tensorrt_rtx" in caught.value.hint


def test_with_neither_package_both_extras_are_named() -> None:
    text = said("sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None\nattempt(find_backend)")
    assert "BackendMissingError 4 TensorRT is not installed" in text
    assert ".[trt-rtx]" in text
    assert "or the extra trt where a GPU is" in text


def test_a_named_package_that_is_missing_is_named_with_its_extra() -> None:
    text = said("sys.modules['tensorrt_rtx'] = None\nattempt(find_backend, 'tensorrt_rtx')")
    assert "BackendMissingError 4 tensorrt_rtx is not installed" in text
    assert 'pip install ".[trt-rtx]"' in text


def test_polygraphy_missing_is_said() -> None:
    text = said("sys.modules['polygraphy'] = None\nattempt(find_backend, 'tensorrt_rtx')")
    assert "BackendMissingError 4 Polygraphy is not installed" in text


def test_tensorrt_is_taken_where_a_gpu_answers() -> None:
    assert said(f"pose_as_classic({CLASSIC_10}, (9, 0))\nprint(find_backend().name, find_backend('tensorrt_rtx') if 0 else '')"
                ).strip() == "tensorrt"


def test_without_a_gpu_tensorrt_rtx_is_taken() -> None:
    assert said(f"pose_as_classic({CLASSIC_10}, None)\nprint(find_backend().name)").strip() == "tensorrt_rtx"


def test_tensorrt_that_does_not_work_gives_way_to_tensorrt_rtx_unless_it_was_named() -> None:
    text = said("""
import pathlib, tempfile
from gkp.converter.trt import backend
backend.device_capability = lambda: (8, 6)
with tempfile.TemporaryDirectory() as folder:
    (pathlib.Path(folder) / 'tensorrt').mkdir()
    (pathlib.Path(folder) / 'tensorrt' / '__init__.py').write_text('raise ImportError("libnvinfer.so.10: cannot open")')
    sys.path.insert(0, folder)
    print(find_backend().name)
    attempt(find_backend, 'tensorrt')
    sys.modules['tensorrt_rtx'] = None
    attempt(find_backend)
""").splitlines()
    assert text[0] == "tensorrt_rtx"
    assert text[1].startswith("BackendMissingError 4 tensorrt does not work here: libnvinfer.so.10: cannot open")
    assert text[2] == text[1]


def test_tensorrt_without_a_gpu_and_nothing_else_says_so() -> None:
    text = said(f"pose_as_classic({CLASSIC_10}, None)\nsys.modules['tensorrt_rtx'] = None\nattempt(find_backend)\n"
                "attempt(find_backend, 'tensorrt')")
    assert "BackendMissingError 4 tensorrt is installed, but no GPU answers here" in text
    assert "BackendMissingError 4 no GPU answers here, and tensorrt builds only on one | use --backend tensorrt_rtx" in text


@pytest.mark.parametrize("code", [
    "import polygraphy.backend.trt\nattempt(find_backend, 'tensorrt_rtx')",
    f"pose_as_classic({CLASSIC_10}, (9, 0))\nfind_backend('tensorrt')\nattempt(find_backend, 'tensorrt_rtx')"])
def test_polygraphy_bound_to_the_other_package_is_a_usage_error(code: str) -> None:
    text = said(code)
    assert "UsageError 2 this process uses Polygraphy with another package" in text
    assert "start a new process" in text


def test_a_package_without_strong_typing_is_too_old() -> None:
    text = said("pose_as_classic('8.6.1', {'EXPLICIT_BATCH': 0}, {'FP16': 0}, (8, 6))\nattempt(find_backend)")
    assert "BackendMissingError 4 tensorrt 8.6.1 knows no strongly typed networks | install TensorRT 10 or later" in text


@pytest.mark.parametrize(("version", "network", "builder", "flags"), [
    ("10.13.0", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, {"FP16": 0}, 0b11),
    ("10.13.0", {"STRONGLY_TYPED": 1}, {"FP16": 0}, 0b10),
    ("11.0.0", {"STRONGLY_TYPED": 0}, {}, 0b1),
    ("11.9.0", {}, {}, 0)])
def test_network_flags_follow_the_attributes_not_the_version(version: str, network: dict[str, int], builder: dict[str, int],
                                                             flags: int) -> None:
    text = said(f"created = pose_as_classic({version!r}, {network}, {builder}, (9, 0))\n"
                "backend = find_backend()\n"
                "(built,) = build_engines(grouped_net('N'), TrtOptions(batch_profile=(1, 8, 64)), backend)\n"
                "info = built.info\n"
                "print(created, built.file_name, info.package, info.version, info.capabilities, info.strongly_typed)\n"
                "print(len(built.data) > 10_000, [l.groups for l in info.layers if l.kind == 'CONVOLUTION'])")
    assert text.splitlines() == [f"[{flags}] engine.sm90.trt tensorrt {version} ['9.0'] True", "True [1, 4, 32]"]


def test_the_classic_package_builds_for_its_own_gpu_and_keeps_a_timing_cache() -> None:
    text = said(f"""
import pathlib, tempfile
pose_as_classic({CLASSIC_10}, (9, 0))
backend = find_backend('tensorrt')
def build(**options):
    return attempt(build_engines, grouped_net(), TrtOptions(**options), backend)
with tempfile.TemporaryDirectory() as folder:
    cache = pathlib.Path(folder) / 'timing.cache'
    first, second = build(timing_cache=cache), build(timing_cache=cache)
    print(first == second, cache.stat().st_size > 0)
    build(timing_cache=pathlib.Path(folder) / 'absent' / 'timing.cache')
build(compute_capability=((8, 6),))
build(runtime_cache=cache)
print(build(compute_capability=((9, 0),), workspace=1 << 31, channels_last=True)[0].info.inputs[0].format)
print('channels_last' in str(backend), 'ComputeCapability' in vars(sys.modules['tensorrt']))
""").splitlines()
    assert text[0] == "True True"
    assert text[1].startswith("FileError 6")
    assert text[1].endswith("cannot be written | give a file in a directory that exists")
    assert text[2].startswith("UsageError 2 tensorrt builds only for the GPU here, of compute capability 9.0")
    assert text[3].startswith("UsageError 2 tensorrt compiles nothing when it runs, so it has no runtime cache")
    assert text[4:] == ["HWC", "False False"]
