"""Convolutions of integers: sums of products in int32, exact, and what becomes of them."""
