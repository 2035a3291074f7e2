"""Tests that need several processes: gloo on the CPU."""
