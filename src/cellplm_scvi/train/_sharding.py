"""Training with weights, gradients and optimiser state sharded over devices (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from cellplm_scvi.module import CellPLMModule

#: what ``train(strategy=...)`` calls it
FSDP = "fsdp"


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's FSDP2, over all devices; a checkpoint is one file with the whole of everything.

    Parameters
    ----------
    **kwargs
        Of :class:`lightning.pytorch.strategies.ModelParallelStrategy`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """Let all processes share the data."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def strategy_of(given: Any) -> Any:
    """The strategy for what a user asks for: FSDP2 for its name, everything else as it is.

    Raises
    ------
    ValueError
        For Lightning's strategies that shard in other ways: the former FSDP leaves a model behind that cannot be used, and
        tensors are not split here.
    """
    if given == FSDP:
        return ShardedStrategy()
    former = given.startswith(FSDP) if isinstance(given, str) else isinstance(given, FSDPStrategy)
    if former or (isinstance(given, ModelParallelStrategy) and not isinstance(given, ShardedStrategy)):
        name = f'"{given}"' if isinstance(given, str) else type(given).__name__
        raise ValueError(f'strategy={name} is not supported. Pass strategy="{FSDP}", which shards by FSDP2.')
    return given


def shard(module: CellPLMModule, mesh: DeviceMesh) -> None:
    """Shard the weights in place: each layer of the encoder is gathered for itself, the rest together."""
    for layer in module.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, "encode")


@contextmanager
def whole_afterwards(model: Any, strategy: Any) -> Iterator[None]:
    """Give a model, after training that shards its module, a whole one with the trained weights, on every rank.

    Where training raises, the module is again what it was before.
    """
    if not isinstance(strategy, ShardedStrategy):
        yield
        return
    whole: nn.Module = deepcopy(model.module)
    try:
        yield
    except BaseException:
        # other processes may be elsewhere, so nothing can be gathered
        model.module = whole
        raise
    state = get_model_state_dict(model.module, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(state)
    model.module = whole.to(model.module.device).eval()
