"""Inference: predictors, windows on Dask, the published map."""

from roadfuse_core.inference._predictor import (
    KdeModel,
    Predictor,
    PredictorRef,
    load_predictor,
    normalise_image,
    resolve_weights,
)
from roadfuse_core.inference._run import Evidence, MapReader, MapRecord, infer, maps_path, read_evidence

__all__ = [
    "Evidence",
    "KdeModel",
    "MapReader",
    "MapRecord",
    "Predictor",
    "PredictorRef",
    "infer",
    "load_predictor",
    "maps_path",
    "normalise_image",
    "read_evidence",
    "resolve_weights",
]
