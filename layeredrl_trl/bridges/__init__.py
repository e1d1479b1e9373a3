"""Predictors and data on their way from and to other libraries and runtimes."""

from layeredrl_trl.bridges.layeredrl import from_layeredrl
from layeredrl_trl.bridges.onnx import export_onnx
from layeredrl_trl.bridges.tianshou import from_tianshou
from layeredrl_trl.bridges.world_model import to_world_model

__all__ = ["export_onnx", "from_layeredrl", "from_tianshou", "to_world_model"]
