"""Make the shipped networks: python scripts/train_weights.py OUT [--only fused,image,gps] [--beside RECIPE.yaml …].

The recipes lie in roadfuse_core/weights; the seeds of the cities are these. What is done stays done: run
it again after a crash. Test cities are those of the comparison, and are only scored. Recipes given beside are
trained on the same cities, into OUT/runs alone.
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
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="recipes that are trained and not shipped")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw cities")
    parser.add_argument("--threads", type=int, help="of PyTorch; by default all cores")
    a = parser.parse_args()
    shipped = [WEIGHTS / f"{name}.yaml" for name in a.only.split(",") if name]
    recipes = [*shipped, *a.beside]
    named = "".join(source.read_text() for source in recipes)
    draw_cities(a.out, {split: seeds for split, seeds in CITIES.items() if f"cities/{split}/" in named}, a.workers)
    for source in recipes:
        recipe = a.out / source.name
        shutil.copyfile(source, recipe)
        done = train(load_recipe(recipe), a.out / "runs" / recipe.stem, show, a.threads)
        for suffix in (".safetensors", ".json") if source in shipped else ():
            shutil.copyfile(done.checkpoint.with_suffix(suffix), source.with_suffix(suffix))
        print(f"{recipe.stem}: g_iou of the validation city {done.validation_g_iou:.3f}")


if __name__ == "__main__":
    main()
