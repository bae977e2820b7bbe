"""The knobs of a simulated city; each moves one difficulty that the papers name."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["CityKnobs", "DirtKnobs", "draw_knobs"]


class DirtKnobs(BaseModel):
    """Share of all rows that is made bad, by kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    null_island: float = Field(0.002, ge=0, le=0.2, description="rows at 0, 0")
    not_finite: float = Field(0.002, ge=0, le=0.2, description="rows with NaN as a coordinate")
    swapped: float = Field(0.001, ge=0, le=0.2, description="rows with latitude and longitude exchanged")
    duplicate: float = Field(0.003, ge=0, le=0.2, description="rows written twice")
    teleport: float = Field(0.001, ge=0, le=0.2, description="rows moved by almost half the city between two samples")


class CityKnobs(BaseModel):
    """A simulated city, whole in its seed and knobs.

    The same knobs give the same bytes on every machine; everything random is drawn from the seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, lt=2**63, description="another seed, another city")
    size_m: float = Field(2048.0, ge=256, description="edge of the square city, metres")
    resolution_m: float = Field(1.0, gt=0, description="pixel of the imagery and of the truth mask, metres")
    tile_px: int = Field(256, ge=64, description="tile edge written into city.yaml")
    lon: float = Field(13.2, ge=-180, le=180, description="longitude of the centre")
    lat: float = Field(47.4, ge=-80, le=84, description="latitude of the centre")

    road_contrast: float = Field(1.0, ge=0, le=1, description="how far asphalt stands out from the ground")
    canopy: float = Field(0.45, ge=0, le=1, description="share of street sides lined by trees that reach over the road")
    shadow: float = Field(0.5, ge=0, le=1, description="strength and length of shadows")
    lookalikes: float = Field(0.5, ge=0, le=1, description="railways and grey flat roofs that look like roads")
    fog: float = Field(0.0, ge=0, le=1, description="opacity of fog over the image")

    parking: float = Field(0.5, ge=0, le=1, description="parking lots and waiting areas full of points")
    untravelled: float = Field(0.12, ge=0, le=0.9, description="share of minor roads that no vehicle uses")
    traffic_power: float = Field(1.1, ge=0, le=3, description="exponent of the power law of route popularity")
    gps_noise_m: float = Field(4.0, ge=0, le=50, description="standard deviation of a position, metres per axis")
    canyon_bias_m: float = Field(5.0, ge=0, le=50, description="systematic shift between high buildings, metres")
    intervals_s: tuple[float, ...] = Field((3.0, 10.0, 15.0, 30.0, 60.0), description="sampling intervals of vehicles")
    coordinate_step_deg: float = Field(1e-5, ge=0, le=1e-2, description="rounding of coordinates; 0 keeps all digits")
    speed_step_kmh: float = Field(1.0, gt=0, le=10, description="rounding of speeds")
    bearing_step_deg: float = Field(2.0, gt=0, le=45, description="rounding of bearings")
    dirt: DirtKnobs = Field(DirtKnobs(), description="bad rows")

    days: int = Field(7, ge=1, description="daily dumps from 2026-03-29 on, so that a week spans two months")
    points_per_day: int = Field(30_000, ge=0, description="clean rows of one dump")

    outdated_missing: float = Field(0.15, ge=0, le=0.9, description="share of true minor roads that the old map lacks")
    outdated_gone: float = Field(0.08, ge=0, le=0.9, description="roads of the old map that are gone, as share of true minor")


def draw_knobs(seed: int, size_m: float) -> CityKnobs:
    """A city whose difficulties are drawn from the ranges that real cities show."""
    rng = np.random.default_rng([seed, 41])
    return CityKnobs(
        seed=seed, size_m=size_m, dirt=DirtKnobs(null_island=0, not_finite=0, swapped=0, duplicate=0, teleport=0), days=1,
        lon=float(rng.uniform(12, 18)), lat=float(rng.uniform(-45, 55)),
        road_contrast=float(rng.uniform(0.6, 1)), canopy=float(rng.uniform(0.1, 0.85)),
        shadow=float(rng.uniform(0.1, 0.95)), lookalikes=float(rng.uniform(0, 1)),
        fog=float(max(0.0, rng.uniform(-0.6, 0.5))), parking=float(rng.uniform(0, 1)),
        untravelled=float(rng.uniform(0, 0.4)), traffic_power=float(rng.uniform(0.6, 1.3)),
        gps_noise_m=float(rng.uniform(2, 8)), canyon_bias_m=float(rng.uniform(0, 10)),
        points_per_day=int(np.exp(rng.uniform(np.log(12_000), np.log(400_000)))),
    )  # fmt: skip
