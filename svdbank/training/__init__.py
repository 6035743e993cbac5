"""Continued pretraining of an adapter through ``transformers.Trainer``: the options, the recipe, checkpoints that can be trusted."""

from svdbank.training.options import TrainOptions, read_config
from svdbank.training.recipe import TrainingError, train
from svdbank.training.report import Change, TrainReport

__all__ = ["Change", "TrainOptions", "TrainReport", "TrainingError", "read_config", "train"]
