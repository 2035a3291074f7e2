"""`kept_layers: auto`: as many layers escape gradient checkpointing as the GPU has memory for.

A hook before each training forward of the module that holds the layers does it all: it takes up the step that has
passed (`policy.py`), asks how many layers this forward can afford (`budget.py`), and switches them. A step ends with
`step()` of an optimizer that has parameters of the layers, so plain loops, Trainer, TRL and gradient accumulation are
all the same here. Where ranks share layers (FSDP2, and expert parallelism on it) the hook is a collective call: tokens
and memory are those of the rank that has least room, and all ranks keep the same layers.

Within a step layers are only given up, not added: `lean` of a layer must not change between a forward and its
recompute. Between steps both are free, and both cost nothing but the setting of flags.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_accel.backward import in_backward
from moe_accel.errors import ConfigError
from moe_accel.kept import memory
from moe_accel.kept.layers import CHOSEN, checkpointed_layers, is_checkpointed, is_kept, keep_layers, set_kept
from moe_accel.kept.memory import MARGIN, Memory
from moe_accel.kept.policy import Policy, Step
from moe_accel.ranks import tell

GIB = 2**30
INF = float("inf")


def keep(model: nn.Module, asked: int | str, accelerator: Any) -> list[str]:
    """Keep a number of layers, or let them be chosen; returns what the report says.

    Args:
        model: of transformers, not yet sharded.
        asked: `kept_layers` of the config: a number, or "auto".
        accelerator: whose it is.

    Raises:
        ConfigError: there are not so many layers, or who checkpoints them can't leave any out, or not now and then.
    """
    fsdp_plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if asked != "auto":
        return keep_layers(model, int(asked), fsdp_plugin)
    _refuse(model, accelerator, fsdp_plugin)
    read = memory.memory_of(accelerator.device)
    if read is None:
        return [f"kept_layers: auto keeps none: the memory of {accelerator.device.type} can't be read"]
    layers = checkpointed_layers(model)
    if not layers:
        return [f"kept_layers: auto keeps none: {type(model).__name__} has no layers that are checkpointed"]
    together = accelerator.distributed_type == DistributedType.FSDP and accelerator.num_processes > 1
    auto = Auto(list(layers.values()), read, together)
    holder = model.get_submodule(_common_parent(list(layers)))
    holder.register_forward_pre_hook(auto, with_kwargs=True)
    holder.register_forward_hook(_After(auto))
    vars(model)[CHOSEN] = True
    return ["kept_layers: auto measures memory in the first steps where layers are checkpointed, then says how many"]


def _refuse(model: nn.Module, accelerator: Any, fsdp_plugin: Any) -> None:
    dynamo = getattr(getattr(accelerator.state, "dynamo_plugin", None), "backend", None)
    kind = accelerator.distributed_type
    problem = None
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP):
        problem = f"needs one GPU, DDP or FSDP2, not {kind.value}"
    elif kind == DistributedType.FSDP and fsdp_plugin.fsdp_version != 2:
        problem = f"needs FSDP version 2, not {fsdp_plugin.fsdp_version}"
    elif getattr(fsdp_plugin, "activation_checkpointing_offload", False):
        problem = "can't be combined with activation_checkpointing_offload"
    elif getattr(dynamo, "value", "NO") != "NO" or hasattr(model, "_orig_mod"):
        problem = "switches layers between steps, and torch.compile would compile them anew"
    if problem is not None:
        raise ConfigError(f"kept_layers=auto {problem}", "kept_layers: 0, or the number of layers to keep")


class Auto:
    """The hook before a training forward, and what it remembers from one to the next.

    Copied or pickled with its module it is a hook that does nothing: the copy is another model.

    Args:
        layers: all that are checkpointed, in order.
        memory: of this rank's device.
        together: whether all ranks run the same forwards and must keep the same layers.
    """

    def __init__(self, layers: Sequence[nn.Module], memory: Memory, together: bool) -> None:
        self.layers = list(reversed(layers))  # the last is kept first: its backward comes soonest
        kinds = [_make(layer) for layer in self.layers]
        self.policy = Policy([kinds.index(kind) for kind in kinds])
        self.memory = memory
        self.together = together
        self._group: Any = None
        self._watched: list[Any] = []
        self._said = ""
        self._kept = self._tokens = 0  # of this step; no tokens: it has not begun
        self._current = 0  # tokens of this forward
        self._alive, self._most_alive = 0, 1
        self._stepped = False
        self._resident = self._peak_before = self._peak = self._retries = 0
        self._floor = 0  # what was seen to be allocated in this step, whoever resets the peak
        self._passing, self._holding = self._zeros(), self._zeros()
        self._optimizers: weakref.WeakSet = weakref.WeakSet()
        _tell_of_steps(self)

    def __reduce__(self) -> tuple:
        return _idle, ()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward of the module that holds the layers."""
        if not _is_training(module) or not any(map(is_checkpointed, self.layers)) or self.policy.stage == "none":
            return
        tokens, step = self._agree(max(1, _num_tokens(args, kwargs)))
        if step is not None:
            self._end(step)
        if not self._tokens:
            self._begin()
        self._alive += 1
        self._most_alive = max(self._most_alive, self._alive)
        self._current = tokens
        chosen = self.policy.choose(tokens * self._most_alive)
        begun = self._tokens > 0
        for at, layer in enumerate(self.layers):
            set_kept(layer, at in chosen and (not begun or is_kept(layer)))
        if tokens * self._most_alive > self._tokens:
            self._tokens = tokens * self._most_alive
            self._kept = sum(map(is_kept, self.layers))

    def after_forward(self, module: nn.Module, output: Any) -> None:
        """After the forward: to be told of its backward, after which it holds nothing any more."""
        first = _first_tensor(output, lambda each: each.requires_grad)
        if self._alive and first is not None and _is_training(module):
            first.register_hook(self._forget_alive)
            self._floor = max(self._floor, self.memory.allocated())

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of any optimizer: the end of a step of training, where it has parameters of the layers."""
        if not self._tokens:
            return
        if optimizer not in self._optimizers:
            own = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
            if not any(id(each) in own for group in optimizer.param_groups for each in group["params"]):
                return
            self._optimizers.add(optimizer)
        self._stepped = True
        self._peak = max(self.memory.peak(), self._floor)

    def _forget_alive(self, _gradient: Tensor) -> None:
        self._alive = 0

    def _zeros(self) -> list[float]:
        return [0.0] * len(self.policy.examples)

    def _agree(self, tokens: int) -> tuple[int, Step | None]:
        """Tokens of the largest forward beside this one, and the step that has passed if one has."""
        own: list[float] = [-INF] * 5
        if self._stepped:
            limit = self.memory.available() - MARGIN * self.memory.total
            peak = self._peak if self._peak >= self._peak_before else INF  # the script reset it within the step
            reached = self._peak if self._peak > self._peak_before else 0
            own = [peak, reached, -self._resident, -limit, self.memory.num_retries() > self._retries]
        values = [tokens, *own, *self._passing, *self._holding]
        if self.together:
            values = self._most_of_ranks(values)
        tokens, (peak, reached, resident, limit, pressed) = int(values[0]), values[1:6]
        if peak == -INF:
            return tokens, None
        passing, holding = values[6 : 6 + len(self._passing)], values[6 + len(self._passing) :]
        return tokens, Step(peak, reached, -resident, -limit, bool(pressed), passing, holding)

    def _most_of_ranks(self, values: list[float]) -> list[float]:
        if self._group is None:  # of hosts: devices go on meanwhile
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.MAX, group=self._group)
        return together.tolist()

    def _begin(self) -> None:
        """A step begins."""
        if self.policy.is_measuring:
            self._watch()
        self._resident = self.memory.allocated()
        self._peak_before = self.memory.peak()
        self._retries = self.memory.num_retries()

    def _end(self, step: Step) -> None:
        """A step has passed."""
        kept, tokens = self._kept, self._tokens
        for handle in self._watched:
            handle.remove()
        measured = self.policy.is_measuring
        had = self.policy.budget.most(tokens) if self.policy.budget is not None else kept
        lower = self.policy.learn(step, kept, tokens)
        self._say(step, kept, tokens, lower and had)
        self._watched, self._passing, self._holding = [], self._zeros(), self._zeros()
        self._kept = self._tokens = self._alive = self._floor = 0
        self._stepped = False
        if measured or self.policy.is_measuring:
            self.memory.forget_peak()

    def _watch(self) -> None:
        """Look at what one layer of each kind leaves behind in this step."""
        for number, at in enumerate(self.policy.examples.values()):
            layer, before = self.layers[at], [0]

            def start(layer: nn.Module, _args: Any, before: list = before) -> None:
                before[0] = self.memory.allocated()

            def end(layer: nn.Module, _args: Any, _output: Any, number: int = number, before: list = before) -> None:
                if layer.training and not in_backward():
                    left = (self.memory.allocated() - before[0]) / self._current
                    found = self._holding if is_kept(layer) else self._passing
                    found[number] = max(found[number], left)

            self._watched += [layer.register_forward_pre_hook(start), layer.register_forward_hook(end)]

    def _say(self, step: Step, kept: int, tokens: int, lowered_from: int) -> None:
        policy, total = self.policy, f"{self.memory.total / GIB:.1f} GiB"
        if policy.stage == "none":
            tell(f"kept_layers: auto keeps none: {policy.why_none} ({step.peak / GIB:.1f} of {total} at the peak)")
        if policy.budget is None:
            return
        num, now = policy.budget.num_layers, policy.budget.most(tokens)
        if now < lowered_from:
            reason = f"{step.peak / GIB:.1f} of {total} at the peak of a step with {kept}"
            tell(f"kept_layers: auto keeps {now} of {num} layers from now on: {reason}")
            self._said = self._said or reason
        elif not self._said and now == kept and not self._watched and step.peak < INF:
            each = policy.budget.bytes_of(num, tokens) / num / GIB
            self._said = f"{step.peak / GIB:.1f} of {total} at the peak, {each:.2f} GiB a layer"
            tell(f"kept_layers: auto keeps {now} of {num} layers: {self._said}")


class _After:
    """The hook after a forward; as `Auto`, it does not follow its module into a copy."""

    def __init__(self, auto: Auto) -> None:
        self.auto = auto

    def __reduce__(self) -> tuple:
        return _idle, ()

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.auto.after_forward(module, output)


def _idle() -> Callable[..., None]:
    return _nothing


def _nothing(*_args: Any) -> None:
    """What a copy of a hook does."""


def _tell_of_steps(auto: Auto) -> None:
    """Call `auto.stepped` after steps of optimizers, as long as there is somebody to call."""
    known = weakref.ref(auto)

    def told(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        if (listener := known()) is not None:
            listener.stepped(optimizer)

    handle = register_optimizer_step_post_hook(told)
    weakref.finalize(auto, handle.remove)


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not in_backward()


def _make(layer: nn.Module) -> tuple:
    """What layers have in common that hold as much as each other: class, and shapes of parameters."""
    return type(layer).__qualname__, *((name, tuple(each.shape)) for name, each in layer.named_parameters())


def _num_tokens(args: tuple, kwargs: Mapping[str, Any]) -> int:
    given = [kwargs[name] for name in ("input_ids", "inputs_embeds") if isinstance(kwargs.get(name), Tensor)]
    first = given[0] if given else _first_tensor((*args, *kwargs.values()))
    return 1 if first is None else first.shape[:2].numel()


def _first_tensor(found: Any, fits: Callable[[Tensor], bool] = lambda _: True) -> Tensor | None:
    if isinstance(found, Tensor):
        return found if fits(found) else None
    values = found.values() if isinstance(found, Mapping) else found if isinstance(found, (tuple, list)) else ()
    inside = (_first_tensor(each, fits) for each in values)
    return next((each for each in inside if each is not None), None)


def _common_parent(names: list[str]) -> str:
    """The module that holds the lists that layers of these names are in."""
    parents = [name.split(".")[:-2] for name in names]
    shared = 0
    while all(len(each) > shared and each[: shared + 1] == parents[0][: shared + 1] for each in parents):
        shared += 1
    return ".".join(parents[0][:shared])
