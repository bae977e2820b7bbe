"""Make the shipped weights: python scripts/train_compact.py [--out FILE] [--steps N].

The recipe with its seeds is `roadfuse_core.training.CompactRecipe`; it is stored inside the checkpoint and beside it.
"""

import argparse
from pathlib import Path

from roadfuse_core.models import CheckpointInfo, save_checkpoint
from roadfuse_core.training import CompactRecipe, train_compact


def main() -> None:
    """Train, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("roadfuse_core/weights/fused.safetensors"))
    parser.add_argument("--steps", type=int, default=CompactRecipe().steps)
    arguments = parser.parse_args()
    recipe = CompactRecipe(steps=arguments.steps)
    network = train_compact(recipe, lambda line: print(line, flush=True))
    info = CheckpointInfo(
        network=recipe.network(),
        layers=[layer.model_dump() for layer in recipe.layers],
        resolution_m=recipe.resolution_m,
        window_px=recipe.window_px,
        recipe=recipe.model_dump(mode="json"),
    )
    save_checkpoint(arguments.out, network, info)
    arguments.out.with_suffix(".json").write_text(info.model_dump_json(indent=1) + "\n")
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
