"""What one step is, in each suite, on a plain transformers model of random weights.

kernel      one MoE block, router included: forward, and backward from a given gradient to input and weights
full        forward with labels, backward, AdamW (torch's fused one), gradients dropped
lora        the same with PEFT adapters on attention and on all experts, everything else frozen
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moe_accel.bench import check
from moe_accel.bench.options import Case
from moe_accel.bench.routing import experts_children
from moe_accel.bench.shapes import SHAPES

STD = 0.02
"""Of random weights: what the released models' configs start from."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
LEARNING_RATE = 1e-5


def build(case: Case, device: torch.device, dtype: torch.dtype, rank: int, checkpointing: bool) -> Any:
    """The model of a case in training mode, the same weights in every process.

    Args:
        case: what is measured.
        device: where the weights are made.
        dtype: of weights and adapters.
        rank: of the adapters, in the suite lora.
        checkpointing: whether backward recomputes every layer.
    """
    from transformers import AutoModelForCausalLM

    shape = SHAPES[case.shape]
    config = shape.block_config() if case.suite == "kernel" else shape.config(case.layers)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model = model.to(device)
    if case.suite == "lora":
        model = adapt(model, rank)
    randomise(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if case.suite == "lora":
            model.enable_input_require_grads()
    return model


def adapt(model: nn.Module, rank: int) -> Any:
    """The model with PEFT adapters of `rank` on attention and experts, in the model's own dtype."""
    from peft import LoraConfig, get_peft_model

    _, experts = next(experts_children(model))
    names = [name for name, parameter in experts.named_parameters(recurse=False) if parameter.ndim == 3]
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[name for name in ATTENTION if name in linear],
        target_parameters=[f"experts.{name}" for name in names],
    )
    adapted: Any = model
    return get_peft_model(adapted, config, autocast_adapter_dtype=False)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's fused AdamW over what is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Noise that depends on a tensor's name and shape alone; norms are 1, and Mamba's decays stay as they are."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(check.plain_name(name).encode()))
        if parameter.ndim >= 2 or last.endswith(("bias", "sinks")):
            parameter.normal_(0, STD, generator=generator)
            if last == "dt_bias":
                parameter.sub_(4.6)  # softplus of it is a step of 0.01
        elif last == "weight":
            parameter.fill_(1)


@dataclass
class Step:
    """A training step of one arm.

    Attributes:
        run: one whole step; returns the loss, None without one.
        once: forward and backward without the optimizer, of the first sequences only: how many is its argument.
        named: what `once` leaves behind to be compared, by name.
        forward: the forward alone; None where what it keeps is not measured.
        noise: a context in which `once` computes with the noise of a seed.
        kept: tensors that `once` keeps for `named`, to be dropped before memory is measured.
    """

    run: Callable[[], Tensor | None]
    once: Callable[[int], Tensor | None]
    named: Callable[[], Mapping[str, Tensor | None]]
    forward: Callable[[], Any] | None = None
    noise: Callable[[int], AbstractContextManager] = nullcontext
    kept: dict[str, Tensor | None] = field(default_factory=dict)


def trained_step(model: Any, optimizer: Any, case: Case, device: torch.device, vocabulary: int) -> Step:
    """The step of the suites full and lora."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocabulary, (case.batch, case.seq_len), generator=generator).to(device)

    def once(batch: int) -> Tensor:
        loss = model(input_ids=tokens[:batch], labels=tokens[:batch]).loss
        loss.backward()
        return loss.detach()

    def run() -> Tensor:
        loss = once(case.batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def named() -> dict[str, Tensor | None]:
        return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}

    return Step(run, once, named, noise=lambda seed: check.noise(model, seed))


def block_step(model: nn.Module, case: Case, device: torch.device, compiled: bool) -> Step:
    """The step of the suite kernel."""
    block, _ = next(experts_children(model))
    prefix = next(name for name, module in model.named_modules() if module is block)
    call: Any = torch.compile(block) if compiled else block
    config: Any = getattr(model, "config", None)
    dtype = next(block.parameters()).dtype
    shape = (case.batch, case.seq_len, config.hidden_size)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(shape, device=device, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(shape, device=device, generator=generator).to(dtype)
    parameters = list(block.parameters())
    seeds: list[int] = []
    kept: dict[str, Tensor | None] = {}

    def forward(x: Tensor = x) -> Tensor:
        output = call(x)
        return output[0] if isinstance(output, tuple) else output

    def once(batch: int) -> None:
        given = x.detach()[:batch]
        given = (check.move(given, seeds[0]) if seeds else given).requires_grad_()
        output = forward(given)
        output.backward(gradient[:batch])
        kept.update({"output": output.detach(), "gradient of the input": given.grad})

    def run() -> None:
        forward().backward(gradient)
        x.grad = None
        for parameter in parameters:
            parameter.grad = None

    def named() -> dict[str, Tensor | None]:
        return kept | {f"{prefix}.{name}": each.grad for name, each in block.named_parameters() if each.requires_grad}

    @contextmanager
    def noise(seed: int) -> Iterator[None]:
        seeds.append(seed)
        with check.noise(model, seed + 1):
            yield
        seeds.clear()

    return Step(run, once, named, forward, noise, kept)
