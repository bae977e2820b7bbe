"""One contract for every preset, the published sizes, and checkpoints."""

import pytest
import torch
from torch import nn

from roadfuse_core.errors import ConfigError
from roadfuse_core.models import (
    PRESETS,
    CheckpointInfo,
    NetworkConfig,
    build_network,
    load_checkpoint,
    preset,
    read_checkpoint_info,
    save_checkpoint,
)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def compact(name):
    torch.manual_seed(0)
    return build_network(preset(name).model_copy(update={"width": 0.125}))


def inputs(config, n, h, w):
    torch.manual_seed(1)
    return {name: torch.randn(n, c, h, w) for name, c in config.modalities.items()}


@pytest.mark.parametrize("name", PRESETS)
class TestEveryPreset:
    @pytest.mark.parametrize(("h", "w"), [(1, 1), (31, 31), (224, 224), (67, 131)])
    def test_logits_have_the_size_of_the_input(self, name, h, w):
        network = compact(name).eval()
        assert network(inputs(network.config, 2, h, w)).shape == (2, 1, h, w)

    def test_every_parameter_has_a_finite_gradient(self, name):
        network = compact(name).train()
        network(inputs(network.config, 2, 64, 96)).square().mean().backward()
        for key, p in network.named_parameters():
            assert p.grad is not None, key
            assert torch.isfinite(p.grad).all(), key

    def test_a_batch_equals_its_members(self, name):
        network = compact(name).eval()
        x = inputs(network.config, 3, 64, 64)
        with torch.inference_mode():
            whole = network(x)
            parts = torch.cat([network({k: v[i : i + 1] for k, v in x.items()}) for i in range(3)])
        assert torch.allclose(whole, parts, atol=1e-4)

    def test_a_missing_modality_is_zeros_and_finite(self, name):
        network = compact(name).eval()
        x = inputs(network.config, 1, 64, 64)
        for gone in x:
            assert torch.isfinite(network(x | {gone: torch.zeros_like(x[gone])})).all()

    def test_save_load_rebuild(self, name, tmp_path):
        network = compact(name).eval()
        info = CheckpointInfo(
            network=network.config, layers=[{"kind": "binary"}], resolution_m=1, window_px=64, recipe={"seed": 0}
        )
        save_checkpoint(tmp_path / "c.safetensors", network, info, half=False)
        again, read = load_checkpoint(tmp_path / "c.safetensors")
        x = inputs(network.config, 1, 64, 64)
        assert read == info
        assert torch.equal(network(x), again(x))


def test_published_sizes():
    """31.1 M parameters with 9.44 M in the centre: Zhou et al. 2018, as counted for the released code."""
    network = build_network(NetworkConfig(modalities={"image": 3}))
    assert count(network) == 31_096_129
    assert count(network.centre) == 9_439_232
    # ResNet-34 without its classifier, as torchvision counts it: 21,797,672 - 513,000.
    assert count(network.encoder) == 21_284_672


def test_encoder_keys_are_those_of_torchvision():
    keys = set(build_network(NetworkConfig(modalities={"image": 3})).encoder.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight",
            "layer4.2.bn2.bias"} <= keys  # fmt: skip
    assert len(keys) == 216


def test_two_presets_are_two_networks():
    assert len({c.model_dump_json() for c in PRESETS.values()}) == len(PRESETS)


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
