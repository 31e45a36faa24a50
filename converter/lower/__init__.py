"""From the one form to stock ONNX: candidates per layer, channel layouts, emission."""
