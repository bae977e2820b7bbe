"""Networks of any number of modalities: one class for each way in which they meet."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadfuse_core.errors import ConfigError
from roadfuse_core.models._base import Network, Prediction, Tensors, multiple_of
from roadfuse_core.models._blocks import conv_bn_relu, initialise, relu, without_norms
from roadfuse_core.models._branch import Branch, Encoded
from roadfuse_core.models._config import NetworkConfig
from roadfuse_core.models._encoder import BasicBlock
from roadfuse_core.models._fusion import (
    Correction,
    DualEnhancement,
    ForestScore,
    GatedFusion,
    Refinement,
    mean_of_present,
)
from roadfuse_core.models._pointrend import PointRend

__all__ = ["build_network"]


class Single(Network):
    """One branch: channels concatenated (early fusion), or a stem each, added (Sun et al. as released)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        stems = config.fusion == "stems"
        first = config.modalities[self.names[0]] if stems else sum(config.modalities.values())
        self.branch = Branch(config, first)
        extra = self.names[1:] if stems else []
        width = config.channels(64)
        self.stems = nn.ModuleDict({n: nn.Conv2d(config.modalities[n], width, 7, 2, 3, bias=False) for n in extra})
        self.window_multiple = multiple_of(self.branch)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        if not self.stems:
            return Prediction(self.branch(torch.cat([x[n] for n in self.names], 1)), {}, {})
        stem = torch.stack([conv(x[n]) for n, conv in self.stems.items()]).sum(0)
        return Prediction(self.branch(x[self.names[0]], stem), {}, {})


class PointRendered(Single):
    """One branch whose decoder stops at 1/4; PointRend makes the rest (E-Road).

    In training the logits are the coarse ones, resized, and `points` are those of the point head at `points` (x and y).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        encoder, decoder = self.branch.encoder, self.branch.decoder
        self.render = PointRend(encoder.widths[0] + decoder.widths[-1], config.channels(256))
        self.auxiliary_weights = {"points": 1.0}

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        made = self.branch.encode(torch.cat([x[n] for n in self.names], 1))
        last = self.branch.decode(made)[-1]
        fine = torch.cat([made.skips[0], last], 1)  # (N, C, H/4, W/4)
        coarse = self.branch.decoder.head.logit(last)  # type: ignore[operator,union-attr]
        if not self.training:
            return Prediction(self.render.render(coarse, fine, 2), {}, {})
        points, at = self.render.points(coarse, fine)
        logits = F.interpolate(coarse, scale_factor=4.0, mode="bilinear", align_corners=False)
        return Prediction(logits, {"points": points}, {"points": at})


class Late(Network):
    """A branch each; the mean of their logits, corrected from their last features in SegNet-RC."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.branches = nn.ModuleDict({n: Branch(config, c) for n, c in config.modalities.items()})
        width = self._one.decoder.widths[-1]
        self.correction = Correction(width, len(self.names)) if config.fusion == "residual-correction" else None
        self.window_multiple = multiple_of(*self.branches.values())

    @property
    def _one(self) -> Branch:
        return self.branches[self.names[0]]  # type: ignore[return-value]

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        last = {n: b.decode(b.encode(x[n]))[-1] for n, b in self.branches.items()}  # type: ignore[union-attr,operator]
        logits = {n: self.branches[n].decoder.head(y) for n, y in last.items()}  # type: ignore[union-attr,operator]
        mean = mean_of_present(logits, present)
        if self.correction is not None:
            mean = mean + self.correction([y * present[n] for n, y in last.items()])
        return Prediction(mean, {}, {})


class EncoderFused(Network):
    """FuseNet and V-FuseNet: encoders meet after every stage, one decoder.

    FuseNet (Hazirbas et al. 2016): features of the others are added to the first one's, before its pooling. V-FuseNet
    (Audebert et al. 2018): a virtual third encoder convolves all features of a stage and its own of the stage before.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        first, *others = self.names
        self.virtual = config.fusion == "v-fusenet"
        self.main = Branch(config, config.modalities[first])
        self.others = nn.ModuleDict({n: Branch(config, config.modalities[n], whole=False) for n in others})
        widths = self.main.encoder.widths
        mixes = []
        for k, w in enumerate(widths if self.virtual else ()):
            before = widths[k - 1] if k else 0
            mixes.append(conv_bn_relu(w * len(self.names) + before, w))
        self.mixes = nn.ModuleList(mixes)
        self.window_multiple = multiple_of(self.main)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        states = {n: Encoded() for n in self.names}
        features = dict(x)
        virtual = Encoded()
        for k in range(len(self.main.encoder.widths)):
            for n in self.names:
                branch = self.main if n == self.names[0] else self.others[n]
                features[n] = branch.stage(k, features[n], states[n])  # type: ignore[operator]
            if self.virtual:
                virtual.skips.append(self._mix(k, features, virtual))
            else:
                fused = torch.stack(list(features.values())).sum(0)
                features[self.names[0]] = states[self.names[0]].skips[-1] = fused
        made = states[self.names[0]]
        if self.virtual:
            made = Encoded(virtual.skips, made.indices)
        return Prediction(self.main.decoder.head(self.main.decode(made)[-1]), {}, {})

    def _mix(self, k: int, features: Tensors, virtual: Encoded) -> Tensor:
        parts = list(features.values())
        if k:
            parts.append(F.max_pool2d(virtual.skips[-1], 2) if self._pools(k) else virtual.skips[-1])
        out: Tensor = self.mixes[k](torch.cat(parts, 1))
        return out

    def _pools(self, k: int) -> bool:
        scales = self.main.encoder.scales
        return scales[k] == 2 * scales[k - 1]


class LevelThree(Network):
    """L3Fsn (Piramanayagam et al. 2018): encoders meet by concatenation after the third stage of FCN-8, then one."""

    MEET = 2

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        first, *others = self.names
        self.main = Branch(config, config.modalities[first])
        self.others = nn.ModuleDict({n: Branch(config, config.modalities[n], whole=False) for n in others})
        for branch in self.others.values():
            _cut(branch, self.MEET)
        width = self.main.encoder.widths[self.MEET]
        self.mix = conv_bn_relu(width * len(self.names), width, 1)
        self.window_multiple = multiple_of(self.main)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        made = Encoded()
        features = dict(x)
        for k in range(self.MEET + 1):
            for n in self.names:
                state = made if n == self.names[0] else Encoded()
                branch = self.main if n == self.names[0] else self.others[n]
                features[n] = branch.stage(k, features[n], state)  # type: ignore[operator]
        y = made.skips[-1] = self.mix(torch.cat([features[n] for n in self.names], 1))
        for k in range(self.MEET + 1, len(self.main.encoder.widths)):
            y = self.main.stage(k, y, made)
        return Prediction(self.main.decoder.head(self.main.decode(made)[-1]), {}, {})


def _cut(branch: nn.Module, last: int) -> None:
    """Remove the stages of an encoder after one of them; they would never be used."""
    encoder = branch.encoder
    encoder.stages = encoder.stages[: last + 1]  # type: ignore[union-attr,index]


class TriSeg(Network):
    """A network each, whose probabilities go into a third one (Parajuli et al. 2018); all three are supervised."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.branches = nn.ModuleDict({n: Branch(config, c) for n, c in config.modalities.items()})
        self.last = Branch(config, len(self.names))
        self.window_multiple = multiple_of(self.last)
        self.auxiliary_weights = dict.fromkeys(self.names, 1.0)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        logits = {n: self.branches[n](x[n]) for n in self.names}
        joined = torch.cat([torch.sigmoid(logits[n]) * present[n] for n in self.names], 1)
        return Prediction(self.last(joined), logits, {})


class Gated(Network):
    """DeepDualMapper: branches meet on every level of their decoders through gates, and a refinement decoder follows.

    A predictor a level, shared by adapted, fused and refined features, supervises all of them (weights 0.5, 0.5, 0.5
    and 1). On a backbone whose decoder ends at 1/2 the last logit is that of its own head.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.branches = nn.ModuleDict({n: Branch(config, c) for n, c in config.modalities.items()})
        one: Branch = self.branches[self.names[0]]  # type: ignore[assignment]
        widths = (one.context_width, *one.decoder.widths)
        scales = (one.encoder.scales[-1], *one.decoder.scales)
        self.gates = nn.ModuleList(GatedFusion(self.names, w) for w in widths)
        steps = [a // b for a, b in itertools.pairwise(scales)]
        self.refine = nn.ModuleList(Refinement(a, b, s) for a, b, s in zip(widths, widths[1:], steps, strict=False))
        self.whole = scales[-1] == 1
        levels = len(widths) if self.whole else len(widths) - 1
        self.predictors = nn.ModuleList(nn.Conv2d(w, 1, 1) for w in widths[:levels])
        self.head = None if self.whole else one.decoder.head
        for branch in self.branches.values():
            branch.decoder.head = nn.Identity()  # type: ignore[union-attr]
        self.window_multiple = multiple_of(*self.branches.values())
        names = [(*self.names, "fused", "refined")] * len(widths)
        self.auxiliary_weights = {f"{n}/{k + 1}": 1.0 if n == "refined" else 0.5 for k, of in enumerate(names) for n in of}
        del self.auxiliary_weights[f"refined/{len(widths)}"]  # those are the logits

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        features = {n: b.decode(b.encode(x[n])) for n, b in self.branches.items()}  # type: ignore[union-attr,operator]
        auxiliary: dict[str, Tensor] = {}
        maps: dict[str, Tensor] = {}
        raw = refined = None
        for k, module in enumerate(self.gates):
            adapted, fused, raw, gates = module({n: f[k] for n, f in features.items()}, raw, present)
            refined = fused if refined is None else self.refine[k - 1](refined, fused)
            for n, y in (adapted | {"fused": fused, "refined": refined}).items():
                auxiliary[f"{n}/{k + 1}"] = self._predict(k, y)
            maps |= {f"gate/{n}/{k + 1}": gates[:, m : m + 1] for m, n in enumerate(self.names)}
        logits = auxiliary.pop(f"refined/{len(self.gates)}")
        return Prediction(logits, auxiliary, maps)

    def _predict(self, level: int, y: Tensor) -> Tensor:
        predictor = self.predictors[level] if level < len(self.predictors) else self.head
        assert predictor is not None
        out: Tensor = predictor(y)
        return out


class Enhanced(Network):
    """CMMPNet: a branch each, messages after every stage and every block, one head on all last features."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.branches = nn.ModuleDict({n: Branch(config, c) for n, c in config.modalities.items()})
        one: Branch = self.branches[self.names[0]]  # type: ignore[assignment]
        self.blocks = len(one.decoder.widths)
        # After each of the last encoder stages, as many as there are decoder blocks, and after each block (Table I).
        self.first = len(one.encoder.widths) - self.blocks
        widths = (*one.encoder.widths[self.first :], *one.decoder.widths)
        self.enhance = nn.ModuleList(DualEnhancement(self.names, w, config) for w in widths)
        head_in = config.channels(32) if config.decoder == "linknet" else one.decoder.widths[-1]
        self.logit = nn.Conv2d(head_in * len(self.names), 1, 3, padding=1)
        for branch in self.branches.values():
            _without_logit(branch)
        self.window_multiple = multiple_of(*self.branches.values())

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        made = {n: Encoded() for n in self.names}
        y = dict(x)
        one: Branch = self.branches[self.names[0]]  # type: ignore[assignment]
        for k in range(len(one.encoder.widths)):
            y = {n: self.branches[n].stage(k, y[n], made[n]) for n in self.names}  # type: ignore[operator]
            if k >= self.first:
                y = self.enhance[k - self.first](y, present)
                for n in self.names:
                    made[n].skips[-1] = y[n]  # skips carry enhanced features
        y = {n: self.branches[n].context(y[n]) for n in self.names}  # type: ignore[operator]
        for k in range(self.blocks):
            y = {n: self._block(n, k, y[n], made[n]) for n in self.names}
            y = self.enhance[self.blocks + k](y, present)
        last = [self._last(self.branches[n], y[n]) for n in self.names]
        return Prediction(self.logit(torch.cat(last, 1)), {}, {})

    def _block(self, name: str, number: int, y: Tensor, made: Encoded) -> Tensor:
        out: Tensor = self.branches[name].decoder.block(number, y, made.skips, made.indices)  # type: ignore[union-attr,operator]
        return out

    def _last(self, branch: nn.Module, y: Tensor) -> Tensor:
        head = branch.decoder.head  # type: ignore[union-attr]
        out: Tensor = head.features(y) if hasattr(head, "features") else y  # type: ignore[operator,union-attr]
        return out


def _without_logit(branch: nn.Module) -> None:
    """Take the logit out of a branch's head: all branches share one."""
    head = branch.decoder.head  # type: ignore[union-attr]
    if hasattr(head, "features"):
        head.logit = nn.Identity()  # type: ignore[union-attr,method-assign]
    else:
        branch.decoder.head = nn.Identity()  # type: ignore[union-attr]


class LidarFirst(Network):
    """PreConv and ElePreConv (Parajuli et al. 2018): the other modalities through two convolutions, then one network.

    PreConv: their features are concatenated with the first modality. ElePreConv: through 8 and then one filter more than
    the first has channels, added to the first, extended by a zero channel.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        first, *others = self.names
        c, self.adds = config.modalities[first], config.fusion == "elepreconv"
        out = c + 1 if self.adds else 8
        self.before = nn.ModuleDict(
            {n: nn.Sequential(conv_bn_relu(config.modalities[n], 8), nn.Conv2d(8, out, 3, padding=1)) for n in others}
        )
        self.branch = Branch(config, c + 1 if self.adds else c + out * len(others))
        self.window_multiple = multiple_of(self.branch)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        first = x[self.names[0]]
        seen = [conv(x[n]) * present[n] for n, conv in self.before.items()]
        if self.adds:
            return Prediction(self.branch(F.pad(first, (0, 0, 0, 0, 0, 1)) + torch.stack(seen).sum(0)), {}, {})
        return Prediction(self.branch(torch.cat([first, *seen], 1)), {}, {})


class Forests(Network):
    """RFNorm (Parajuli et al. 2018): a road score of every modality by random forests, the scores into one network.

    The forests are fitted before the network learns (`network.forests[name].fit`, as training does); they travel with the
    weights.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.forests = nn.ModuleDict({n: ForestScore(c) for n, c in config.modalities.items()})
        self.branch = Branch(config, len(self.names))
        self.window_multiple = multiple_of(self.branch)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        scores = [self.forests[n](x[n]) * present[n] for n in self.names]
        return Prediction(self.branch(torch.cat(scores, 1)), {}, {})


class RoadFuse(Network):
    """Ours: one full branch that sees all modalities together, slim encoders of a quarter of its width for all but the first.

    After every encoder stage the slim features are widened by 1×1, weighed by gates (softmax over the modalities, as in
    DeepDualMapper; absent ones get none) and added to the main ones, and each slim encoder is told the outcome (a 1×1
    message, as in CMMPNet). All of these begin at zero: at first the network is its main branch, early fusion, and what
    is added must earn its weight. Gates leave the network, so that people see how much a modality's own view counted beside
    the joint one, which has the first modality's gate.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        others = self.names[1:]
        self.main = Branch(config, sum(config.modalities.values()))
        slim = config.model_copy(update={"width": config.width / 4, "encoder": "resnet18"})
        self.slim = nn.ModuleDict({n: Branch(slim, config.modalities[n], whole=False) for n in others})
        # Points are sparse: in whole batches a channel is silent, and then its variance says nothing about other batches.
        without_norms(self.slim)
        widths = self.main.encoder.widths
        narrow: tuple[int, ...] = self.slim[others[0]].encoder.widths  # type: ignore[union-attr,assignment]
        pairs = list(zip(narrow, widths, strict=True))
        self.widen = nn.ModuleDict({n: nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs) for n in others})
        # After the last stage nothing of a slim encoder follows that could be told.
        self.tell = nn.ModuleDict({n: nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs[:-1]) for n in others})
        self.decide = nn.ModuleList(nn.Conv2d(w * len(self.names), len(self.names), 1) for w in widths)
        self.window_multiple = multiple_of(self.main)

    def fuse(self, x: Tensors, present: Tensors) -> Prediction:
        """See `Network.fuse`."""
        made, y = Encoded(), dict(x)
        joint = y[self.names[0]] = torch.cat([x[n] for n in self.names], 1)
        there = torch.cat([present[n] for n in self.names], 1)  # (N, modalities, 1, 1)
        maps: dict[str, Tensor] = {}
        for k in range(len(self.main.encoder.widths)):
            fused, gates = self._stage(k, y, made, there)
            maps |= {f"gate/{n}/{k + 1}": gates[:, m : m + 1] for m, n in enumerate(self.names)}
            y[self.names[0]] = made.skips[-1] = fused
        return Prediction(self.main.logits(self.main.decode(made)[-1], joint), {}, maps)

    def settle(self) -> None:
        """What meets the main branch begins at zero, and blocks without norms as their shortcuts (De and Smith 2020)."""
        for block in (m for m in self.slim.modules() if isinstance(m, BasicBlock)):
            nn.init.zeros_(block.bn2.weight)
        for part in (self.widen, self.tell, self.decide):
            for weight in part.parameters():
                nn.init.zeros_(weight)

    def _stage(self, k: int, y: dict[str, Tensor], made: Encoded, there: Tensor) -> tuple[Tensor, Tensor]:
        """One stage of all encoders, and their meeting; the slim ones go on in `y`."""
        wide = [self.main.stage(k, y[self.names[0]], made)]
        for n, branch in self.slim.items():
            y[n] = branch.encoder.stage(k, y[n])[0]  # type: ignore[union-attr,operator]
            wide.append(self.widen[n][k](y[n]))  # type: ignore[index]
        raw = self.decide[k](torch.cat(wide, 1))
        gates = torch.softmax(torch.where(there > 0, raw, raw.new_full((), -1e4)).float(), 1)
        weighed = [(gates[:, m : m + 1] * own).to(own.dtype) for m, own in enumerate(wide[1:], 1)]
        fused = relu(sum(weighed, wide[0]))
        for n in self.slim:
            if k < len(self.tell[n]):  # type: ignore[arg-type]
                y[n] = y[n] + self.tell[n][k](fused)  # type: ignore[index]
        return fused, gates


KINDS: dict[str, type[Network]] = {
    "concatenate": Single, "stems": Single, "late": Late, "residual-correction": Late, "fusenet": EncoderFused,
    "v-fusenet": EncoderFused, "level3": LevelThree, "triseg": TriSeg, "gated": Gated, "dual-enhancement": Enhanced,
    "preconv": LidarFirst, "elepreconv": LidarFirst, "forests": Forests, "roadfuse": RoadFuse,
}  # fmt: skip


def build_network(config: NetworkConfig) -> Network:
    """The network that a configuration describes, freshly initialised.

    Raises:
        ConfigError: Parts that fit one by one do not fit together.
    """
    fusions = {"pointrend": ("concatenate",), "fine": ("concatenate", "roadfuse")}.get(config.head, (config.fusion,))
    if config.fusion not in fusions:
        raise ConfigError(
            "network.head", config.head, f"is not made for fusion {config.fusion!r}", f"use fusion {' or '.join(fusions)}"
        )
    network = PointRendered(config) if config.head == "pointrend" else KINDS[config.fusion](config)
    initialise(network)
    network.settle()
    return network
