"""Whole networks against plain forward passes, written down from the papers' figures.

Layers with weights are taken from the network; what goes where is written here once more, without its loops, lists and classes.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from roadfuse_core.models import build_network, preset
from roadfuse_core.models._context import PyramidPooling

IMAGE, GPS = "image", "gps"


def grown(name, **changes):
    """A slim network in eval mode, in double precision, whose every number is its own: nothing is zero or one by chance."""
    torch.manual_seed(6)
    network = build_network(preset(name).model_copy(update={"width": 0.125, **changes})).double().train()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.02 * torch.randn_like(p)
        # Statistics of a batch: with others, values would grow from layer to layer, and gates say nothing but yes or no.
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        network(windows(network))
    return network.eval()


def windows(network, n=2, height=64, width=96):
    torch.manual_seed(7)
    return {k: torch.randn(n, c, height, width, dtype=torch.float64) for k, c in network.config.modalities.items()}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def same(got, expected):
    assert got.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 1e-3, "it says something"
    assert torch.allclose(got, expected, atol=1e-9 * scale)


def unet_features(branch, x):
    """Bottom and decoder features of a U-Net, coarsest first."""
    skips = []
    for number in range(5):
        x = branch.encoder.stage(number, x)[0]
        skips.append(x)
    out = [branch.context(x)]
    for number, skip in enumerate(reversed(skips[:-1])):
        out.append(branch.decoder.mixes[number](torch.cat([branch.decoder.ups[number](out[-1]), skip], 1)))
    return out


def nearest_twice(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_deepdualmapper_is_its_figure():
    """Gates of every level build upon those of the coarser one, refined features upon the refined ones (figure 2, equations 1 to 3)."""
    network = grown("deepdualmapper")
    x = windows(network)
    image, gps = (unet_features(network.branches[n], x[n]) for n in (IMAGE, GPS))
    raw = refined = None
    expected = {}
    for level in range(5):
        gate = network.gates[level]
        a_image, a_gps = gate.adapters[IMAGE](image[level]), gate.adapters[GPS](gps[level])
        delta = gate.decide(gate.look(torch.cat([a_image, a_gps], 1)))
        raw = delta if raw is None else nearest_twice(raw) + delta
        weight = (raw[:, :1] - raw[:, 1:]).sigmoid()  # softmax over two
        fused = weight * a_image + (1 - weight) * a_gps
        if refined is None:
            refined = fused
        else:
            part = network.refine[level - 1]
            refined = fused + part.mix(torch.cat([part.up(refined), fused], 1))
        predictor = network.predictors[level]
        for name, features in ((IMAGE, a_image), (GPS, a_gps), ("fused", fused), ("refined", refined)):
            expected[f"{name}/{level + 1}"] = predictor(features)
        expected[f"gate/{IMAGE}/{level + 1}"] = weight
    made = network(x)
    assert float(expected[f"gate/{IMAGE}/5"].std()) > 0.05, "gates differ from place to place"
    same(made.logits, expected["refined/5"])
    for name, value in (made.auxiliary | {k: v for k, v in made.maps.items() if IMAGE in k}).items():
        same(value, expected[name])
    assert len(made.auxiliary) == 19


def message(part, x):
    """What a modality sends: gated local and global messages (CMMPNet, equations 1 to 4)."""
    local = part.local(x)
    cells = torch.cat([F.adaptive_max_pool2d(local, 2**level).flatten(1) for level in range(part.levels)], 1)
    everywhere = F.relu(part.summary(cells))[..., None, None].expand_as(local)
    both = torch.cat([local, everywhere], 1)
    return part.gates["of_local"](both).sigmoid() * local + part.gates["of_global"](both).sigmoid() * everywhere


def enhanced(part, image, gps):
    """Both modalities at the same time (equation 5)."""
    return image + message(part.messages[GPS], gps), gps + message(part.messages[IMAGE], image)


def linknet_block(decoder, number, x, skip):
    x = decoder.blocks[number](x)
    return x if skip is None else x + skip


def test_cmmpnet_is_its_figure():
    """Messages after every encoder stage and decoder block; skips carry what the messages made (figure 2)."""
    network = grown("cmmpnet-d-linknet34")
    x = windows(network)
    i, g = network.branches[IMAGE], network.branches[GPS]
    image, gps, skips = x[IMAGE], x[GPS], []
    for stage in range(4):
        image, gps = i.encoder.stage(stage, image)[0], g.encoder.stage(stage, gps)[0]
        image, gps = enhanced(network.enhance[stage], image, gps)
        skips.append((image, gps))
    image, gps = i.context(image), g.context(gps)
    for block, (skip_i, skip_g) in enumerate([skips[2], skips[1], skips[0], (None, None)]):
        image, gps = linknet_block(i.decoder, block, image, skip_i), linknet_block(g.decoder, block, gps, skip_g)
        image, gps = enhanced(network.enhance[4 + block], image, gps)
    last = torch.cat([i.decoder.head.features(image), g.decoder.head.features(gps)], 1)
    same(network(x).logits, network.logit(last))


def test_ours_is_its_figure():
    """Slim encoders are widened, weighed, added to the main one, and told the outcome, after every stage."""
    network = grown("roadfuse")
    x = windows(network)
    names = network.names
    joint = torch.cat([x[n] for n in names], 1)
    main, (other,), skips = joint, names[1:], []
    slim = x[other]
    for stage in range(4):
        main, slim = network.main.encoder.stage(stage, main)[0], network.slim[other].encoder.stage(stage, slim)[0]
        wide = network.widen[other][stage](slim)
        raw = network.decide[stage](torch.cat([main, wide], 1))
        weight = (raw[:, 1:] - raw[:, :1]).float().sigmoid()  # softmax over two
        main = F.relu(main + weight * wide)
        skips.append(main)
        if stage < 3:
            slim = slim + network.tell[other][stage](main)
    decoder, main = network.main.decoder, network.main.context(main)
    for block, skip in enumerate([skips[2], skips[1], skips[0], None]):
        main = linknet_block(decoder, block, main, skip)
    made = network(x)
    expected = network.main.logits(main, joint)
    # Gates are in single precision.
    assert torch.allclose(made.logits, expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(made.maps[f"gate/{other}/4"], weight, atol=1e-6)


def test_fusenet_is_its_figure():
    """Features of the other encoder are added to the first one's after every stage, and go on with it."""
    network = grown("fusenet")
    x = windows(network)
    first, other = network.names
    made, indices = [], []
    a, b = x[first], x[other]
    for stage in range(len(network.main.encoder.widths)):
        a, places = network.main.encoder.stage(stage, a)
        b = network.others[other].encoder.stage(stage, b)[0]
        a = a + b
        made.append(a)
        indices.append(places)
    a = network.main.context(a)
    for block in range(len(network.main.decoder.widths)):
        a = network.main.decoder.block(block, a, made, indices)
    same(network(x).logits, network.main.decoder.head(a))


@pytest.mark.parametrize("shape", [(7, 10), (13, 6)])
@pytest.mark.parametrize("parameters", [True, False])
def test_pyramid_pooling_is_means_over_1_2_3_and_6_cells(parameters, shape):
    """PSPNet's bins, by loops; with parameters as PP-LinkNet released them, without as its paper says."""
    torch.manual_seed(8)
    channels = 8
    part = PyramidPooling(channels, parameters).double()
    h, w = shape
    x = torch.randn(2, channels, h, w, dtype=torch.float64)
    pooled = []
    for bins in (1, 2, 3, 6):
        cells = torch.zeros(2, channels, bins, bins, dtype=torch.float64)
        for row in range(bins):
            for col in range(bins):
                rows = slice(row * h // bins, -(-(row + 1) * h // bins))
                cols = slice(col * w // bins, -(-(col + 1) * w // bins))
                cells[:, :, row, col] = x[:, :, rows, cols].mean((2, 3))
        if parameters:
            conv = part.bins[len(pooled)]
            cells = (torch.einsum("oc,ncab->noab", conv.weight[:, :, 0, 0], cells) + conv.bias[:, None, None]).clamp(min=0)
        pooled.append(F.interpolate(cells, shape, mode="bilinear", align_corners=False))
    released = part.combine(torch.cat([x, *pooled], 1)).clamp(min=0) if parameters else None
    expected = x + sum(pooled) / 4 if released is None else released
    assert np.allclose(part(x), expected, atol=1e-9)
