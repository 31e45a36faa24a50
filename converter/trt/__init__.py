"""TensorRT and TensorRT for RTX: from ONNX to engine files."""
