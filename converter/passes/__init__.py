"""Rewrites of a graph, one per file. Each is `run(graph) -> changed` with a docstring that states its rule."""
