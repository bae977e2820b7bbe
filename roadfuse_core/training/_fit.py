"""A recipe becomes a checkpoint: data laid out, stages run by Lightning, one rank a GPU where there are several."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy

from roadfuse_core.cluster import Progress, default_ranks, open_cluster, quiet, telling_loss
from roadfuse_core.errors import ConfigError, RoadFuseError, StoreError
from roadfuse_core.files import write_whole
from roadfuse_core.locks import COMMITTER, sole_writer
from roadfuse_core.models import (
    CheckpointInfo,
    Network,
    build_network,
    load_checkpoint,
    load_resnet_weights,
    save_checkpoint,
)
from roadfuse_core.settings import ClusterSpec, load_city
from roadfuse_core.training._forests import fit_forests
from roadfuse_core.training._ground import Ground, require_ground
from roadfuse_core.training._loader import BatchLoader, readers_for
from roadfuse_core.training._module import RoadModule
from roadfuse_core.training._norms import share_norms
from roadfuse_core.training._ranks import Meeting, Rank, run_ranks
from roadfuse_core.training._recipe import Recipe
from roadfuse_core.training._splits import Splits, city_files, fraction_of, lay_split, split_recipe, taught_cities
from roadfuse_core.training._states import StageEnd, StateFiles, load_state, usable_state
from roadfuse_core.training._windows import BlankWindows, StillWindows, TrainingWindows, WindowOrder

__all__ = ["DivergedError", "Trained", "TrainingStoppedError", "check_recipe", "train"]

log = logging.getLogger(__name__)
STATE_EVERY_S = 300.0  # time between two states within an epoch
FEW_WINDOWS = 4  # of a rank and step, below which a batch norm's statistics are taken over all ranks


@dataclass(frozen=True)
class Trained:
    """What a training left.

    Attributes:
        checkpoint: The weights.
        splits: Which tiles were for what.
        validation_g_iou: Of the last epoch, or the best, by `keep`.
        epochs: That were run.
    """

    checkpoint: Path
    splits: Path
    validation_g_iou: float
    epochs: int


def check_recipe(recipe: Recipe) -> Splits:
    """Whatever can be known before tiles are read; nothing is written.

    Returns:
        The tiles of every split.

    Raises:
        ConfigError: The network cannot be built, a split is empty, or a city lacks what the recipe needs.
    """
    _begin(recipe)
    splits, view = split_recipe(recipe), recipe.view()
    needs = [(city, stage.labels) for stage in recipe.stages for city in splits.train]
    for city, labels in dict.fromkeys([*needs, *((c, recipe.target) for c in splits.validation)]):
        require_ground(load_city(Path(city)), labels, view)
    return splits


def train(
    recipe: Recipe, out: Path, tell: Progress = quiet, threads: int | None = None, cluster: ClusterSpec | None = None
) -> Trained:
    """Train by a recipe; a killed run goes on at its last state, within an epoch too, and ends with the same weights.

    Args:
        recipe: What to do.
        out: Folder for the checkpoint, the splits, the log and the state.
        tell: Progress: (what, done, total).
        threads: Of PyTorch on a CPU; by default all.
        cluster: Where ranks run when there are several.

    Raises:
        ConfigError: The recipe does not fit the data, said before the first step.
        StoreError: The folder holds another recipe's run, or another process trains in it.
        TrainingStoppedError: It was interrupted (Ctrl-C, SIGTERM).
    """
    with sole_writer(out, (COMMITTER,), f"training of {recipe.name}"):
        _require_own(out, recipe)
        if not (out / "done.json").is_file():
            with _stops_explained(out):
                _complete(recipe, out, tell, threads, cluster)
    facts = json.loads((out / "done.json").read_text())
    return Trained(out / "checkpoint.safetensors", out / "splits.json", facts["g_iou"], facts["epochs"])


@contextmanager
def _stops_explained(out: Path) -> Iterator[None]:
    """An interruption becomes one line that says how to go on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
        begun = any(out.glob("stage-*/last.ckpt")) or any(out.glob("stage-*/done.json"))
        kept = "its state is kept" if begun else "no state was kept yet"
        how = "it goes on from there" if begun else "it begins from the start"
        raise TrainingStoppedError(f"{out}: the training was stopped, {kept}; run the same command again and {how}") from stop


def _complete(recipe: Recipe, out: Path, tell: Progress, threads: int | None, cluster: ClusterSpec | None) -> None:
    """All of a run that is not done; from its last state, if it has begun."""
    splits = check_recipe(recipe)
    grounds = _lay_all(recipe, splits, out.parent / "ground", tell)
    # From here on the folder is this recipe's; one that was refused does not keep it.
    write_whole(out / "recipe.json", recipe.model_dump_json(indent=1))
    write_whole(out / "splits.json", json.dumps(asdict(splits), indent=1))
    result = _run_ranks(recipe, grounds, out, _count_ranks(recipe), tell, threads, cluster)
    write_whole(out / "done.json", json.dumps(result))


def _count_ranks(recipe: Recipe) -> int:
    """Ranks of a recipe on this machine; no more than there are windows in a batch."""
    return recipe.ranks or min(default_ranks(), recipe.batch)


def _require_own(out: Path, recipe: Recipe) -> None:
    mark = out / "recipe.json"
    if mark.is_file() and mark.read_text() != recipe.model_dump_json(indent=1):
        raise StoreError(f"{out}: holds a run of another recipe; give another --out, or remove the folder")


def _begin(recipe: Recipe) -> Network:
    """The network before the first step; the same in every process."""
    torch.manual_seed(recipe.seed)
    network = build_network(recipe.network_config())
    if recipe.network.resnet:
        with _told_as("network.resnet"):
            load_resnet_weights(network, recipe.root / recipe.network.resnet)
    if recipe.network.start:
        with _told_as("network.start"):
            held, info = load_checkpoint(recipe.root / recipe.network.start)
        if info.network != recipe.network_config():
            raise ConfigError("network.start", recipe.network.start, "holds another network", "name its preset and width")
        network.load_state_dict(held.state_dict())
    return network


@contextmanager
def _told_as(key: str) -> Iterator[None]:
    """An error of a file under the key of the recipe that named it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(key, error.value, error.problem, error.fix) from error


@dataclass(frozen=True)
class _Grounds:
    stages: tuple[tuple[Ground, ...], ...]
    validation: tuple[Ground, ...]


def _lay_all(recipe: Recipe, splits: Splits, folder: Path, tell: Progress) -> _Grounds:
    stages = []
    for stage in recipe.stages:
        tiles = fraction_of(splits.train, stage.label_fraction, recipe.split.seed)
        grounds = lay_split(recipe, tiles, stage.labels, folder, tell)
        if not sum(sum(g.road) for g in grounds):
            raise ConfigError("stages", stage.labels, "shows nothing on the training tiles", "check labels, or take more tiles")
        stages.append(tuple(grounds))
    return _Grounds(tuple(stages), tuple(lay_split(recipe, splits.validation, recipe.target, folder, tell)))


def _run_ranks(
    recipe: Recipe, grounds: _Grounds, out: Path, ranks: int, tell: Progress, threads: int | None, cluster: ClusterSpec | None
) -> dict[str, Any]:
    if ranks == 1:
        return run_stages(Rank(), recipe, grounds, out, tell, threads)
    with open_cluster(cluster or ClusterSpec(workers=ranks)) as client, telling_loss("training"):
        return run_ranks(client, ranks, run_stages, recipe, grounds, out)


def run_stages(
    rank: Rank, recipe: Recipe, grounds: _Grounds, out: Path, tell: Progress = quiet, threads: int | None = None
) -> dict[str, Any]:
    """All stages, on one rank; the first writes the checkpoint.

    Returns:
        The validation's g_iou, the epochs run and the seconds they took; of ranks other than the first, nothing.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    network = _begin(recipe)
    if rank.of > 1 and recipe.batch // rank.of < FEW_WINDOWS:
        share_norms(network)
    fit_forests(network, recipe, grounds.stages[0])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    score, ends = 0.0, []
    for number, stage in enumerate(grounds.stages):
        score, end = _run_stage(RoadModule(network, recipe, number), grounds, stage, out, rank, tell)
        ends.append(end)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if rank.number:
        return {}
    _save(recipe, network, out)
    return {"g_iou": score, "epochs": sum(end.epochs for end in ends), "seconds": sum(end.seconds for end in ends)}


def _run_stage(
    module: RoadModule, grounds: _Grounds, stage: tuple[Ground, ...], out: Path, rank: Rank, tell: Progress
) -> tuple[float, StageEnd]:
    """One stage, from its last state; leaves the network with its weights, and returns its score and what it took."""
    recipe, number = module.recipe, module.stage
    folder = out / f"stage-{number}"
    end = StageEnd.read(folder / "done.json")
    if end is None:
        state = usable_state(folder / "last.ckpt")
        trainer = _trainer(recipe, number, out, rank, tell)
        with warnings.catch_warnings():
            # Lightning's advice (workers, intervals of its log) is not for those who start a refresh.
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation")
            trainer.fit(module, *_loaders(recipe, grounds, stage, number, rank, trainer), ckpt_path=state, weights_only=True)
        end = StageEnd(trainer.current_epoch, module.seconds)
        if not rank.number:
            end.write(folder / "done.json")
    held = load_state(folder / f"{recipe.keep}.ckpt")
    module.load_state_dict(held["state_dict"])
    return held["score"], end


def _loaders(
    recipe: Recipe, grounds: _Grounds, stage: tuple[Ground, ...], number: int, rank: Rank, trainer: Trainer
) -> tuple[BatchLoader, BatchLoader]:
    device = trainer.strategy.root_device
    readers, pinned = readers_for(device), device.type == "cuda"
    order = WindowOrder(recipe, lambda: trainer.global_step, rank.number, rank.of)
    still = StillWindows(recipe.view(), grounds.validation)
    own = range(rank.number, len(still), rank.of)
    if not own:  # all ranks validate at the same time, or the others would wait
        still, own = BlankWindows(recipe.view(), grounds.validation), range(1)
    deciding = [list(own[k : k + recipe.batch]) for k in range(0, len(own), recipe.batch)]
    return (
        BatchLoader(TrainingWindows(recipe, stage, number), order, readers, pinned),
        BatchLoader(still, deciding, readers, pinned),
    )


def _trainer(recipe: Recipe, stage: int, out: Path, rank: Rank, tell: Progress) -> Trainer:
    folder = out / f"stage-{stage}"
    after: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": False}  # after every validation
    callbacks: list[Callback] = [_Teller(tell, recipe.stages[stage].epochs, stage)]
    if recipe.keep == "best":
        callbacks.append(ModelCheckpoint(folder, "best", monitor="g_iou", mode="max", **after))
    # The state to go on from is a callback of its own, and the last of them: it holds what the others have just noted. With
    # `save_last`, Lightning writes it only at epochs that are among the best.
    callbacks.append(ModelCheckpoint(folder, "last", **after))
    callbacks.append(_StateWithinEpoch(folder / "last.ckpt", recipe.epoch_steps))
    if recipe.patience:
        callbacks.append(EarlyStopping("g_iou", mode="max", patience=recipe.patience, check_on_train_epoch_end=False))
    _keep_log(out / "log" / f"stage-{stage}")
    logger = [
        CSVLogger(out, name="log", version=f"stage-{stage}"),
        TensorBoardLogger(out, name="tensorboard", version=f"stage-{stage}"),
    ]
    several: dict[str, Any] = {}
    if rank.of > 1:
        environment = Meeting(rank)
        several = {"strategy": DDPStrategy(cluster_environment=environment), "num_nodes": rank.of}
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    gpu = torch.cuda.is_available()
    trainer = Trainer(
        accelerator="gpu" if gpu else "cpu", devices=1, deterministic="warn" if gpu else None,
        max_epochs=recipe.stages[stage].epochs,
        precision="bf16-mixed" if recipe.precision == "bf16" else "32-true", gradient_clip_val=recipe.optimiser.clip,
        callbacks=callbacks, logger=logger if not rank.number else False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=10,
        default_root_dir=out, plugins=[StateFiles()], **several,
    )  # fmt: skip
    return trainer


def _keep_log(folder: Path) -> None:
    """The log of a run that was killed gets a number, or Lightning would remove it."""
    if (folder / "metrics.csv").is_file():
        (folder / "metrics.csv").rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv')))}.csv")


class _Teller(Callback):
    """Steps and scores as the project's progress, and an end to runs that have gone wrong."""

    def __init__(self, tell: Progress, epochs: int, stage: int) -> None:
        self.tell, self.epochs, self.stage = tell, epochs, stage

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        total = self.epochs * module.recipe.epoch_steps
        self.tell(f"training, stage {self.stage + 1}", trainer.global_step, total)
        if not torch.isfinite(outputs["loss"]):
            raise DivergedError(
                f"step {trainer.global_step}: the loss is not finite; lower optimiser.lr, or set precision: '32'"
            )

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        log.info("stage %d, epoch %d: g_iou %.4f", self.stage + 1, trainer.current_epoch, trainer.callback_metrics["g_iou"])


class _StateWithinEpoch(Callback):
    """A state every few minutes, so that a run that is killed loses no more, however long its epochs are.

    After an epoch's last step it is left to the callback that saves after the validation: a run that went on from there
    would leave the validation out.
    """

    def __init__(self, path: Path, epoch_steps: int) -> None:
        self.path, self.epoch_steps = path, epoch_steps
        self.saved_s = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.epoch_steps == 0:
            return
        due = time.monotonic() - self.saved_s >= STATE_EVERY_S
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)  # saving waits for all ranks, so all must do it
        if due:
            trainer.save_checkpoint(self.path)
            self.saved_s = time.monotonic()


class TrainingStoppedError(RoadFuseError):
    """A training that was interrupted; run again, it goes on."""

    exit_code = 130


class DivergedError(RoadFuseError, ArithmeticError):
    """A training whose loss is no number any more."""

    exit_code = 5


def _save(recipe: Recipe, network: Network, out: Path) -> None:
    info = CheckpointInfo(
        network=network.config, layers=[layer.model_dump() for layer in recipe.view().layers],
        resolution_m=_resolution(recipe), window_px=recipe.window_px, recipe=recipe.model_dump(mode="json"),
        taught=taught_cities(recipe),
    )  # fmt: skip
    part = out / "checkpoint.part"
    save_checkpoint(part, network.eval(), info)
    part.rename(out / "checkpoint.safetensors")
    write_whole(out / "checkpoint.json", info.model_dump_json(indent=1) + "\n")
    for folder in out.glob("stage-*"):
        shutil.rmtree(folder)


def _resolution(recipe: Recipe) -> float:
    """Metres of a pixel, the same for all cities.

    Raises:
        ConfigError: They differ.
    """
    found = {load_city(p).grid.resolution_m for p in city_files(recipe, recipe.cities, "cities")}
    if len(found) > 1:
        raise ConfigError("cities", sorted(found), "are metres of a pixel that differ", "give all cities one grid.resolution_m")
    return found.pop()
