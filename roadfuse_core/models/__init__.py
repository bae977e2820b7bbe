"""Networks in PyTorch; no thresholds and no normalisation here, and no files but checkpoints."""

from roadfuse_core.models._checkpoint import CheckpointInfo, load_checkpoint, read_checkpoint_info, save_checkpoint
from roadfuse_core.models._config import PRESETS, NetworkConfig, preset
from roadfuse_core.models._dlinknet import DLinkNet34, build_network

__all__ = [
    "PRESETS",
    "CheckpointInfo",
    "DLinkNet34",
    "NetworkConfig",
    "build_network",
    "load_checkpoint",
    "preset",
    "read_checkpoint_info",
    "save_checkpoint",
]
