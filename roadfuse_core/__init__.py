"""Everything that is true without Prefect: grids, points, cubes, networks, inference, scores."""
