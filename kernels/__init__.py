"""The custom operations of Med-DANet V2, each with a plain-PyTorch `<name>_reference` beside it."""

from .backend import use_backend
from .conv_int import ConvOutput, quant_conv2d, quant_conv2d_reference
from .conv_pack import PackedConv, join_codes, norm_affine, pack_conv, split_codes
from .conv_train import fake_quant_conv2d, fake_quant_conv2d_reference
from .crop_paste import (
    affine_paste,
    affine_paste_reference,
    bilinear_crop,
    bilinear_crop_reference,
)
from .encode import encode, encode_reference
from .head import label_head, label_head_reference
from .heat_head import PackedHeatHead, heat_head, heat_head_reference, pack_heat_head
from .pooled_head import PackedPooledHead, pack_pooled_head, pooled_head, pooled_head_reference
from .quantize import fake_quantize, fake_quantize_reference
from .route import route_slices, route_slices_reference
from .selector import select_bits, select_bits_reference
from .shuffle_pack import PackedStage, PackedUnit, pack_stage, pack_unit
from .shuffle_stage import shuffle_stage, shuffle_stage_reference
from .shuffle_stem import PackedStem, pack_stem, shuffle_stem, shuffle_stem_reference
from .view import view_slices, view_slices_reference

__all__ = [
    "ConvOutput",
    "PackedConv",
    "PackedHeatHead",
    "PackedPooledHead",
    "PackedStage",
    "PackedStem",
    "PackedUnit",
    "affine_paste",
    "affine_paste_reference",
    "bilinear_crop",
    "bilinear_crop_reference",
    "encode",
    "encode_reference",
    "fake_quant_conv2d",
    "fake_quant_conv2d_reference",
    "fake_quantize",
    "fake_quantize_reference",
    "heat_head",
    "heat_head_reference",
    "join_codes",
    "label_head",
    "label_head_reference",
    "norm_affine",
    "pack_conv",
    "pack_heat_head",
    "pack_pooled_head",
    "pack_stage",
    "pack_stem",
    "pack_unit",
    "pooled_head",
    "pooled_head_reference",
    "quant_conv2d",
    "quant_conv2d_reference",
    "route_slices",
    "route_slices_reference",
    "select_bits",
    "select_bits_reference",
    "shuffle_stage",
    "shuffle_stage_reference",
    "shuffle_stem",
    "shuffle_stem_reference",
    "split_codes",
    "use_backend",
    "view_slices",
    "view_slices_reference",
]
