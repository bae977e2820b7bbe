"""How modalities meet: the modules of CMMPNet, DeepDualMapper, FuseNet and RFNorm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.models._blocks import DoubleConv, conv_bn_relu
from roadfuse_core.models._config import NetworkConfig

__all__ = ["DualEnhancement", "ForestScore", "GatedFusion", "Message", "Refinement", "mean_of_present"]

ABSENT = -1e4


class Message(nn.Module):
    """What one modality tells the others at one scale (CMMPNet, section III-B).

    Local: a convolution of its features (3×3 in the paper, 1×1 with batch norm as released). Global: maxima of the local
    message over grids of 1, 2, 4 … cells, through a linear layer, copied over the map. Each is gated by a sigmoid of a 1×1
    convolution of both. (N, C, H, W) → (N, C, H, W), to be added to the receiver.
    """

    def __init__(self, channels: int, config: NetworkConfig) -> None:
        super().__init__()
        k = config.message_kernel
        self.kinds = config.messages.split("+")
        self.local = nn.Sequential(nn.Conv2d(channels, channels, k, padding=k // 2, bias=False), nn.BatchNorm2d(channels))
        cells = sum(4**n for n in range(config.pyramid_levels))
        self.levels = config.pyramid_levels
        self.summary = nn.Linear(cells * channels, channels) if "global" in self.kinds else None
        gates = config.message_gates
        self.gates = nn.ModuleDict({f"of_{k}": nn.Conv2d(channels * len(self.kinds), channels, 1) for k in self.kinds if gates})

    def forward(self, x: Tensor) -> Tensor:
        """The gated sum of what is sent."""
        local = self.local(x)
        parts = {"local": local}
        if self.summary is not None:
            cells = torch.cat([F.adaptive_max_pool2d(local, 2**n).flatten(1) for n in range(self.levels)], 1)
            parts["global"] = F.relu(self.summary(cells))[..., None, None]  # (N, C, 1, 1): the same everywhere
        sent = [self._gate(kind, parts) * parts[kind] if self.gates else parts[kind] for kind in self.kinds]
        return sum(sent[1:], sent[0]).expand_as(local)

    def _gate(self, kind: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The 1×1 convolution of all parts, one by one, so that the global one is not copied over the map."""
        conv: nn.Conv2d = self.gates[f"of_{kind}"]  # type: ignore[assignment]
        first, *others = zip(self.kinds, conv.weight.chunk(len(self.kinds), 1), strict=True)
        seen = F.conv2d(parts[first[0]], first[1], conv.bias)
        return sum((F.conv2d(parts[k], weight) for k, weight in others), seen).sigmoid()


class DualEnhancement(nn.Module):
    """Dual Enhancement Module: every modality adds what the others tell, all at the same time (CMMPNet, equations 1-5)."""

    def __init__(self, names: Sequence[str], channels: int, config: NetworkConfig) -> None:
        super().__init__()
        self.messages = nn.ModuleDict({name: Message(channels, config) for name in names})

    def forward(self, features: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features of each modality (N, C, H, W), enhanced; an absent modality tells nothing."""
        told = {name: self.messages[name](x) for name, x in features.items()}
        out = dict(features)
        for name, other in permutations(features, 2):
            out[name] = torch.addcmul(out[name], told[other], present[other])
        return out


class GatedFusion(nn.Module):
    """Gated Fusion Module of one level (DeepDualMapper, equations 1 and 2).

    Adapters 1×1 into a common space; un-normalised gates G̃(i) = Up2(G̃(i-1)) + ψ1×1(φ²3×3[A_I, A_T]); softmax over the
    modalities. At the coarsest level G̃ has no predecessor.
    """

    def __init__(self, names: Sequence[str], channels: int) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({name: nn.Conv2d(channels, channels, 1) for name in names})
        self.look = DoubleConv(channels * len(names), channels)
        self.decide = nn.Conv2d(channels, len(names), 1)

    def forward(
        self, features: Mapping[str, Tensor], before: Tensor | None, present: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Fuse one level.

        Args:
            features: (N, C, H, W) of each modality.
            before: (N, modalities, H', W') un-normalised gates of the coarser level.
            present: (N, 1, 1, 1) of each modality, 1 or 0; an absent one gets no weight.

        Returns:
            Adapted features, fused features (N, C, H, W), un-normalised gates and gates (N, modalities, H, W).
        """
        adapted = {name: self.adapters[name](x) for name, x in features.items()}
        raw: Tensor = self.decide(self.look(torch.cat(list(adapted.values()), 1)))
        if before is not None:
            raw = raw + F.interpolate(before, raw.shape[-2:], mode="nearest")
        there = torch.cat([present[name] for name in features], 1)  # (N, modalities, 1, 1)
        gates = torch.softmax(torch.where(there > 0, raw, raw.new_full((), ABSENT)), 1)
        weighed = [(gates[:, m : m + 1] * own).to(own.dtype) for m, own in enumerate(adapted.values())]
        return adapted, sum(weighed[1:], weighed[0]), raw, gates


class Refinement(nn.Module):
    """Densely supervised refinement: A_r(i) = A_f(i) + CBR²3×3[D2×(A_r(i-1)), A_f(i)] (DeepDualMapper, equation 3)."""

    def __init__(self, c_before: int, channels: int, step: int) -> None:
        super().__init__()
        self.up: nn.Module = nn.ConvTranspose2d(c_before, channels, 2, 2) if step == 2 else nn.Conv2d(c_before, channels, 1)
        self.mix = DoubleConv(2 * channels, channels)

    def forward(self, before: Tensor, fused: Tensor) -> Tensor:
        """Refined features of this level."""
        out: Tensor = fused + self.mix(torch.cat([self.up(before), fused], 1))
        return out


class Correction(nn.Module):
    """Residual correction of averaged late predictions (SegNet-RC, Audebert et al. 2018).

    Three 3×3 convolutions of all branches' last features, to be added to the mean logit.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn_relu(channels * branches, channels), conv_bn_relu(channels, channels), nn.Conv2d(channels, 1, 3, padding=1)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(N, 1, H, W) to add."""
        out: Tensor = self.body(torch.cat(list(features), 1))
        return out


def mean_of_present(logits: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    """Mean over the modalities that are there; 0 where none is."""
    total = torch.stack([logits[k] * present[k] for k in logits]).sum(0)
    return total / torch.stack([present[k] for k in logits]).sum(0).clamp(min=1)


class ForestScore(nn.Module):
    """Road score of each pixel by random forests on its channels (RFNorm), evaluated as tensors.

    Trees are full binary trees of a fixed depth; leaves that end earlier are repeated. Unfitted, every score is 0.5.

    Args:
        channels: Channels of the modality.
        trees: Trees in the forest.
        depth: Their depth.
    """

    def __init__(self, channels: int, trees: int = 16, depth: int = 8) -> None:
        super().__init__()
        self.channels, self.trees, self.depth = channels, trees, depth
        nodes, leaves = 2**depth - 1, 2**depth
        self.feature: Tensor
        self.threshold: Tensor
        self.value: Tensor
        self.register_buffer("feature", torch.zeros(trees, nodes, dtype=torch.long))
        self.register_buffer("threshold", torch.full((trees, nodes), torch.inf))
        self.register_buffer("value", torch.full((trees, leaves), 0.5))

    def fit(self, pixels: NDArray[np.float32], road: NDArray[np.bool_], seed: int = 0) -> None:
        """Train scikit-learn's forest and keep its trees.

        Args:
            pixels: (n, channels) values.
            road: (n,) whether each is road; both kinds must occur.
            seed: Of the forest.
        """
        from sklearn.ensemble import RandomForestClassifier

        forest = RandomForestClassifier(self.trees, max_depth=self.depth, random_state=seed, n_jobs=1).fit(pixels, road)
        for t, made in enumerate(forest.estimators_):
            self._copy(t, made.tree_, 0, 0, 0)

    def _copy(self, t: int, tree: Any, node: int, place: int, level: int) -> None:
        """One of scikit-learn's nodes to a place of the full tree, and all below."""
        left, right = tree.children_left[node], tree.children_right[node]
        if level == self.depth:
            counts = tree.value[node][0]
            self.value[t, place - (2**self.depth - 1)] = float(counts[1] / counts.sum())
            return
        inner = left >= 0
        if inner:
            self.feature[t, place] = int(tree.feature[node])
            self.threshold[t, place] = float(tree.threshold[node])
        self._copy(t, tree, left if inner else node, 2 * place + 1, level + 1)
        self._copy(t, tree, right if inner else node, 2 * place + 2, level + 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 1, H, W) score from 0 to 1."""
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, c).float()  # (P, C)
        place = torch.zeros(self.trees, len(pixels), dtype=torch.long, device=x.device)
        for _ in range(self.depth):
            value = pixels.T[self.feature.gather(1, place), torch.arange(len(pixels), device=x.device)]
            place = 2 * place + 1 + (value > self.threshold.gather(1, place)).long()
        scores = self.value.gather(1, place - (2**self.depth - 1)).mean(0)
        return scores.reshape(n, 1, h, w).to(x.dtype)
