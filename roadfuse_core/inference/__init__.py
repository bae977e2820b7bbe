"""Inference: predictors, plans, windows on Dask, the published map."""

from roadfuse_core.inference._calibrate import Calibration, calibrate, software_versions
from roadfuse_core.inference._evidence import Evidence, read_evidence, readers_of
from roadfuse_core.inference._export import export_array
from roadfuse_core.inference._learnt import split_of_map
from roadfuse_core.inference._map import MapReader, MapRecord, changed_map_tiles, map_key, maps_path, standing_record
from roadfuse_core.inference._plan import RefreshPlan, plan_refresh
from roadfuse_core.inference._predictor import (
    KdeModel,
    Predictor,
    PredictorRef,
    choose_weights,
    load_predictor,
    normalise_image,
    read_facts,
    require_target,
    resolve_weights,
)
from roadfuse_core.inference._publish import published, release, rollback, tagged_record, waiting
from roadfuse_core.inference._run import IncompleteError, infer
from roadfuse_core.inference._scratch import Failure

__all__ = [
    "Calibration",
    "Evidence",
    "Failure",
    "IncompleteError",
    "KdeModel",
    "MapReader",
    "MapRecord",
    "Predictor",
    "PredictorRef",
    "RefreshPlan",
    "calibrate",
    "changed_map_tiles",
    "choose_weights",
    "export_array",
    "infer",
    "load_predictor",
    "map_key",
    "maps_path",
    "normalise_image",
    "plan_refresh",
    "published",
    "read_evidence",
    "read_facts",
    "readers_of",
    "release",
    "require_target",
    "resolve_weights",
    "rollback",
    "software_versions",
    "split_of_map",
    "standing_record",
    "tagged_record",
    "waiting",
]
