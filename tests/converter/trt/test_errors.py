"""TensorRT's texts, as they were logged, become errors that say what to do."""

from types import SimpleNamespace
from typing import Any

import pytest

from gkp.converter.trt.errors import bare, explain, explain_parser
from gkp.errors import BackendMissingError, GkpError, UnsupportedModelError, UsageError

BUILD = "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error"
MYELIN = "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check]"


@pytest.mark.parametrize(("text", "kind", "message", "hint"), [
    (f"{BUILD} (Network has dynamic or shape inputs, but no optimization profile has been defined. In validate at "
     "/_src/optimizer/api/network.cpp:4023)", UsageError, "the batch is dynamic, TensorRT needs its range", "--batch-profile 1,8,64"),
    (f"{BUILD} (Dimension mismatch for tensor x and profile 0. At dimension axis 2, profile has min=8, opt=16, max=16 but "
     "tensor has 16. In validate at /_src/optimizer/api/network.cpp:4054)", UsageError, "input 'x'", "--dynamic-batch"),
    (f"{BUILD} (Input tensor x has static dimensions that don't match kOPT dimensions in profile index 0. Input dimensions are "
     "[1,32,16,16] but profile dimensions are [8,32,16,16]. In operator() at /_src/optimizer/api/network.cpp:4067)", UsageError,
     "the batch of input 'x' is fixed", "leave out --batch-profile"),
    (f"{BUILD} (Dynamic input tensor x is missing dimensions in profile 0. In validate at /_src/n.cpp:1)", UsageError,
     "says nothing of input 'x'", "--batch-profile"),
    ("IOptimizationProfile::isValid: Error Code 4: API Usage Error (Invalid optimization profiles for input tensors x, please "
     "ensure that the optimization profiles satisfy MIN<=OPT<=MAX. In isValid at /_src/p.cpp:367)", UsageError, "out of order", "MIN,OPT,MAX"),
    ("IBuilder::buildSerializedNetwork: Error Code 3: API Usage Error (x: has dataType Float unsupported by tensor's allowed "
     "TensorFormats. In operator() at /_src/optimizer/api/network.cpp:3537)", UsageError, "channels-last", "leave out"),
    (f"{MYELIN} Cannot compile operation 'fc' for Turing (SM75): FP32 GEMM is not supported. In compileGraph at "
     "/_src/optimizer/myelin/codeGenerator.cpp:2012)", UsageError, "'fc' cannot be built for compute capability 7.5: FP32 GEMM",
     "--precision fp16"),
    (f"{MYELIN} Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3. In compileGraph "
     "at /_src/optimizer/myelin/codeGenerator.cpp:2012)", UsageError, "computes in fp8_e4m3, which sm80 cannot", "--compute-capability"),
    (f"{MYELIN} Tactic Selection: no tactics to implement the operation within workspace limit. Consider increase the allowed "
     "workspace size if applicable.; [tactic.cpp:264: run] Error during tactic selection. In compileGraph at /_src/c.cpp:1)",
     UsageError, "scratch memory", "--workspace"),
    ("[codeGenerator.cpp::createMyelinGraph::1203] Error Code 2: Internal Error (Assertion mContext.maxScratchSize > 0 failed. "
     "Compiling this graph requires workspace memory greater than 0. Please increase the workspace memory provided to the "
     "builder. In createMyelinGraph at /_src/optimizer/myelin/codeGenerator.cpp:1203)", UsageError, "scratch memory", "--workspace"),
    ("[localCheckMacros.cpp::getErrorStr::132] Error Code 2: OutOfMemory (Requested size was 68719487272 bytes.)", UsageError,
     "needs 68719487272 bytes", "smaller batch"),
    ("CUDA initialization failure with error: 35. Please check your CUDA installation", BackendMissingError, "no GPU", "tensorrt_rtx"),
])
def test_a_known_text_becomes_a_message_and_a_hint(text: str, kind: type[GkpError], message: str, hint: str) -> None:
    found = explain([text])
    assert type(found) is kind
    assert message in found.message
    assert hint in found.hint


def test_the_first_known_line_wins_and_an_unknown_one_is_shown_without_file_names() -> None:
    unknown = f"{BUILD} (Something new. In validate at /_src/optimizer/api/network.cpp:1)"
    assert isinstance(explain([unknown, "Requested size was 5 bytes"]), UsageError)
    found = explain([unknown, "Invalid Engine."])
    assert isinstance(found, UnsupportedModelError)
    assert found.message == "TensorRT cannot build the network: Something new"


@pytest.mark.parametrize("text", ["", "(", "Error Code 3: (", "Invalid Engine.", "a\x1b[31m\nb"])
def test_any_text_gives_one_printable_line(text: str) -> None:
    assert bare(text).isprintable()
    assert explain([text]).message.isprintable()


def parser_error(code: str, desc: str, node: str = "the_node", operator: str = "Det") -> Any:
    return SimpleNamespace(code=lambda: SimpleNamespace(name=code), desc=lambda: desc, node_name=lambda: node,
                           node_operator=lambda: operator)


def test_unsupported_operators_are_listed_by_node() -> None:
    found = explain_parser([parser_error("UNSUPPORTED_NODE", "false", f"n{i}") for i in range(5)])
    assert found.message == "TensorRT does not take Det 'n0', Det 'n1', Det 'n2' and 2 more"
    assert found.exit_code == 3
    assert len(explain_parser([parser_error("UNSUPPORTED_NODE", "false", "n" * 100_000)]).message) < 300
    plugin = parser_error("INVALID_NODE", 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
                          "n", "Foo")
    assert explain_parser([plugin]).message == "TensorRT does not take Foo 'n'"


@pytest.mark.parametrize(("desc", "message"), [
    ("Assertion failed: (nchan == -1 || kernelWeights.shape.d[1] * ngroup == nchan): Kernel weight dimension failed to broadcast "
     "to input.", "weights and groups do not fit its input channels (Conv 'c1')"),
    ("Invalid Node - c1\nITensor::getDimensions: Error Code 4: API Usage Error (c1: IConvolutionLayer `input` and `kernel` must be "
     "of same type. `input` type is Half but `kernel` is of type Float. In validateTypes at /_src/c.cpp:88)\n"
     "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/m.cpp:250 (cudaError 35: "
     "CUDA driver version is insufficient for CUDA runtime version))", "'c1' mixes types"),
    ("Something else entirely", "TensorRT cannot read the network: Conv 'c1': Something else entirely"),
])
def test_what_the_parser_says_of_a_node_keeps_the_node(desc: str, message: str) -> None:
    assert message in explain_parser([parser_error("INVALID_NODE", desc, "c1", "Conv")]).message


def test_a_parser_that_says_nothing_still_gives_an_error() -> None:
    assert isinstance(explain_parser([]), UnsupportedModelError)
    assert isinstance(explain_parser([parser_error("MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model.", "", "")]),
                      UnsupportedModelError)
