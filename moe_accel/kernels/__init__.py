"""The arithmetic that experts and dispatchers are made of; each operation stands beside its plain torch form."""
