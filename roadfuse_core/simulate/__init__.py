"""A drawn city with imagery, trajectories and truth: the project's own sample input."""

from roadfuse_core.simulate._config import CityKnobs, DirtKnobs, draw_knobs
from roadfuse_core.simulate._write import SimulatedCity, simulate_city

__all__ = ["CityKnobs", "DirtKnobs", "SimulatedCity", "draw_knobs", "simulate_city"]
