"""Volumes on disk and in memory. Nothing here imports torch; `slices` (training) does."""

from .axes import canonical, from_canonical
from .conventions import MODALITIES, Case, canonical_modality, case_from_files
from .labels import LABELS, detect_label_convention, from_classes, to_classes
from .nifti import load_labels, load_volume
from .nifti_writer import save_image, save_volume
from .survey import find_cases
from .volume import (
    Volume,
    VolumeError,
    from_slices,
    has_hounsfield_values,
    lacks_hounsfield_values,
    normalize,
    to_slices,
    window_origins,
)

__all__ = [
    "LABELS",
    "MODALITIES",
    "Case",
    "Volume",
    "VolumeError",
    "canonical",
    "canonical_modality",
    "case_from_files",
    "detect_label_convention",
    "find_cases",
    "from_canonical",
    "from_classes",
    "from_slices",
    "has_hounsfield_values",
    "lacks_hounsfield_values",
    "load_labels",
    "load_volume",
    "normalize",
    "save_image",
    "save_volume",
    "to_classes",
    "to_slices",
    "window_origins",
]
