"""Parts of networks against plain, slow implementations of the papers' equations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from roadfuse_core.models import LOSSES, NetworkConfig, build_network, deep_loss, preset, road_distance
from roadfuse_core.models._blocks import Directional, upsampler
from roadfuse_core.models._context import PyramidPooling
from roadfuse_core.models._decoder import FineHead
from roadfuse_core.models._fusion import DualEnhancement, ForestScore, GatedFusion, Refinement
from roadfuse_core.models._pointrend import PointRend, sample_points, uncertain_points

DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "forward_diagonal": (1, 1), "backward_diagonal": (-1, 1)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(4)
    with torch.inference_mode():
        yield


def equation_1(x, k, direction):
    """y[i, j] = Σ_t x[i + I_h·t, j + I_w·t]·k[r - t] (Sun et al. 2019, equation 1), for one channel in and out."""
    h, w = x.shape
    r, (dh, dw) = len(k) // 2, direction
    y = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            for t in range(-r, r + 1):
                a, b = i + dh * t, j + dw * t
                if 0 <= a < h and 0 <= b < w:
                    y[i, j] += x[a, b] * k[r - t]
    return y


@pytest.mark.parametrize("shape", [(12, 12), (7, 19), (19, 7), (3, 30), (1, 9), (9, 1)])
def test_the_1d_decoder_is_equation_1(shape):
    part = Directional(2, (1, 1, 1, 1))
    x = torch.randn(1, 2, *shape)
    out = part(x)[0].numpy()
    for n, (name, direction) in enumerate(DIRECTIONS.items()):
        conv = getattr(part, name)
        kernels = conv.weight[:, 0].reshape(2, 9).numpy()
        expected = sum(equation_1(x[0, c].numpy(), kernels[c], direction) for c in range(2)) + float(conv.bias[0])
        assert np.allclose(out[n], expected, atol=1e-5), name


@pytest.mark.parametrize("shape", [(25, 25), (21, 33), (33, 21)])
def test_an_impulse_spreads_along_each_direction_and_no_other(shape):
    part = Directional(1, (1, 1, 1, 1))
    for conv in part.children():
        nn.init.ones_(conv.weight)
        nn.init.zeros_(conv.bias)
    x = torch.zeros(1, 1, *shape)
    row, col = 10, 11
    x[0, 0, row, col] = 1
    for y, (dh, dw) in zip(part(x)[0], DIRECTIONS.values(), strict=True):
        reached = {(row + dh * t, col + dw * t) for t in range(-4, 5)}
        assert {tuple(p) for p in y.nonzero().tolist()} == reached


@pytest.mark.parametrize("how", ["transposed", "1d", "1d-released"])
def test_upsampling_doubles_and_the_papers_1d_decoder_has_as_many_parameters(how):
    part = upsampler(16, 16, how, 3)
    assert part(torch.randn(2, 16, 5, 9)).shape == (2, 16, 10, 18)
    if how == "1d":
        assert sum(p.numel() for p in part.parameters()) == sum(
            p.numel() for p in upsampler(16, 16, "transposed", 3).parameters()
        )


def plain_message(x, part, config):
    """Local and global message with their gates, one sample and one channel at a time (CMMPNet, equations 1 to 4)."""
    norm = part.local[1]
    k = config.message_kernel
    n, c, h, w = x.shape
    local = torch.zeros_like(x)
    padded = F.pad(x, (k // 2,) * 4)
    for out in range(c):
        for i in range(h):
            for j in range(w):
                local[:, out, i, j] = (padded[:, :, i : i + k, j : j + k] * part.local[0].weight[out]).sum((1, 2, 3))
        scale = norm.weight[out] / (norm.running_var[out] + norm.eps).sqrt()
        local[:, out] = (local[:, out] - norm.running_mean[out]) * scale + norm.bias[out]
    sent = torch.zeros_like(x)
    for sample in range(n):
        seen = []
        for level in range(config.pyramid_levels):
            cells = 2**level
            for channel in range(c):
                for a in range(cells):
                    for b in range(cells):
                        rows = slice(a * h // cells, -(-(a + 1) * h // cells))
                        cols = slice(b * w // cells, -(-(b + 1) * w // cells))
                        seen.append((level, channel, a, b, local[sample, channel, rows, cols].max()))
        cells = torch.stack([v for *_, v in seen])
        told = (part.summary.weight @ cells + part.summary.bias).clamp(min=0)
        both = torch.cat([local[sample], told[:, None, None].expand(c, h, w)])
        for kind, message in (("local", local[sample]), ("global", told[:, None, None].expand(c, h, w))):
            gate = part.gates[f"of_{kind}"]
            weight = torch.einsum("oc,chw->ohw", gate.weight[:, :, 0, 0], both) + gate.bias[:, None, None]
            sent[sample] += message / (1 + (-weight).exp())
    return sent


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("levels", [1, 3])
def test_dual_enhancement_is_its_equations(kernel, levels):
    config = NetworkConfig.model_validate({"fusion": "dual-enhancement", "message_kernel": kernel, "pyramid_levels": levels})
    module = DualEnhancement(["image", "gps"], 4, config).eval()
    for m in module.messages.values():
        m.local[1].running_mean.normal_()
        m.local[1].running_var.uniform_(0.5, 2)
    x = {"image": torch.randn(2, 4, 6, 9), "gps": torch.randn(2, 4, 6, 9)}
    ones = {k: torch.ones(2, 1, 1, 1) for k in x}
    out = module(x, ones)
    for to, source in (("image", "gps"), ("gps", "image")):
        expected = x[to] + plain_message(x[source], module.messages[source], config)
        assert torch.allclose(out[to], expected, atol=1e-5)
    silent = module(x, ones | {"gps": torch.zeros(2, 1, 1, 1)})
    assert torch.equal(silent["image"], x["image"])


def plain_conv(x, conv):
    k = conv.kernel_size[0]
    padded = F.pad(x, (k // 2,) * 4)
    n, _, h, w = x.shape
    out = torch.zeros(n, conv.out_channels, h, w)
    for i in range(h):
        for j in range(w):
            patch = padded[:, :, i : i + k, j : j + k]
            out[:, :, i, j] = torch.einsum("ncab,ocab->no", patch, conv.weight)
    return out if conv.bias is None else out + conv.bias[:, None, None]


def plain_cbr(x, block):
    conv, norm, _ = block
    y = plain_conv(x, conv)
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    return ((y - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


def test_gated_fusion_is_its_equations():
    """G̃(i) = Up2(G̃(i-1)) + ψ(φ²[A_I, A_T]); softmax; A_f = G_I·A_I + G_T·A_T (DeepDualMapper, equations 1 and 2)."""
    module = GatedFusion(["image", "gps"], 3).eval()
    x = {"image": torch.randn(2, 3, 6, 8), "gps": torch.randn(2, 3, 6, 8)}
    before = torch.randn(2, 2, 3, 4)
    ones = {k: torch.ones(2, 1, 1, 1) for k in x}
    adapted = {k: plain_conv(v, module.adapters[k]) for k, v in x.items()}
    y = plain_cbr(plain_cbr(torch.cat([adapted["image"], adapted["gps"]], 1), module.look[0]), module.look[1])
    delta = plain_conv(y, module.decide)
    for coarse in (None, before):
        raw = delta.clone()
        if coarse is not None:
            for i in range(6):
                for j in range(8):
                    raw[:, :, i, j] += coarse[:, :, i // 2, j // 2]
        weights = raw.exp() / raw.exp().sum(1, keepdim=True)
        fused = weights[:, :1] * adapted["image"] + weights[:, 1:] * adapted["gps"]
        got = module(x, coarse, ones)
        for a, b in zip(got, (adapted, fused, raw, weights), strict=True):
            pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else [(a, b)]
            assert all(torch.allclose(p, q, atol=1e-5) for p, q in pairs)
    alone = module(x, before, ones | {"gps": torch.zeros(2, 1, 1, 1)})
    assert torch.allclose(alone[1], adapted["image"], atol=1e-5)


def test_refinement_is_its_equation():
    """A_r(i) = A_f(i) + CBR²[D2×(A_r(i-1)), A_f(i)] (DeepDualMapper, equation 3)."""
    module = Refinement(6, 3, 2).eval()
    before, fused = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 6, 8)
    up = torch.zeros(2, 3, 6, 8)
    for i in range(6):
        for j in range(8):
            up[:, :, i, j] = before[:, :, i // 2, j // 2] @ module.up.weight[:, :, i % 2, j % 2] + module.up.bias
    mixed = plain_cbr(plain_cbr(torch.cat([up, fused], 1), module.mix[0]), module.mix[1])
    assert torch.allclose(module(before, fused), fused + mixed, atol=1e-5)


def plain_sample(features, x, y):
    """Bilinear between pixel centres, borders repeated."""
    c, h, w = features.shape
    col, row = x * w - 0.5, y * h - 0.5
    out = torch.zeros(c)
    for i in (int(np.floor(row)), int(np.floor(row)) + 1):
        for j in (int(np.floor(col)), int(np.floor(col)) + 1):
            weight = (1 - abs(row - i)) * (1 - abs(col - j))
            out += weight * features[:, min(max(i, 0), h - 1), min(max(j, 0), w - 1)]
    return out


def plain_decide(head, coarse, fine):
    x = fine
    for layer in head.layers:
        x = (layer.weight[:, :, 0] @ torch.cat([x, coarse]) + layer.bias).clamp(min=0)
    return head.logit.weight[:, :, 0] @ torch.cat([x, coarse]) + head.logit.bias


def test_pointrend_renders_as_a_plain_loop():
    """Double the size, take the most uncertain pixels, decide each by the MLP (E-Road, equation 7 and section 4)."""
    head = PointRend(5, 8)
    coarse, fine = torch.randn(1, 1, 4, 6), torch.randn(1, 5, 8, 12)
    logits = coarse
    for _ in range(2):
        logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        h, w = logits.shape[-2:]
        flat = sorted((abs(float(logits[0, 0, i, j])), i, j) for i in range(h) for j in range(w))
        for _, i, j in flat[: max(1, h * w // 16)]:
            x, y = (j + 0.5) / w, (i + 0.5) / h
            logits[0, 0, i, j] = plain_decide(head, plain_sample(coarse[0], x, y), plain_sample(fine[0], x, y))[0]
    assert torch.allclose(head.render(coarse, fine, 2), logits, atol=1e-5)


def test_training_points_are_mostly_the_uncertain_ones():
    """k·N points at random, the β·N most uncertain of them and (1 - β)·N others: 729, 129 and 33 for N = 162."""
    coarse = torch.full((1, 1, 32, 32), 5.0)
    coarse[..., 16:] = 0.01
    logits, at = PointRend(1, 4).points(coarse, torch.randn(1, 1, 32, 32))
    assert logits.shape == (1, 162)
    assert (sample_points(coarse, at)[0, 0, :129].abs() < 0.5).all()
    uncertain = (sample_points(coarse, at)[0, 0].abs() < 0.5).float().mean()
    assert 0.85 < uncertain < 0.97
    place, centre = uncertain_points(coarse, 5)
    assert (place % 32 >= 16).all()
    assert torch.allclose(sample_points(coarse, centre), torch.full((1, 1, 5), 0.01), atol=1e-4)


@pytest.mark.parametrize("shift", [(2, 0), (0, -4), (-6, 2)])
def test_what_the_fine_head_sees_of_the_input_moves_with_it(shift):
    """Where the decoder says nothing, a shift of the input by whole pixels of half size is one of the logits."""
    head = FineHead(5, 16, 8, "transposed").eval()
    x = torch.randn(1, 5, 64, 64)
    last = torch.zeros(1, 16, 32, 32)
    here, there = head(last, x), head(last, torch.roll(x, shift, (2, 3)))
    inside = (..., slice(16, -16), slice(16, -16))
    assert torch.allclose(torch.roll(here, shift, (2, 3))[inside], there[inside], atol=1e-5)
    assert here[inside].std() > 1e-3, "it sees something"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16)])
def test_pyramid_pooling_without_parameters(shape):
    part = PyramidPooling(3, parameters=False)
    assert not list(part.parameters())
    x = torch.full((1, 3, *shape), 2.0)
    assert torch.allclose(part(x), torch.full_like(x, 4.0))  # a flat map's surroundings are the map


def test_forests_score_as_scikit_learn_does():
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(900, 3)).astype(np.float32)
    road = (pixels[:, 0] * pixels[:, 1] > 0.2) | (pixels[:, 2] > 1)
    part = ForestScore(3, trees=5, depth=6)
    assert torch.equal(part(torch.randn(1, 3, 4, 4)), torch.full((1, 1, 4, 4), 0.5))
    part.fit(pixels, road, seed=1)
    forest = RandomForestClassifier(5, max_depth=6, random_state=1, n_jobs=1).fit(pixels, road)
    image = rng.normal(size=(2, 3, 9, 7)).astype(np.float32)
    expected = forest.predict_proba(image.transpose(0, 2, 3, 1).reshape(-1, 3))[:, 1].reshape(2, 9, 7)
    assert np.allclose(part(torch.from_numpy(image))[:, 0].numpy(), expected, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20), st.floats(0, 0.5))
@settings(max_examples=40, deadline=None)
def test_distances_to_roads_are_exact(seed, h, w, share):
    road = np.random.default_rng(seed).random((h, w)) < share
    got = road_distance(torch.from_numpy(road[None, None].astype(np.float32)))[0, 0].numpy()
    expected = ndimage.distance_transform_edt(~road) if road.any() else np.full((h, w), np.inf)
    assert np.allclose(got, expected, atol=1e-4)


def sample_of_losses():
    logits = torch.randn(2, 1, 6, 7)
    labels = (torch.rand(2, 1, 6, 7) > 0.6).float()
    known = (torch.rand(2, 1, 6, 7) > 0.2).float()
    return logits, labels, known


def test_losses_are_their_formulas():
    logits, labels, known = sample_of_losses()
    expected = dict.fromkeys(LOSSES, 0.0)
    for s in range(2):
        p, t, k = (v[s, 0].double().numpy() for v in (logits.sigmoid(), labels, known))
        n = k.sum()
        bce = -(k * (t * np.log(p) + (1 - t) * np.log(1 - p))).sum() / n
        dice = 1 - (2 * (p * t * k).sum() + 1) / ((p * k).sum() + (t * k).sum() + 1)
        p_t = np.where(t > 0, p, 1 - p)
        distance = ndimage.distance_transform_edt(t == 0)
        g = np.minimum(distance / distance.max(), 0.3)
        road = (t * k).sum() / n
        weighed = (1 - road) * t * np.log(p) + road * np.exp(g) * (1 - t) * np.log(1 - p)
        found = {"bce": bce, "dice": dice, "bce+dice": bce + dice, "distance": -(k * weighed).sum() / n}
        for name, alpha in (("focal", 0.25), ("focal-paper", 0.5)):
            a = np.where(t > 0, alpha, 1 - alpha)
            found[name] = -(k * a * (1 - p_t) ** 0.5 * np.log(p_t)).sum() / n
        for name, value in found.items():
            expected[name] += value / 2
    for name, loss in LOSSES.items():
        assert float(loss(logits, labels, known)) == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_pixels_do_not_count_and_perfect_is_near_zero(name):
    logits, labels, known = sample_of_losses()
    changed = torch.where(known > 0, logits, -logits + 3)
    assert torch.allclose(LOSSES[name](changed, labels, known), LOSSES[name](logits, labels, known))
    perfect = (labels * 2 - 1) * 30
    assert float(LOSSES[name](perfect, labels, torch.ones_like(known))) < 0.01
    assert torch.isfinite(LOSSES[name](logits, torch.zeros_like(labels), known))


def test_deep_supervision_reduces_labels_by_their_maximum():
    """A lone road pixel is still a road on every level."""
    network = build_network(preset("deepdualmapper").model_copy(update={"width": 0.125})).train()
    labels = torch.zeros(1, 1, 64, 64)
    labels[0, 0, 17, 41] = 1
    x = {"image": torch.randn(1, 3, 64, 64), "gps": torch.randn(1, 1, 64, 64)}
    prediction = network(x)
    right = {}
    for name, logits in prediction.auxiliary.items():
        factor = 64 // logits.shape[-1]
        made = torch.full_like(logits, -30.0)
        made[0, 0, 17 // factor, 41 // factor] = 30
        right[name] = made
    ideal = prediction._replace(logits=(labels * 2 - 1) * 30, auxiliary=right)
    assert float(deep_loss(network, ideal, labels, torch.ones_like(labels), LOSSES["bce"])) < 1e-6
    assert network.auxiliary_weights["refined/1"] == 1
    assert network.auxiliary_weights["fused/5"] == 0.5
    assert len(network.auxiliary_weights) == 19  # twenty losses with the logits' own
