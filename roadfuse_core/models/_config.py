"""What a network is: a small frozen record; a preset is a name for one."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator

from roadfuse_core.errors import ConfigError

__all__ = ["PRESETS", "NetworkConfig", "preset"]


class NetworkConfig(BaseModel):
    """D-LinkNet34 on any number of modalities.

    Attributes:
        modalities: Channels of each input, by name, in the order in which they enter the network.
        fusion: "concatenate" puts all channels into one stem (Sun et al. 2019, the paper); "stems" gives each
            modality a 7×7 stem and adds them (its released code).
        width: Factor on all channel numbers; 1.0 is the published network.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modalities: dict[str, int] = {"image": 3, "gps": 1}
    fusion: str = Field("concatenate", pattern="^(concatenate|stems)$")
    width: float = Field(1.0, gt=0, le=4)

    @field_validator("modalities")
    @classmethod
    def _some_channels(cls, value: dict[str, int]) -> dict[str, int]:
        if not value or min(value.values()) < 1:
            raise ValueError("every modality needs at least one channel")
        return value

    def channels(self, published: int) -> int:
        """A published channel number times the width, at least 4 and a multiple of 4."""
        return max(4, round(published * self.width / 4) * 4)


PRESETS = {
    "d-linknet34": NetworkConfig(),
    "d-linknet34-stems": NetworkConfig(fusion="stems"),
    "d-linknet34-compact": NetworkConfig(width=0.25),
}


def preset(name: str) -> NetworkConfig:
    """The configuration behind a preset's name.

    Raises:
        ConfigError: No preset has this name.
    """
    if name not in PRESETS:
        raise ConfigError("model.preset", name, "is not a preset", f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
