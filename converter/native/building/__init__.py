"""From a plan to a library: C++ sources, compilers, and what is measured with them."""
