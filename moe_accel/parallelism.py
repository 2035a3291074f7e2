"""`MoEConfig`: the one object that plain loops, `TrainingArguments` and `SFTConfig` all hand to accelerate.

Accelerate calls `get_device_mesh` on the `ParallelismConfig` it was given, then `_validate_accelerator` with the live
`Accelerator`. The first is where the sizes are settled and the meshes built, the second where the plugin is installed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import DeviceMesh

from moe_accel.config import ENV_VAR, OPTION_NAMES, MoEOptions
from moe_accel.errors import ConfigError
from moe_accel.mesh import build_sparse_mesh, check_ranks


@dataclass
class MoEConfig(ParallelismConfig):
    """Accelerate's parallelism sizes, and how experts are spread and computed.

    Give it to `Accelerator(parallelism_config=...)` or `TrainingArguments(parallelism_config=...)`. `dp_shard_size` may
    be left out: it becomes all ranks that the other sizes leave.

    Attributes:
        ep_size: ranks that share one set of experts; divides both the number of experts and the data-parallel ranks.
        dispatcher: transport of tokens to experts: `auto`, `alltoall` or `deepep`. Unused at ep_size 1.
        kernels: how a rank computes its experts: `auto`, `reference` (a slow, true loop), `fused` or `te`.
        kept_layers: last layers that gradient checkpointing leaves out, each for memory, to save a recompute: a number,
            or `auto`, as many as the GPU has memory for, measured in the first steps.
        save_layout: of saved models: `per-expert`, as `save_pretrained` writes for the hub, or `stacked`, as in memory.
        async_save: write periodic checkpoints while training goes on, from a copy in host memory.
        padding_free: compute no padding in training where that changes no number (`auto`), or `off`.
        te_parts: what TransformerEngine computes under `kernels: te`: some of `experts`, `permutation`, `router`,
            `norms`, `attention`, `fp8`; the rest is as `fused`.
        cuda_graphs: record attention, and in expert parallelism blocks with experts, as CUDA graphs, for training with
            sequences of one length where the host is what takes the time; or `attention` alone.

    Raises:
        ConfigError: a value is wrong; all wrong values are listed. Or, when the Accelerator is made, they do not fit
            its ranks or its distributed type.
    """

    ep_size: int = 1
    dispatcher: str = "auto"
    kernels: str = "auto"
    kept_layers: int | str = 0
    save_layout: str = "per-expert"
    async_save: bool = False
    padding_free: str = "auto"
    te_parts: Sequence[str] = ("experts",)
    cuda_graphs: bool | str = False

    sparse_mesh = None  # the experts' mesh, once an Accelerator has the config; not a field

    @classmethod
    def from_options(cls, options: MoEOptions) -> "MoEConfig":
        """The config of a `moe_config` section, with accelerate's sizes from its own section (its environment)."""
        return cls(**{name: getattr(options, name) for name in OPTION_NAMES})

    def __post_init__(self) -> None:
        options = MoEOptions(**{name: getattr(self, name) for name in OPTION_NAMES})
        problems = options.problems()
        if problems:
            raise ConfigError.collect(problems, type(self).__name__)
        self.te_parts = options.te_parts
        self._dp_shard_given = self.dp_shard_size is not None
        super().__post_init__()
        self._dp_shard_given = self._dp_shard_given or self._sizes["dp_shard"] > 1

    def get_device_mesh(self, device_type: str | None = None) -> DeviceMesh | None:
        """Settle the sizes for the ranks at hand and build both meshes; a collective call the first time.

        Raises:
            ConfigError: the sizes do not fit the ranks, or the job is not FSDP2 and needs to be.
        """
        if self.device_mesh is None and device_type is not None:
            self._fit_to_ranks(AcceleratorState())
        mesh = super().get_device_mesh(device_type)
        if self.sparse_mesh is None and self.ep_size > 1 and device_type is not None:
            sizes = self._sizes["dp_replicate"], self._sizes["dp_shard"], self.ep_size
            self.sparse_mesh = build_sparse_mesh(device_type, *sizes)
        return mesh

    def _fit_to_ranks(self, state: Any) -> None:
        is_fsdp = state.distributed_type == DistributedType.FSDP
        if self.ep_size > 1:
            if not is_fsdp:
                found = getattr(state.distributed_type, "value", state.distributed_type)
                raise ConfigError(
                    f"ep_size={self.ep_size} needs distributed_type FSDP, not {found} "
                    f"(num_processes={state.num_processes})",
                    "in the accelerate config write\ndistributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n"
                    f"and without one, as with torchrun, let {ENV_VAR} be the path of such a file, or export\n"
                    "ACCELERATE_USE_FSDP=true FSDP_VERSION=2",
                )
            if state.fsdp_plugin.fsdp_version != 2:
                raise ConfigError(
                    f"ep_size={self.ep_size} needs FSDP version 2, not {state.fsdp_plugin.fsdp_version}",
                    "in the accelerate config write\nfsdp_config: {fsdp_version: 2}",
                )
            others = ("tp_size", "cp_size", "sp_size")
            combined = [f"{name}={getattr(self, name)}" for name in others if getattr(self, name) > 1]
            if combined:
                raise ConfigError(
                    f"ep_size={self.ep_size} cannot be combined with {', '.join(combined)}",
                    "leave tensor, context and sequence parallelism at 1",
                )
        if not is_fsdp:
            return
        replicas = self._sizes["dp_replicate"]
        fitting = check_ranks(self.ep_size, state.num_processes, replicas, self.non_data_parallel_size)
        if self._dp_shard_given and self.dp_shard_size != fitting:
            raise ConfigError(
                f"dp_shard_size={self.dp_shard_size} does not fit num_processes={state.num_processes} with "
                f"dp_replicate_size={self.dp_replicate_size}",
                f"leave it out, or write dp_shard_size: {fitting}",
            )
        self._set_size("dp_shard", fitting)

    def _validate_accelerator(self, accelerator: Any) -> None:
        super()._validate_accelerator(accelerator)
        from moe_accel.plugin import install

        install(accelerator)

    def to_json(self) -> dict[str, Any]:
        """The fields, for `TrainingArguments.to_dict`. Accelerate's own returns nothing, and fails at our mesh."""
        return asdict(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without meshes: `training_args.bin` is read by other processes."""
        return {name: value for name, value in vars(self).items() if name not in ("device_mesh", "sparse_mesh")}
