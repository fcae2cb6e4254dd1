"""What a step minimises: one function a way of training, all with the same signature."""

from tokenmill.trainer.objectives.dpo import Dpo
from tokenmill.trainer.objectives.pretrain import Objective, StepLoss, pretrain
from tokenmill.trainer.objectives.sft import Sft

__all__ = ["Dpo", "Objective", "Sft", "StepLoss", "pretrain"]
