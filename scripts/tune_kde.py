"""Make the shipped kernel density: python scripts/tune_kde.py [--out FILE].

Every simulated training city is ingested and tuned on; the medians of kernel and threshold are kept.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from roadfuse_core.cubes import ingest
from roadfuse_core.inference import KdeModel
from roadfuse_core.metrics import tune_kde
from roadfuse_core.settings import load_city
from roadfuse_core.simulate import draw_knobs, simulate_city

CITIES = range(1000, 1006)


def main() -> None:
    """Tune on each city; keep the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("roadfuse_core/weights/kde.json"))
    out = parser.parse_args().out
    models = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in CITIES:
            city = load_city(simulate_city(Path(folder) / str(seed), draw_knobs(seed, 1024.0)))
            ingest(city)
            models.append(tune_kde(city))
            print(models[-1], flush=True)
    sigma = float(np.median([m.sigma_m for m in models]))
    threshold = float(np.exp(np.median(np.log([m.threshold_per_m2 for m in models]))))
    what = f"medians over simulated cities {CITIES.start} to {CITIES.stop - 1}, their training tiles"
    out.write_text(
        KdeModel(sigma_m=sigma, threshold_per_m2=float(f"{threshold:.4g}"), tuned_on=what).model_dump_json(indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
