"""Networks in PyTorch; no thresholds and no normalisation here, and no files but checkpoints."""

from roadfuse_core.models._base import Network, Prediction
from roadfuse_core.models._checkpoint import CheckpointInfo, load_checkpoint, read_checkpoint_info, save_checkpoint, target_of
from roadfuse_core.models._config import PRESETS, NetworkConfig, Preset, preset
from roadfuse_core.models._describe import Description, describe
from roadfuse_core.models._folding import fold_norms
from roadfuse_core.models._losses import LOSSES, deep_loss, road_distance
from roadfuse_core.models._network import build_network
from roadfuse_core.models._pretrained import load_resnet_weights

__all__ = [
    "LOSSES",
    "PRESETS",
    "CheckpointInfo",
    "Description",
    "Network",
    "NetworkConfig",
    "Prediction",
    "Preset",
    "build_network",
    "deep_loss",
    "describe",
    "fold_norms",
    "load_checkpoint",
    "load_resnet_weights",
    "preset",
    "read_checkpoint_info",
    "road_distance",
    "save_checkpoint",
    "target_of",
]
