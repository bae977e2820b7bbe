"""Batch norms over the windows of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

__all__ = ["SharedBatchNorm2d", "share_norms"]


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; each rank's gradient is the sum of all ranks' gradients, too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total


def _sum_over_ranks(own: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(own)
    return total


class SharedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm whose mean and variance in training are those of the whole batch, over all ranks.

    As PyTorch's SyncBatchNorm, which runs on GPUs alone, so that no test on a CPU would see what a GPU machine does. Ranks may
    have different numbers of windows. In eval mode it is the batch norm that it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) → the same shape and dtype."""
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(input)
        x = input.float()
        pixels = x.new_full((1,), x.numel() / x.shape[1])
        total = _sum_over_ranks(torch.cat([x.sum((0, 2, 3)), pixels]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean[:, None, None]
        variance = _sum_over_ranks(centred.square().sum((0, 2, 3))) / count
        self._note(mean.detach(), variance.detach(), count)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Running statistics, as `nn.BatchNorm2d` keeps them."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def share_norms(network: nn.Module) -> None:
    """Make all batch norms of a network shared ones, in place; its parameters stay the same objects."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            # Nothing but the forward pass differs.
            module.__class__ = SharedBatchNorm2d
