"""What several processes need beside Lightning's strategies: sharding, and equal statistics to evaluate with."""

from __future__ import annotations

from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from effvit.errors import ConfigError

#: What objectives call beside ``forward``: their parameters must be gathered for these too.
_FORWARD_METHODS = ("embed", "forward_tokens")


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the parameters of each part of ``network`` in place; gradients and optimizer states follow.

    Trunk and heads are gathered whole when they run. BatchNorm statistics stay with each process, as under DDP.

    Args:
        network: Trunk and heads.
        mesh: Processes to shard over, one-dimensional.

    Raises:
        ConfigError: A weight is not contiguous, as in channels_last memory, which FSDP2 cannot shard.
    """
    if not all(parameter.is_contiguous() for parameter in network.parameters()):
        raise ConfigError(
            "ModelParallelStrategy cannot shard weights in channels_last memory: --model.channels_last false"
        )
    for part in network.children():
        fully_shard(part, mesh=mesh)
        for method in _FORWARD_METHODS:
            if hasattr(part, method):
                register_fsdp_forward_method(part, method)


def share_buffers(network: nn.Module) -> None:
    """Gives every process the buffers of the first, in place: all evaluate the network that a checkpoint holds.

    BatchNorm statistics follow the images of each process. DDP hands out those of the first at each training step, so
    that the last update remains different; sharding never does.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for buffer in network.buffers():
            distributed.broadcast(buffer, src=0)
