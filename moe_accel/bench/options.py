"""What a benchmark is asked to do, and every rule that needs no torch to check."""

import difflib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from moe_accel.bench.shapes import SHAPES
from moe_accel.config import KERNELS
from moe_accel.errors import ConfigError

SUITES = ("kernel", "full", "lora")
ARMS = ("native", "compile", "liger", "moe_accel")
ROUTINGS = ("random", "balanced", "zipf", "hot")
DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bf16", "fp32")
LEAST_STEPS = 10
"""A median of fewer says little."""


@dataclass(frozen=True)
class Case:
    """One thing that every arm computes: `tokens` tokens a step through `layers` layers of a shape."""

    suite: str
    shape: str
    routing: str
    layers: int
    tokens: int
    seq_len: int

    @property
    def batch(self) -> int:
        """Sequences a step."""
        return self.tokens // self.seq_len


@dataclass(frozen=True)
class Options:
    """The options of `moe-accel bench`.

    Attributes:
        suite: `kernel` (one MoE block, forward and backward), `full` (a whole step, AdamW in it) or `lora` (the same
            with adapters on attention and experts over a frozen base).
        shapes, routings, arms: names of what is compared; every shape with every routing.
        layers: depths; two or more give ms per layer by difference. Empty: two of `tiny`, four of others.
        tokens: tokens a step; empty: `batch` sequences, or 16,384 (256 of `tiny`).
        batch: sequences a step, instead of `tokens`.
        seq_len: tokens a sequence; None: 4096 (64 of `tiny`), at most `tokens`.
        steps, warmup: steps that are timed, and steps before them.
        rank: of the adapters.
        checkpointing: recompute every layer in backward; not in the kernel suite.
        kernels: `moe_config`'s `kernels` in the arm moe_accel.
        peer_module: a file or module with a function `build(model, shape)`; adds the arm `peer`.
        device, dtype: auto is CUDA in bf16 where there is a GPU, and the CPU in fp32 where there is none.
        timeout_s: most seconds of one arm.
    """

    suite: str = "kernel"
    shapes: tuple[str, ...] = ("qwen3-30b-a3b",)
    routings: tuple[str, ...] = ("random",)
    arms: tuple[str, ...] = ("native", "moe_accel")
    layers: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    batch: int | None = None
    seq_len: int | None = None
    steps: int = 10
    warmup: int = 4
    rank: int = 16
    checkpointing: bool = False
    kernels: str = "auto"
    peer_module: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    timeout_s: float = 600

    def all_arms(self) -> tuple[str, ...]:
        """The arms in the order they run: native first, since the others are compared with it, a peer last."""
        named = sorted(dict.fromkeys(self.arms), key=lambda arm: arm != "native")
        return (*named, *(["peer"] if self.peer_module else []))

    def cases(self) -> Iterator[Case]:
        """Every combination that is asked for."""
        for shape, routing in product(dict.fromkeys(self.shapes), dict.fromkeys(self.routings)):
            tiny = shape == "tiny"
            seq_len = self.seq_len or (64 if tiny else 4096)
            default = self.batch * seq_len if self.batch else 256 if tiny else 16_384
            depths = (1,) if self.suite == "kernel" else self.layers or ((2,) if tiny else (4,))
            for layers, tokens in product(sorted(set(depths)), dict.fromkeys(self.tokens or (default,))):
                yield Case(self.suite, shape, routing, layers, tokens, min(seq_len, tokens))

    def check(self) -> None:
        """Raise ConfigError with every rule that is broken."""
        problems = list(dict.fromkeys(self._problems()))
        if problems:
            raise ConfigError.collect(problems, "bench", "moe-accel bench --help says what each option takes")

    def _problems(self) -> Iterator[str]:
        known = (
            ("suite", (self.suite,), SUITES),
            ("shape", self.shapes, tuple(SHAPES)),
            ("routing", self.routings, ROUTINGS),
            ("arms", self.arms, ARMS),
            ("device", (self.device,), DEVICES),
            ("dtype", (self.dtype,), DTYPES),
            ("kernels", (self.kernels,), KERNELS),
        )
        for name, values, allowed in known:
            if not values:
                yield f"{name} is empty; at least one of {', '.join(allowed)}"
            for value in values:
                if value not in allowed:
                    near = difflib.get_close_matches(value, allowed, n=1, cutoff=0.5)
                    meant = f" (did you mean {near[0]!r}?)" if near else ""
                    yield f"{name}={value!r} must be one of {', '.join(allowed)}{meant}"
        numbers = {"batch": self.batch, "seq_len": self.seq_len, "rank": self.rank, "timeout": self.timeout_s}
        for name, value in numbers.items():
            if value is not None and value <= 0:
                yield f"{name}={value} must be above 0"
        for name, values in (("layers", self.layers), ("tokens", self.tokens)):
            yield from (f"{name}={value} must be above 0" for value in values if value <= 0)
        if self.steps < LEAST_STEPS:
            yield f"steps={self.steps} must be at least {LEAST_STEPS}, for a median"
        if self.warmup < 1:
            yield f"warmup={self.warmup} must be at least 1: the first step compiles kernels"
        if self.tokens and self.batch:
            yield f"tokens={self.tokens[0]} and batch={self.batch} both say how many tokens; give one of them"
        if self.suite == "kernel" and (self.layers or self.checkpointing):
            yield "layers and checkpointing are for the suites full and lora; kernel is one MoE block"
        yield from self._problems_of_cases()
        if self.peer_module and not _is_there(self.peer_module):
            yield f"peer_module={self.peer_module!r} is neither a .py file nor a module that can be imported"

    def _problems_of_cases(self) -> Iterator[str]:
        positive = (*self.layers, *self.tokens, self.batch or 1, self.seq_len or 1)
        if min(positive) <= 0 or not set(self.shapes) <= set(SHAPES):
            return
        for case in self.cases():
            most = SHAPES[case.shape].released_layers
            if case.layers > most:
                yield f"layers={case.layers} is more than the {most} of {case.shape}"
            if case.tokens % case.seq_len:
                yield f"tokens={case.tokens} must be a multiple of seq_len={case.seq_len}"


def names(text: str) -> tuple[str, ...]:
    """`"a, b"` as `("a", "b")`."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def numbers(name: str, text: str) -> tuple[int, ...]:
    """`"4,8"` as `(4, 8)`; underscores as in Python.

    Raises:
        ConfigError: something is no whole number.
    """
    try:
        return tuple(int(word) for word in names(text))
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be whole numbers, separated by commas", f"--{name} 4,8") from None


def _is_there(module: str) -> bool:
    if module.endswith(".py"):
        return Path(module).is_file()
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
