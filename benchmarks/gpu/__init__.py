"""The GPU suite: dense networks, the pruning systems' own modules and what gkp convert writes for them, on every engine
that a GPU machine has; and the sweep behind the cost table of --target trt."""
