"""An adapter added into the weights of a checkpoint, one weight at a time."""

from svdbank.fusion.job import fuse
from svdbank.fusion.report import FusedDtype, FusedWeight, FuseReport

__all__ = ["FuseReport", "FusedDtype", "FusedWeight", "fuse"]
