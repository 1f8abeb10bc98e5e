"""Training of a model whose parameters are sharded over processes by torch's FSDP2."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy


class ShardedStrategy(ModelParallelStrategy):
    """Every process has a part of the parameters and of the data; ``configure_model`` of the module shards the network.

    Buffers, such as the running statistics of batch norms, are those of the first process, as in distributed data parallelism. A
    checkpoint is one file with the whole state, as those of other strategies.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Starts the process group, with the data shared among all processes."""
        self._data_parallel_size = self.num_processes * self.num_nodes
        super().setup_environment()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        self.share_buffers()
        return super().validation_step(*args, **kwargs)

    def share_buffers(self) -> None:
        """Copies the buffers of the first process to the others."""
        assert self.model is not None
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)
