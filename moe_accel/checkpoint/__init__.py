"""Saving and resuming: hub layout in and out, complete or an error. `resume.py` shows where it is hooked in."""

from moe_accel.checkpoint.load import load_hub_checkpoint
from moe_accel.checkpoint.resume import install, install_on_model

__all__ = ["install", "install_on_model", "load_hub_checkpoint"]
