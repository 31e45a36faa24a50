"""From a program to a plan: which kernel computes each step, and where every value lies."""
