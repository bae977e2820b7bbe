"""Make the shipped networks: python scripts/train_weights.py OUT [--only fused,image,gps].

The recipes lie in roadfuse_core/weights; the seeds of the cities are these. What is done stays done: run
it again after a crash. Test cities are those of the comparison, and are only scored.
"""

import argparse
import shutil
from pathlib import Path

from cities import draw_cities

from roadfuse_core.training import load_recipe, train

CITIES = {"train": range(1000, 1028), "sparse": range(1100, 1148), "validation": range(1900, 1901), "test": range(2000, 2004)}
WEIGHTS = Path(__file__).parents[1] / "roadfuse_core/weights"


def show(what: str, done: int, total: int) -> None:
    """A line now and then."""
    if done % 50 == 0 or done == total:
        print(f"{what}: {done} of {total}", flush=True)


def main() -> None:
    """Draw, train, and put the weights and their facts into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="fused,image,gps")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw cities")
    parser.add_argument("--threads", type=int, help="of PyTorch; by default all cores")
    a = parser.parse_args()
    draw_cities(a.out, CITIES, a.workers)
    for name in a.only.split(","):
        recipe = a.out / f"{name}.yaml"
        shutil.copyfile(WEIGHTS / recipe.name, recipe)
        done = train(load_recipe(recipe), a.out / "runs" / name, show, a.threads)
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(done.checkpoint.with_suffix(suffix), WEIGHTS / f"{name}{suffix}")
        print(f"{name}: g_iou of the validation city {done.validation_g_iou:.3f}")


if __name__ == "__main__":
    main()
