"""The GPU suite: dense, as published and rewritten on every engine that a GPU machine has, and the sweep behind the cost
table of --target trt. These modules need numpy and PyTorch only, so that they run on a machine that nothing can be installed
on; `tables` needs rich, `calibrate` the converter."""
