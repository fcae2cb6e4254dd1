"""The model: Mistral and Mixtral on a flat token axis, free of files, processes and parallelism."""

from tokenmill.trainer.model.config import ModelConfig, MoEConfig
from tokenmill.trainer.model.transformer import ModelOutput, Transformer

__all__ = ["MoEConfig", "ModelConfig", "ModelOutput", "Transformer"]
