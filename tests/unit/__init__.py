"""Tests of one process, on the CPU."""
