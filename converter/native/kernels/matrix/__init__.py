"""Convolutions by instructions that multiply matrices: of bytes and of bfloat16."""
