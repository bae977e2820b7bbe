"""GPS alone on real cities against kernel density tuned on the other city: python tests/real/leave_one_out.py OUT [--weights NAME …].

Athens and Chicago, OpenStreetMap drawn 8 m wide, IoU over pixels within 20 m of a point. Kernel and threshold of the density
are tuned on the other city; networks are scored as they are, and averaged over the eight turns of a window. With --epochs
the shipped `gps` weights go on learning on the other city first. Writes nothing beside OUT.
"""

import argparse
import json
import os
from pathlib import Path

from roadfuse_core.cluster import open_cluster
from roadfuse_core.cubes import ingest
from roadfuse_core.inference import infer
from roadfuse_core.metrics import score_city, tune_kde
from roadfuse_core.settings import City, ClusterSpec, load_city
from roadfuse_core.training import load_recipe, train

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("ROADFUSE_DATA", HERE.parents[2] / "shared/data")).resolve()
CITIES = ("athens-small", "athens-large", "chicago")
OTHER = {"athens-small": "chicago", "athens-large": "chicago", "chicago": "athens-large"}
RECIPE = """\
name: {name}
cities: [{teacher}.yaml]
network: {{preset: d-linknet34-gps, width: 0.25, start: {start}}}
stages: [{{epochs: {epochs}}}]
epoch_windows: 800
optimiser: {{lr: 0.0005}}
"""


def lay(out: Path, name: str) -> City:
    """The city of this folder with its workspace in OUT, ingested."""
    text = (
        (HERE / f"{name}.yaml")
        .read_text()
        .replace("workspace: work/", "workspace: ")
        .replace("../../../shared/data", str(DATA))
    )
    path = out / f"{name}.yaml"
    path.write_text(text)
    city = load_city(path)
    ingest(city)
    return city


def tuned(out: Path, city: City) -> str:
    """Kernel density tuned on a city."""
    path = out / f"kde-{city.name}.json"
    if not path.is_file():
        path.write_text(tune_kde(city).model_dump_json())
    return str(path)


def taught(out: Path, teacher: str, start: Path, epochs: int) -> str:
    """Weights that went on learning on a city."""
    recipe = out / f"gps-{teacher}-{epochs}.yaml"
    recipe.write_text(RECIPE.format(name=recipe.stem, teacher=teacher, start=start, epochs=epochs))
    return str(train(load_recipe(recipe), out / "runs" / recipe.stem).checkpoint)


def main() -> None:
    """Print a line for each city and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", nargs="*", default=[], help="scored as they are, beside the others")
    parser.add_argument("--start", type=Path, default=HERE.parents[1] / "roadfuse_core/weights/gps.safetensors")
    parser.add_argument("--epochs", type=int, default=0, help="of going on; 0 for none")
    parser.add_argument("--cities", nargs="*", default=CITIES)
    a = parser.parse_args()
    out = a.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cities = {name: lay(out, name) for name in CITIES}
    with open_cluster(ClusterSpec(workers=2)) as client:
        for name in a.cities:
            city, other = cities[name], OTHER[name]
            networks = {w: str(Path(w)) for w in a.weights}
            if a.epochs:
                networks[f"went on with {other}"] = taught(out, other, a.start.resolve(), a.epochs)
            models = {f"kernel density of {other}": (tuned(out, cities[other]), False)}
            for what, weights in networks.items():
                models |= {what: (weights, False), f"{what}, eight turns": (weights, True)}
            found = {}
            for what, (weights, turns) in models.items():
                scored = city.model_copy(update={"model": city.model.model_copy(update={"turns": turns})})
                infer(scored, weights, "score", client, full=True)
                found[what] = score_city(scored, "score", client=client).subsets["all_near"]
            base = next(iter(found.values()))["g_iou"]
            for what, scores in found.items():
                print(json.dumps({"city": name, "model": what, "g_iou near": round(scores["g_iou"], 4), "ratio": round(scores["g_iou"] / base, 3),
                                  "precision": round(scores["precision"], 3), "recall": round(scores["recall"], 3)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
