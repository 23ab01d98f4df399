# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""ReBased for Hugging Face. Importing this package registers its classes with transformers' Auto classes."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .attention_rebased import rebased_attention
from .configuration_rebased import ReBasedConfig
from .context_parallel_rebased import rebased_attention_shard, shard_sequence
from .modeling_rebased import (
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
    ReBasedPreTrainedModel,
)


# A wheel holds conversion, training, eval and configuration inside this package. In a checkout they lie beside it;
# this line gives them the same names there: modeling_rebased.training and so on.
if not (Path(__file__).parent / "training").is_dir():
    __path__.append(str(Path(__file__).resolve().parent.parent))

ReBasedConfig.register_for_auto_class()
AutoConfig.register(ReBasedConfig.model_type, ReBasedConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, ReBasedModel),
    (AutoModelForCausalLM, ReBasedForCausalLM),
    (AutoModelForSequenceClassification, ReBasedForSequenceClassification),
    (AutoModelForTokenClassification, ReBasedForTokenClassification),
    (AutoModelForQuestionAnswering, ReBasedForQuestionAnswering),
):
    _auto_class.register(ReBasedConfig, _model_class, exist_ok=True)

__version__ = "0.1.0"

__all__ = [
    "ReBasedConfig",
    "ReBasedForCausalLM",
    "ReBasedForQuestionAnswering",
    "ReBasedForSequenceClassification",
    "ReBasedForTokenClassification",
    "ReBasedModel",
    "ReBasedPreTrainedModel",
    "rebased_attention",
    "rebased_attention_shard",
    "shard_sequence",
]
