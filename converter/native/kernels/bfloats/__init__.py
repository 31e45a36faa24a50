"""Convolutions of bfloat16: sums of products in float32, and what they are stored as."""
