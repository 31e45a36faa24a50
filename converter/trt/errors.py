"""TensorRT's texts as errors that say what to do.

The texts were seen with TensorRT for RTX 1.7; the classic package words them alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError
from gkp.text import clean

_SHOWN, _LONGEST = 3, 200
_NO_PROFILE = "leave out --batch-profile, or add --dynamic-batch"
_REPLACE = "replace the operator in the model, or use --target ort"


class _Rule(NamedTuple):
    """pattern: found in TensorRT's text; its groups fill in the message."""

    pattern: str
    kind: type[GkpError]
    message: str
    hint: str


_RULES = (
    _Rule("no optimization profile has been defined", UsageError,
          "the batch is dynamic, TensorRT needs its range", "give it, e.g. --batch-profile 1,8,64"),
    _Rule(r"MIN<=OPT<=MAX", UsageError, "the batch profile is out of order", "MIN,OPT,MAX, e.g. --batch-profile 1,8,64"),
    _Rule(r"Dimension mismatch for tensor (\S+) and profile \d+", UsageError,
          "the batch profile does not fit input {0!r}, some size of which is fixed", _NO_PROFILE),
    _Rule(r"Input tensor (\S+) has static dimensions that don't match", UsageError,
          "the batch of input {0!r} is fixed, the batch profile says otherwise", _NO_PROFILE),
    _Rule(r"Dynamic input tensor (\S+) is missing dimensions in profile", UsageError,
          "the batch profile says nothing of input {0!r}", "give it, e.g. --batch-profile 1,8,64"),
    _Rule(r"Cannot compile operation '([^']*)' for Turing \(SM75\): (.*?)(?: is not supported)?$", UsageError,
          "{0!r} cannot be built for compute capability 7.5: {1} is not supported",
          "use --precision fp16, or leave 75 out of --compute-capability"),
    _Rule(r"Cannot compile for target\(s\) (.*?), because the model contains HW-specific datatypes: (.*)$", UsageError,
          "the model computes in {1}, which {0} cannot", "leave that capability out of --compute-capability"),
    _Rule(r"has dataType (\w+) unsupported by tensor's allowed TensorFormats", UsageError,
          "{0} inputs and outputs cannot be channels-last here", "leave out --channels-last"),
    _Rule(r"workspace (?:limit|memory)", UsageError, "some layer needs more scratch memory than --workspace allows",
          "give more, or leave out --workspace"),
    _Rule(r"Requested size was (\d+) bytes", UsageError,
          "the network needs {0} bytes of scratch memory at this batch", "use a smaller batch, or raise --workspace"),
    _Rule(r"(?i)out of memory", UsageError,
          "there is not enough memory for this network at this batch", "use a smaller batch"),
    _Rule(r"Plugin not found|plugin creator .* was not found", UnsupportedModelError,
          "TensorRT has no such operator", _REPLACE),
    _Rule(r"Kernel weight dimension failed to broadcast to input", UnsupportedModelError,
          "a convolution's weights and groups do not fit its input channels", "check how the model was made"),
    _Rule(r"(\S+): \w+ `input` and `kernel` must be of same type", UnsupportedModelError,
          "{0!r} mixes types: its weights are of another type than its input",
          "use --precision fp32, or check how the model was made"),
    _Rule(r"Failed to parse the ONNX model", UnsupportedModelError, "the file is not ONNX", "convert the checkpoint again"),
    _Rule(r"CUDA initialization failure|no CUDA-capable device|cudaErrorNoDevice", BackendMissingError,
          "no GPU answers here, and tensorrt builds only on one",
          "use --backend tensorrt_rtx, or build on the machine with the GPU"),
)


def explain(errors: Sequence[str]) -> GkpError:
    """The error for the ERROR lines of one build, the first line that is known wins; otherwise the first one cleaned."""
    for text in errors:
        if (known := _known(text)) is not None:
            return known
    text = bare(errors[0]) if errors else "it said nothing"
    return UnsupportedModelError(f"TensorRT cannot build the network: {text}", "use --no-engine, or --target ort")


def _known(text: str) -> GkpError | None:
    short = bare(text)
    for rule in _RULES:
        if match := re.search(rule.pattern, short):
            return rule.kind(rule.message.format(*match.groups()), rule.hint)
    return None


def explain_parser(errors: Sequence[Any]) -> GkpError:
    """The error for what the ONNX parser reports (objects of TensorRT's ParserError): operators that it does not take by
    their nodes' names, otherwise as `explain`."""
    unsupported = [_node(e) for e in errors if e.node_operator() and _is_unsupported(e)]
    if unsupported:
        more = len(unsupported) - _SHOWN
        names = ", ".join(unsupported[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return UnsupportedModelError(f"TensorRT does not take {names}", _REPLACE)
    for e in errors:
        if (known := _known(e.desc())) is not None:
            return type(known)(f"{known.message} ({_node(e)})" if e.node_operator() else known.message, known.hint)
    if not errors:
        return explain(())
    first = errors[0]
    where = f"{_node(first)}: " if first.node_operator() else ""
    return UnsupportedModelError(f"TensorRT cannot read the network: {where}{bare(first.desc())}",
                                 _REPLACE)


def _node(error: Any) -> str:
    name = error.node_name()
    shown = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
    return clean(f"{error.node_operator()} {shown!r}")


def _is_unsupported(error: Any) -> bool:
    """UNSUPPORTED_*, or an operator that is looked for among the plugins, which gkp never loads."""
    return error.code().name.startswith("UNSUPPORTED") or re.search(r"(?i)plugin", error.desc()) is not None


def bare(text: str) -> str:
    """TensorRT's first message in a text, without its function names, error numbers and source files."""
    first = re.split(r"\.? In \S+ at /\S+\)|\(cudaError", " ".join(text.split()))[0]
    text_only = re.sub(r"^.*?Error Code \d+: [\w ]+? ?\((?:\[\S+ \w+\] )?", "", first)
    text_only = re.sub(r"^\w+\.cpp:\d+: ERROR: .*?\[\d+\] ", "", text_only)
    return clean(text_only.removeprefix("Assertion failed: ").rstrip(".)").strip() or text)
