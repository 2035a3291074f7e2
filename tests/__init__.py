"""Tests; a package, so that test files can share `tests.families`."""
