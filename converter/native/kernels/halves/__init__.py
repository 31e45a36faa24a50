"""Convolutions in float16."""
