"""Checkpoint conversion between expert layouts, bit for bit.

`layout.py` reads the family tables of `converters/`, `plan.py` turns safetensors headers into a list of strided copies,
and the other files carry the copies out. Nothing here needs torch: a conversion is a permutation of bytes.
"""
