"""What keeps the memory of a GPU small: parts of the training state that live on the host."""

from dualpipe_ext.memory.ema import ParameterEMA

__all__ = ["ParameterEMA"]
