"""What options of the command line may be, where that is one of a few words."""

from enum import StrEnum


class Layout(StrEnum):
    """The layouts that `convert --to` writes: of checkpoints, and `peft` and `per-expert` of adapters."""

    stacked = "stacked"
    per_expert = "per-expert"
    hub = "hub"
    te_grouped = "te-grouped"
    nemo = "nemo"
    sonicmoe = "sonicmoe"
    peft = "peft"


class ModelLayout(StrEnum):
    """The layouts that `merge --to` writes. A type checker reads no enumeration that is made of another."""

    stacked = "stacked"
    per_expert = "per-expert"
    hub = "hub"
    te_grouped = "te-grouped"
    nemo = "nemo"
    sonicmoe = "sonicmoe"


class Dequantize(StrEnum):
    """What `convert --dequantize` writes."""

    bf16 = "bf16"


class Verify(StrEnum):
    """How much `convert` checks."""

    none = "none"
    header = "header"
    full = "full"


class LoraOrder(StrEnum):
    """What A of a stacked adapter acts on: the input (`standard`), or the output."""

    standard = "standard"
    swapped = "swapped"


class LoraBLayout(StrEnum):
    """Which columns of a stacked adapter's B belong to an expert."""

    rank_major = "rank_major"
    grouped_by_expert = "grouped_by_expert"


class Suite(StrEnum):
    """What `bench` measures."""

    kernel = "kernel"
    full = "full"
    lora = "lora"
