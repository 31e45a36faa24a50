"""Opens an artefact and runs it. Imports neither torch nor onnx nor the converter."""
