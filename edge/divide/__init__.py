"""From a network to a plan: who computes what, cut, written, and verified. The only part that needs the converter."""
