"""What a network is: a small frozen record; a preset is a name for one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from roadfuse_core.errors import ConfigError

__all__ = ["PRESETS", "NetworkConfig", "Preset", "preset"]

Fusion = Literal[
    "concatenate", "stems", "late", "residual-correction", "fusenet", "v-fusenet", "level3", "triseg", "gated",
    "dual-enhancement", "preconv", "elepreconv", "forests", "roadfuse",
]  # fmt: skip


class NetworkConfig(BaseModel):
    """Encoder, context, decoder, fusion and head of a network.

    Attributes:
        modalities: Channels of each input, by name, in the order in which they enter the network.
        encoder: Features on five or six scales.
        context: What stands between encoder and decoder.
        decoder: Back to the input's size.
        up: Upsampling of decoders with transposed convolutions: those, or the 1D decoder (Sun et al. 2019) as in the
            paper or as released.
        fusion: How modalities meet; `concatenate` and `stems` (a stem each, added) make one network of them.
        messages: Of the dual enhancement module: what is sent, `local`, `global` or `local+global`.
        message_gates: Whether messages are gated.
        message_kernel: Of the local message: 1 as released, 3 in the paper.
        pyramid_levels: Of the global message: grids of 1, 2, 4 and 8 maxima, so many of them.
        head: `linear`, `fine` on top of LinkNet's decoder, or `pointrend` on top of a decoder at 1/4.
        last_stride: Of a ResNet's last stage.
        width: Factor on all channel numbers; 1.0 is the published network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modalities: dict[str, int] = {"image": 3, "gps": 1}
    encoder: Literal["resnet18", "resnet34", "unet", "res-unet", "vgg16", "wideresnet38"] = "resnet34"
    context: Literal["none", "dilated", "pyramid", "pyramid-free", "aspp"] = "dilated"
    decoder: Literal[
        "linknet", "unet", "res-unet", "ternausnet", "segnet", "deconv", "fcn8", "deeplabv3+", "x4", "pspnet",
        "deeproadmapper", "roadtracer",
    ] = "linknet"  # fmt: skip
    up: Literal["transposed", "1d", "1d-released"] = "transposed"
    fusion: Fusion = "concatenate"
    messages: Literal["local", "global", "local+global"] = "local+global"
    message_gates: bool = True
    message_kernel: Literal[1, 3] = 1
    pyramid_levels: int = Field(3, ge=1, le=4)
    head: Literal["linear", "fine", "pointrend"] = "linear"
    last_stride: Literal[1, 2] = 2
    width: float = Field(1.0, gt=0, le=4)

    @field_validator("modalities")
    @classmethod
    def _some_channels(cls, value: dict[str, int]) -> dict[str, int]:
        if not value or min(value.values()) < 1:
            raise ValueError("every modality needs at least one channel")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> NetworkConfig:
        resnet, several = self.encoder.startswith("resnet"), self.fusion not in ("concatenate", "stems")
        needs = {"linknet": resnet, "deeplabv3+": resnet, "x4": resnet, "pspnet": resnet, "deeproadmapper": resnet,
                 "roadtracer": resnet, "segnet": self.encoder == "vgg16", "deconv": self.encoder == "vgg16",
                 "fcn8": self.encoder == "vgg16", "res-unet": self.encoder == "res-unet"}  # fmt: skip
        if not needs.get(self.decoder, not resnet):
            raise ValueError(f"decoder {self.decoder!r} does not fit encoder {self.encoder!r}")
        if self.fusion in ("stems", "roadfuse") and not resnet:
            raise ValueError(f"fusion {self.fusion!r} needs a ResNet, whose stems it adds")
        on = {"pointrend": "x4", "fine": "linknet"}.get(self.head, self.decoder)
        if self.decoder != on:
            raise ValueError(f"head {self.head!r} needs decoder {on!r}")
        if several and len(self.modalities) < 2:
            raise ValueError(f"fusion {self.fusion!r} needs at least two modalities")
        return self

    def channels(self, published: int) -> int:
        """A published channel number times the width, at least 4 and a multiple of 4."""
        return max(4, round(published * self.width / 4) * 4)


class Preset(BaseModel):
    """A published system, or one of ours.

    Attributes:
        paper: Who published it.
        config: The network.
    """

    model_config = ConfigDict(frozen=True)

    paper: str
    config: NetworkConfig


_SUN, _CMMP, _DDM, _PP, _EROAD = "Sun et al. 2019", "CMMPNet", "DeepDualMapper", "PP-LinkNet", "E-Road"
_IMAGE, _LIDAR = {"image": 3}, {"image": 3, "lidar": 1}


def _net(**parts: object) -> NetworkConfig:
    return NetworkConfig.model_validate(parts)


_UNET = {"encoder": "unet", "context": "none", "decoder": "unet"}
_RES_UNET = {"encoder": "res-unet", "context": "none", "decoder": "res-unet"}
_SEGNET = {"encoder": "vgg16", "context": "none", "decoder": "segnet"}
_LINKNET = {"context": "none"}
_ROADTRACER = {"encoder": "resnet18", "context": "none", "decoder": "roadtracer", "modalities": _IMAGE}
_TERNAUS = {"modalities": _IMAGE, "encoder": "wideresnet38", "context": "none", "decoder": "ternausnet"}
_ASPP = {"context": "aspp", "last_stride": 1}

PRESETS: dict[str, Preset] = {
    name: Preset(paper=paper, config=_net(**parts))
    for paper, name, parts in (
        (_SUN, "d-linknet34", {}),
        (_SUN, "d-linknet34-1d", {"up": "1d"}),
        (_SUN, "d-linknet34-1d-released", {"up": "1d-released", "fusion": "stems"}),
        (_SUN, "d-linknet34-stems", {"fusion": "stems"}),
        (_SUN, "d-linknet34-compact", {"width": 0.25}),
        (_SUN, "linknet34", _LINKNET),
        (_SUN, "linknet34-1d", _LINKNET | {"up": "1d"}),
        (_SUN, "unet", _UNET),
        (_SUN, "unet-1d", _UNET | {"up": "1d"}),
        (_SUN, "res-unet", _RES_UNET),
        (_SUN, "res-unet-1d", _RES_UNET | {"up": "1d"}),
        (_SUN, "deeplabv3plus", _ASPP | {"decoder": "deeplabv3+"}),
        (_SUN, "d-linknet34-gps", {"modalities": {"gps": 1}}),
        (_CMMP, "cmmpnet-d-linknet34", {"fusion": "dual-enhancement"}),
        (_CMMP, "cmmpnet-d-linknet34-paper", {"fusion": "dual-enhancement", "message_kernel": 3}),
        (_CMMP, "cmmpnet-linknet34", _LINKNET | {"fusion": "dual-enhancement"}),
        (_CMMP, "cmmpnet-res-unet", _RES_UNET | {"fusion": "dual-enhancement"}),
        (_CMMP, "late-d-linknet34", {"fusion": "late"}),
        (_CMMP, "segnet-lidar", _SEGNET | {"modalities": _LIDAR}),
        (_CMMP, "preconv-lidar", _SEGNET | {"modalities": _LIDAR, "fusion": "preconv"}),
        (_CMMP, "elepreconv-lidar", _SEGNET | {"modalities": _LIDAR, "fusion": "elepreconv"}),
        (_CMMP, "rfnorm-lidar", _SEGNET | {"modalities": _LIDAR, "fusion": "forests"}),
        (_DDM, "deepdualmapper", _UNET | {"fusion": "gated"}),
        (_DDM, "deepdualmapper-d-linknet34", {"fusion": "gated"}),
        (_DDM, "unet-image", _UNET | {"modalities": _IMAGE}),
        (_DDM, "deconvnet", _SEGNET | {"decoder": "deconv", "modalities": _IMAGE}),
        (_DDM, "deconvnet-1d", _SEGNET | {"decoder": "deconv", "modalities": _IMAGE, "up": "1d"}),
        (_DDM, "segnet", _SEGNET | {"modalities": _IMAGE}),
        (_DDM, "deeproadmapper", {"context": "none", "decoder": "deeproadmapper", "modalities": _IMAGE}),
        (_DDM, "roadtracer", _ROADTRACER),
        (_DDM, "deeproadmapper-1d", _LINKNET | {"decoder": "deeproadmapper", "modalities": _IMAGE, "up": "1d"}),
        (_DDM, "roadtracer-1d", _ROADTRACER | {"up": "1d"}),
        (_DDM, "fcn8", _SEGNET | {"decoder": "fcn8"}),
        (_DDM, "l3fsn", _SEGNET | {"decoder": "fcn8", "fusion": "level3"}),
        (_DDM, "late-segnet", _SEGNET | {"fusion": "late"}),
        (_DDM, "segnet-rc", _SEGNET | {"fusion": "residual-correction"}),
        (_DDM, "fusenet", _SEGNET | {"fusion": "fusenet"}),
        (_DDM, "v-fusenet", _SEGNET | {"fusion": "v-fusenet"}),
        (_DDM, "triseg", _SEGNET | {"fusion": "triseg"}),
        (_PP, "pp-linknet34", {"modalities": _IMAGE, "context": "pyramid", "last_stride": 1}),
        (_PP, "pp-linknet34-paper", {"modalities": _IMAGE, "context": "pyramid-free"}),
        (_PP, "pp-linknet34-1d", {"modalities": _IMAGE, "context": "pyramid", "last_stride": 1, "up": "1d"}),
        (_PP, "d-linknet34-image", {"modalities": _IMAGE}),
        (_PP, "ternausnetv2", _TERNAUS),
        (_PP, "ternausnetv2-1d", _TERNAUS | {"up": "1d"}),
        (_PP, "pspnet", {"modalities": _IMAGE, "context": "pyramid", "last_stride": 1, "decoder": "pspnet"}),
        (_EROAD, "e-road-18", _ASPP | {"modalities": _IMAGE, "encoder": "resnet18", "decoder": "x4", "head": "pointrend"}),
        (_EROAD, "e-road-34", _ASPP | {"modalities": _IMAGE, "decoder": "x4", "head": "pointrend"}),
        (_EROAD, "drunet", _RES_UNET | {"modalities": _IMAGE}),
        ("RoadFuse", "roadfuse", {"fusion": "roadfuse", "head": "fine"}),
        ("RoadFuse", "roadfuse-compact", {"fusion": "roadfuse", "head": "fine", "width": 0.25}),
    )
}  # fmt: skip


def preset(name: str) -> NetworkConfig:
    """The configuration behind a preset's name.

    Raises:
        ConfigError: No preset has this name.
    """
    if name not in PRESETS:
        raise ConfigError("model.preset", name, "is not a preset", f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name].config
