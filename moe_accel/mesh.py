"""Who shares what: the dense mesh is accelerate's own; the sparse mesh, over the same ranks, is for the experts.

    dense    (dp_replicate, dp_shard)         attention, router, embeddings, shared experts: FSDP2 as accelerate does it
    sparse   (dp_replicate, efsdp, ep)        expert weights: dimension 0 split over ep, FSDP2 over efsdp

with efsdp * ep = dp_shard and ep innermost, so that the ranks of an `ep` group are neighbours. These ranks are
data-parallel ranks: each has its own batch. The names are those of torchtitan and transformers.
"""

from collections.abc import Iterable

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_accel.errors import ConfigError


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def check_ranks(ep_size: int, num_ranks: int, dp_replicate_size: int, other_size: int = 1) -> int:
    """The dp_shard size that remains of `num_ranks`.

    Args:
        ep_size: ranks that share the experts.
        num_ranks: all ranks of the job.
        dp_replicate_size: HSDP replicas.
        other_size: ranks of tensor, context and sequence parallelism.

    Raises:
        ConfigError: the sizes do not divide the ranks, with the sizes that would.
    """
    fixed = dp_replicate_size * other_size
    if num_ranks % fixed:
        raise ConfigError(
            f"dp_replicate_size={dp_replicate_size} must divide the {num_ranks // other_size} data-parallel ranks",
            f"any of {divisors(num_ranks // other_size)}",
        )
    dp_shard_size = num_ranks // fixed
    if dp_shard_size % ep_size:
        whose = f"num_processes={num_ranks}"
        if fixed > 1:
            whose = f"the {dp_shard_size} ranks that FSDP shards over (num_processes={num_ranks} / {fixed})"
        raise ConfigError(f"ep_size={ep_size} must divide {whose}", f"ep_size: any of {divisors(dp_shard_size)}")
    return dp_shard_size


def check_experts(ep_size: int, num_experts: Iterable[int], dp_shard_size: int) -> None:
    """Check that every layer's experts can be split evenly over an `ep` group.

    Raises:
        ConfigError: with the sizes that fit the model and the ranks.
    """
    counts = sorted(set(num_experts))
    wrong = [count for count in counts if count % ep_size]
    if not wrong:
        return
    fitting = [size for size in divisors(dp_shard_size) if not any(count % size for count in counts)]
    raise ConfigError(
        f"ep_size={ep_size} must divide num_experts={', '.join(map(str, wrong))}",
        f"ep_size: any of {fitting} fits this model on these ranks",
    )


def build_sparse_mesh(device_type: str, dp_replicate_size: int, dp_shard_size: int, ep_size: int) -> DeviceMesh:
    """The experts' mesh: (efsdp, ep), with dp_replicate in front where there are replicas. A collective call."""
    shape, names = (dp_shard_size // ep_size, ep_size), ("efsdp", "ep")
    if dp_replicate_size > 1:
        shape, names = (dp_replicate_size, *shape), ("dp_replicate", *names)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    mesh["efsdp", "ep"]._flatten("efsdp_ep")  # lets DTensor reduce a norm over both in one collective
    return mesh


def efsdp_mesh(sparse_mesh: DeviceMesh) -> DeviceMesh:
    """The part of the sparse mesh that FSDP2 shards (and replicates) experts over."""
    names = sparse_mesh.mesh_dim_names or ()
    return sparse_mesh[tuple(name for name in names if name != "ep")]
