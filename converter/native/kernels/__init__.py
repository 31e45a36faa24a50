"""Generators of kernels: C++ for one step, given where its values lie in memory."""
