"""One contract for every preset, the published sizes, weights and checkpoints."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from roadfuse_core.errors import ConfigError, DataError
from roadfuse_core.models import (
    LOSSES,
    PRESETS,
    CheckpointInfo,
    NetworkConfig,
    build_network,
    deep_loss,
    describe,
    fold_norms,
    load_checkpoint,
    load_resnet_weights,
    preset,
    read_checkpoint_info,
    save_checkpoint,
)
from roadfuse_core.models._blocks import Affine, Conv2d, max_pool_3x3, relu
from roadfuse_core.models._encoder import ResNetEncoder

SEQUENCES = Path(__file__).with_name("presets.json")


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compact(name):
    torch.manual_seed(0)
    return build_network(preset(name).model_copy(update={"width": 0.125}))


def settled(name):
    """In eval mode, with batch norms that have seen a batch: fresh ones would let activations grow from layer to layer."""
    network = compact(name).train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        network(inputs(network.config, 2, 128, 128))
    return network.eval()


def inputs(config, n, h, w):
    torch.manual_seed(1)
    return {name: torch.randn(n, c, h, w) for name, c in config.modalities.items()}


def every_output(prediction):
    return [prediction.logits, *prediction.auxiliary.values()]


@pytest.mark.parametrize("name", PRESETS)
class TestEveryPreset:
    def test_logits_have_the_size_of_the_input(self, name):
        network = compact(name).eval()
        for h, w in ((1, 1), (31, 31), (224, 224), (515, 387)):
            with torch.inference_mode():
                out = network(inputs(network.config, 1, h, w))
            assert out.logits.shape == (1, 1, h, w)
            assert torch.isfinite(out.logits).all()

    def test_every_parameter_has_a_finite_gradient(self, name):
        network = compact(name).train()
        prediction = network(inputs(network.config, 2, 64, 96))
        assert set(prediction.auxiliary) == set(network.auxiliary_weights)
        sum(x.square().mean() for x in every_output(prediction)).backward()
        for key, p in network.named_parameters():
            assert p.grad is not None, key
            assert torch.isfinite(p.grad).all(), key
            assert p.grad.any() or "bias" in key or "conv.weight" not in key, key

    def test_eval_is_deterministic_and_a_batch_equals_its_members(self, name):
        """In double precision: where maxima tie, rounding decides, and unpooling carries that on."""
        network = settled(name).double()
        x = {k: v.double() for k, v in inputs(network.config, 3, 64, 96).items()}
        with torch.inference_mode():
            whole = network(x).logits
            assert torch.equal(whole, network(x).logits)
            parts = torch.cat([network({k: v[i : i + 1] for k, v in x.items()}).logits for i in range(3)])
        assert torch.allclose(whole, parts, atol=1e-7 * max(1.0, float(whole.abs().max())))

    def test_a_missing_modality_is_as_if_it_were_never_given(self, name):
        network = settled(name)
        x = inputs(network.config, 2, 64, 64)
        with torch.inference_mode():
            for gone in x if len(x) > 1 else ():
                absent = network({k: v for k, v in x.items() if k != gone})
                masked = network(x, {gone: torch.zeros(2)})
                assert torch.equal(absent.logits, masked.logits)
                assert torch.isfinite(absent.logits).all()
                mixed = network(x, {gone: torch.tensor([0.0, 1.0])}).logits
                assert torch.allclose(mixed[:1], absent.logits[:1], atol=1e-4 * max(1.0, float(mixed.abs().max())))

    def test_folded_norms_change_nothing_but_rounding(self, name):
        network = settled(name).double().requires_grad_(False)
        for p in network.parameters():  # what begins at zero has its say too
            p += 0.01 * torch.randn_like(p)
        for forest in network.forests.values() if name == "rfnorm-lidar" else ():  # unfitted ones say the same everywhere
            forest.value.normal_()
            forest.threshold.normal_()
        x = {k: v.double() for k, v in inputs(network.config, 2, 64, 64).items()}
        plain = network(x)
        folded = fold_norms(network)(x)
        for a, b in zip(every_output(plain), every_output(folded), strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-7 * max(1.0, float(a.abs().max())))

    def test_bfloat16_is_finite(self, name):
        network = settled(name)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(network(inputs(network.config, 1, 64, 64)).logits).all()

    def test_save_load_rebuild(self, name, tmp_path):
        network = compact(name).eval()
        info = CheckpointInfo(
            network=network.config, layers=[{"kind": "binary"}], resolution_m=1, window_px=64, recipe={"seed": 0}
        )
        save_checkpoint(tmp_path / "c.safetensors", network, info, half=False)
        again, read = load_checkpoint(tmp_path / "c.safetensors")
        x = inputs(network.config, 1, 64, 64)
        assert read == info
        assert torch.equal(network(x).logits, again(x).logits)

    def test_the_loss_of_all_outputs_falls(self, name):
        """A few steps on one window: every loss weight and every reduction of labels is walked through."""
        network = compact(name).train()
        x = inputs(network.config, 2, 64, 64)
        labels = (x[next(iter(x))][:, :1] > 0.5).float()
        known = torch.ones_like(labels)
        known[..., :9] = 0
        optimiser = torch.optim.Adam(network.parameters(), 3e-3)
        torch.manual_seed(0)
        values = []
        for _ in range(4):
            loss = deep_loss(network, network(x), labels, known, LOSSES["bce+dice"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        assert values[-1] < values[0]

    def test_layer_sequence(self, name):
        assert sequence(PRESETS[name].config) == json.loads(SEQUENCES.read_text())[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
class TestEveryPresetAtLength:
    def test_full_size(self, name):
        network = build_network(preset(name)).eval()
        with torch.inference_mode():
            out = network(inputs(network.config, 1, 131, 67))
        assert out.logits.shape == (1, 1, 131, 67)
        assert torch.isfinite(out.logits).all()

    def test_export(self, name):
        network = settled(name)
        x = inputs(network.config, 1, 64, 96)
        with torch.inference_mode():
            exported = torch.export.export(network, (x,)).module()
            assert torch.allclose(exported(x).logits, network(x).logits, atol=1e-4)

    def test_compile(self, name):
        torch._dynamo.reset()
        network = settled(name)
        x = inputs(network.config, 1, 64, 96)
        with torch.inference_mode():
            made = torch.compile(network, backend="aot_eager", fullgraph=True)(x).logits
            assert torch.allclose(made, network(x).logits, atol=1e-3)


def sequence(config: NetworkConfig) -> dict[str, object]:
    """Parameters, layers, and a digest of all layers in order; names of modalities do not count."""
    with torch.device("meta"):
        network = build_network(config)
    leaves = [str(m) for m in network.modules() if not list(m.children())]
    text = "\n".join([type(network).__name__, *leaves, str(sorted(network.auxiliary_weights.values()))])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"parameters": count(network), "layers": len(leaves), "digest": digest}


def test_no_two_presets_have_equal_graphs():
    digests = [sequence(p.config)["digest"] for p in PRESETS.values()]
    assert len(set(digests)) == len(PRESETS)


def test_published_sizes():
    """Zhou et al. 2018 and the released codes of CMMPNet and PP-LinkNet, as counted there; torchvision for ResNets."""
    dlinknet = build_network(preset("d-linknet34-image"))
    assert count(dlinknet) == 31_096_129  # 31.1 M
    assert count(dlinknet.branch.context) == 9_439_232  # 9.44 M in the centre
    assert count(dlinknet.branch.encoder) == 21_797_672 - 513_000  # resnet34 without its classifier
    assert count(ResNetEncoder(3, (64, 128, 256, 512), "resnet18")) == 11_689_512 - 513_000
    with torch.device("meta"):
        released, paper = (build_network(preset(f"cmmpnet-d-linknet34{k}")) for k in ("", "-paper"))
        pyramid = build_network(preset("pp-linknet34")).branch.context
    assert round(count(released) / 1e6) == 85
    assert round(count(released.enhance) / 1e6, 1) == 22.8
    assert round(count(paper) / 1e6) == 92
    assert round(count(paper.enhance) / 1e6, 1) == 29.8
    # 0.79 M: four bins of 512 to 128 and the way back of 1024 to 512.
    assert count(pyramid) == 4 * (512 * 128 + 128) + 1024 * 512 + 512 == 787_456


def test_ours_needs_two_thirds_of_the_operations_of_cmmpnet():
    assert describe(preset("roadfuse")).gflops < describe(preset("cmmpnet-d-linknet34")).gflops * 2 / 3


def test_operations_are_those_of_the_formula():
    """One 7×7 stem of 3 to 64 channels at half of 512², two operations a product, is 1.23 GFLOPs of ResNet-34's."""
    gps, image = describe(preset("d-linknet34-gps")), describe(preset("d-linknet34-image"))
    assert image.gflops - gps.gflops == pytest.approx(2 * 49 * (3 - 1) * 64 * 256**2 / 1e9, rel=1e-6)


def test_encoder_keys_are_those_of_torchvision():
    keys = set(build_network(preset("d-linknet34-image")).branch.encoder.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight",
            "layer4.2.bn2.bias"} <= keys  # fmt: skip
    assert len(keys) == 216


def published(kind="resnet34"):
    """A state dict as torchvision publishes it, with other numbers."""
    torch.manual_seed(3)
    state = {k: torch.randn(v.shape) for k, v in ResNetEncoder(3, (64, 128, 256, 512), kind).state_dict().items()}
    return state | {"fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}


def test_published_weights_fill_every_encoder_and_stems_are_inflated(tmp_path):
    state = published()
    torch.save(state, tmp_path / "r.pth")
    save_file(state, tmp_path / "r.safetensors")
    for name, encoders in (("d-linknet34", 1), ("cmmpnet-d-linknet34", 2), ("roadfuse", 1)):
        network = build_network(preset(name))
        assert load_resnet_weights(network, tmp_path / "r.pth") == encoders
        other = build_network(preset(name))
        load_resnet_weights(other, tmp_path / "r.safetensors")
        for a, b in zip(network.modules(), other.modules(), strict=True):
            if isinstance(a, ResNetEncoder) and a.widths[0] == 64:
                assert torch.equal(a.layer3[2].conv2.weight, b.layer3[2].conv2.weight)
    early = build_network(preset("d-linknet34"))
    load_resnet_weights(early, tmp_path / "r.pth")
    stem = early.branch.encoder.conv1.weight
    assert torch.equal(stem[:, :3], state["conv1.weight"])
    assert torch.allclose(stem[:, 3], state["conv1.weight"].mean(1))
    gps = build_network(preset("d-linknet34-gps"))
    load_resnet_weights(gps, tmp_path / "r.pth")
    grey = torch.randn(1, 1, 32, 32)
    as_rgb = torch.conv2d(grey.repeat(1, 3, 1, 1), state["conv1.weight"])
    assert torch.allclose(torch.conv2d(grey, gps.branch.encoder.conv1.weight), as_rgb, atol=1e-3)


def test_weights_that_do_not_fit_are_named_key_by_key(tmp_path):
    network = build_network(preset("d-linknet34"))
    before = network.branch.encoder.conv1.weight.clone()
    broken = published()
    del broken["bn1.weight"]
    broken["extra"] = torch.zeros(1)
    broken["layer1.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    torch.save(broken, tmp_path / "b.pth")
    with pytest.raises(DataError) as caught:
        load_resnet_weights(network, tmp_path / "b.pth")
    lines = str(caught.value).splitlines()
    assert [line.removeprefix(f"{tmp_path / 'b.pth'}: ") for line in lines] == [
        "lacks bn1.weight",
        "holds extra, which the encoder has not",
        "layer1.0.conv1.weight has shape (64, 32, 3, 3), the encoder's is (64, 64, 3, 3)",
    ]
    assert torch.equal(network.branch.encoder.conv1.weight, before)
    torch.save(published("resnet18"), tmp_path / "r18.pth")
    with pytest.raises(DataError, match=r"lacks layer1\.2\.conv1\.weight"):
        load_resnet_weights(network, tmp_path / "r18.pth")
    for content in (b"not weights", b"root:x:0:0:root:/root:/bin/bash\n", b"", b"PK\x03\x04"):
        (tmp_path / "no.pth").write_bytes(content)
        with pytest.raises(DataError, match="is not a file of weights"):
            load_resnet_weights(network, tmp_path / "no.pth")
    with pytest.raises(ConfigError, match="does not exist"):
        load_resnet_weights(network, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="fits no encoder"):
        load_resnet_weights(build_network(preset("unet")), tmp_path / "r18.pth")


@pytest.mark.parametrize(("wrong", "message"), [
    ({"decoder": "unet"}, "decoder 'unet' does not fit encoder 'resnet34'"),
    ({"encoder": "vgg16"}, "decoder 'linknet' does not fit encoder 'vgg16'"),
    ({"head": "pointrend"}, "needs decoder 'x4'"),
    ({"head": "fine", "encoder": "unet", "decoder": "unet"}, "head 'fine' needs decoder 'linknet'"),
    ({"fusion": "gated", "modalities": {"image": 3}}, "needs at least two modalities"),
    ({"modalities": {"image": 0}}, "at least one channel"),
    ({"encoder": "unet", "decoder": "unet", "fusion": "stems"}, "needs a ResNet"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig.model_validate(wrong)


@pytest.mark.parametrize("fusion", ["concatenate", "stems", "late", "fusenet", "gated", "dual-enhancement", "roadfuse"])
def test_three_modalities(fusion):
    config = NetworkConfig.model_validate(
        {"modalities": {"image": 3, "gps": 5, "lidar": 2}, "width": 0.125, "fusion": fusion, "context": "none"}
    )
    network = build_network(config).eval()
    assert network(inputs(config, 1, 64, 64)).logits.shape == (1, 1, 64, 64)
    assert torch.isfinite(network({"lidar": torch.randn(1, 2, 64, 64)}).logits).all()


@pytest.mark.parametrize("up", ["transposed", "1d", "1d-released"])
@pytest.mark.parametrize("name", ["d-linknet34", "roadfuse"])
def test_the_fine_head_fits_any_size_and_all_of_it_learns(name, up):
    network = build_network(preset(name).model_copy(update={"width": 0.125, "head": "fine", "up": up})).train()
    made = network(inputs(network.config, 2, 70, 41))
    assert made.logits.shape == (2, 1, 70, 41)
    made.logits.square().mean().backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None]
    network.eval()
    x = inputs(network.config, 1, 64, 64)
    with torch.inference_mode():
        plain = network(x).logits
        assert torch.allclose(fold_norms(network)(x).logits, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize(("head", "decoder", "fusion"), [
    ("fine", "linknet", "gated"), ("fine", "linknet", "stems"), ("pointrend", "x4", "roadfuse"),
])  # fmt: skip
def test_heads_are_refused_where_they_are_not_made_for_the_fusion(head, decoder, fusion):
    with pytest.raises(ConfigError, match=f"head: '{head}' is not made for fusion '{fusion}'"):
        build_network(NetworkConfig.model_validate({"head": head, "decoder": decoder, "fusion": fusion}))


@pytest.mark.parametrize("messages", ["local", "global", "local+global"])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("levels", [1, 4])
def test_ablations_of_the_enhancement_module(messages, gates, levels):
    update = {"width": 0.125, "messages": messages, "message_gates": gates, "pyramid_levels": levels}
    network = build_network(preset("cmmpnet-linknet34").model_copy(update=update)).train()
    out = network(inputs(network.config, 2, 64, 64)).logits
    out.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (2, 8), (64, 38), (7, 8), (5, 5)])
def test_pooling_by_rows_and_columns_is_pooling(size, layout, dtype):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)).to(dtype).contiguous(memory_format=layout)
    pooled = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    assert torch.equal(max_pool_3x3(x), pooled)
    assert torch.equal(max_pool_3x3(x.requires_grad_()), pooled)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_relu_of_every_bfloat16_is_pytorchs(layout):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()].reshape(4, 255, 8, 8).contiguous(memory_format=layout)
    expected = torch.nn.functional.relu(x)
    assert torch.equal(relu(x.clone(memory_format=torch.preserve_format)), expected)
    assert relu(x).data_ptr() == x.data_ptr()
    assert torch.equal(x, expected)


def test_relu_has_pytorchs_gradient():
    x = torch.linspace(-1, 1, 9).bfloat16().requires_grad_()
    relu(x * 1).sum().backward()
    assert torch.equal(x.grad, (x > 0).to(x.dtype))


@pytest.mark.parametrize("name", ["roadfuse", "cmmpnet-d-linknet34", "d-linknet34", "deepdualmapper"])
def test_no_norm_is_left_after_folding(name):
    left = [n for n, part in fold_norms(settled(name)).named_modules() if isinstance(part, nn.BatchNorm2d | Affine)]
    assert not left


def test_gates_leave_the_network():
    for name in ("deepdualmapper", "roadfuse"):
        network = compact(name).eval()
        maps = network(inputs(network.config, 1, 64, 64)).maps
        for level in {k.split("/")[2] for k in maps}:
            total = maps[f"gate/image/{level}"] + maps[f"gate/gps/{level}"]
            assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
        alone = network({"gps": torch.randn(1, 1, 64, 64)}).maps
        assert all((alone[k] < 1e-6).all() for k in alone if "image" in k)


def test_slim_encoders_of_ours_do_not_look_at_the_batch():
    network = compact("roadfuse").train()
    assert not [m for m in network.slim.modules() if isinstance(m, nn.BatchNorm2d)]
    for part in network.parameters():  # what began at zero counts now
        nn.init.normal_(part, std=0.05)
    x = torch.randn(3, 1, 64, 64)
    one, of_three = (network.slim["gps"].encoder.stage(0, y)[0][:1] for y in (x[:1], x))
    assert torch.allclose(one, of_three, rtol=1e-4, atol=1e-5)


def test_unknown_preset_and_bad_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="'x' is not a preset; choose one of d-linknet34"):
        preset("x")
    with pytest.raises(ConfigError, match="does not exist"):
        read_checkpoint_info(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="is not a RoadFuse checkpoint"):
        read_checkpoint_info(tmp_path / "bad.safetensors")


def test_weights_of_another_width_are_refused(tmp_path):
    network = compact("d-linknet34")
    info = CheckpointInfo(network=NetworkConfig(width=0.25), layers=[], resolution_m=1, window_px=64, recipe={})
    save_checkpoint(tmp_path / "c.safetensors", network, info)
    with pytest.raises(ConfigError, match="does not fit its network at"):
        load_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    network = compact("d-linknet34")
    info = CheckpointInfo(network=network.config, layers=[], resolution_m=1, window_px=64, recipe={})
    with torch.no_grad():
        network.branch.encoder.layer1[0].conv1.weight[0, 0, 0, 0] = value
    save_checkpoint(tmp_path / "c.safetensors", network, info)
    with pytest.raises(
        ConfigError, match=r"c.safetensors'? holds numbers that are not finite at branch.encoder.layer1.0.conv1"
    ):
        load_checkpoint(tmp_path / "c.safetensors")


def test_values_that_float16_cannot_hold_are_kept(tmp_path):
    network = compact("d-linknet34").eval()
    info = CheckpointInfo(network=network.config, layers=[], resolution_m=1, window_px=64, recipe={})
    network.branch.encoder.bn1.running_var[0] = 1e6
    save_checkpoint(tmp_path / "c.safetensors", network, info)
    assert load_checkpoint(tmp_path / "c.safetensors")[0].branch.encoder.bn1.running_var[0] == 1e6


def test_a_strided_convolution_of_one_pixel_is_pytorchs():
    torch.manual_seed(0)
    ours, plain = Conv2d(4, 8, 1, 2, bias=False), torch.nn.Conv2d(4, 8, 1, 2, bias=False)
    plain.load_state_dict(ours.state_dict())
    for height, width in ((8, 8), (7, 10)):
        x = torch.randn(2, 4, height, width)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), plain(b)
        assert torch.allclose(y, z, atol=1e-6)
        y.square().sum().backward()
        z.square().sum().backward()
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
        assert torch.allclose(ours.weight.grad, plain.weight.grad, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(ours(x), plain(x))


STEP = """
import torch
from roadfuse_core.models._blocks import ResidualUnit
from roadfuse_core.models._encoder import BasicBlock
for channels in (2, 4, 8, 12):
    for block in (BasicBlock(channels, 2 * channels, 2), ResidualUnit(channels, 2 * channels, 2)):
        block.to(memory_format=torch.channels_last)
        for n, px in ((1, 128), (4, 128), (4, 64)):
            x = torch.randn(n, channels, px, px).contiguous(memory_format=torch.channels_last).requires_grad_()
            for _ in range(2):
                block(x).sum().backward()
"""


def test_blocks_of_few_channels_keep_to_their_memory():
    """Where they lie last, PyTorch's way back through a strided convolution of one pixel wrote beyond them."""
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
