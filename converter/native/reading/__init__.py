"""From an ONNX graph in the one form to a program: steps over the values of one image."""
