# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""ReBased for Hugging Face. Importing this package registers its classes with transformers' Auto classes."""

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
from .modeling_rebased import (
    ReBasedForCausalLM,
    ReBasedForQuestionAnswering,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
    ReBasedModel,
    ReBasedPreTrainedModel,
)


# What save_pretrained writes into auto_map, and copies the code for: the heads by their Auto classes.
ReBasedConfig.register_for_auto_class()
AutoConfig.register(ReBasedConfig.model_type, ReBasedConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, ReBasedModel),
    (AutoModelForCausalLM, ReBasedForCausalLM),
    (AutoModelForSequenceClassification, ReBasedForSequenceClassification),
    (AutoModelForTokenClassification, ReBasedForTokenClassification),
    (AutoModelForQuestionAnswering, ReBasedForQuestionAnswering),
):
    _model_class.register_for_auto_class(_auto_class.__name__)
    _auto_class.register(ReBasedConfig, _model_class, exist_ok=True)

__all__ = [
    "ReBasedConfig",
    "ReBasedForCausalLM",
    "ReBasedForQuestionAnswering",
    "ReBasedForSequenceClassification",
    "ReBasedForTokenClassification",
    "ReBasedModel",
    "ReBasedPreTrainedModel",
    "rebased_attention",
]
