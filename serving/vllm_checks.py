"""Refuse by name what vLLM cannot serve, before anything is loaded."""

import dataclasses

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from modeling_rebased.configuration_rebased import ReBasedConfig


CONV_KERNEL_SIZES = (2, 3, 4)  # what vLLM's convolution kernels can do
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those of which vLLM and transformers have one idea


class ReBasedServingChecks(VerifyAndUpdateConfig):
    """Check the configuration of a model of this package where vLLM asks for it."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Refuse a model that cannot be served.

        Raises:
            `ValueError`: names the configuration's field, what it is and what it may be.
        """
        config: ReBasedConfig = model_config.hf_config
        types = set(config.layer_types)
        if not config.is_recurrent:
            # One class serves all mixtures of layers. Without states vLLM shall treat it as a softmax model.
            info = model_config._model_info
            model_config._model_info = dataclasses.replace(info, is_hybrid=False, has_inner_state=False)
        if config.decay is not None:
            raise ValueError(f"`decay` must be None to be served by vLLM, but it is {config.decay!r}.")
        if "conv" in types and config.conv_kernel_size not in CONV_KERNEL_SIZES:
            raise ValueError(
                f"`conv_kernel_size` must be one of {CONV_KERNEL_SIZES} for vLLM's convolution kernels, but it is "
                f"{config.conv_kernel_size}."
            )
        if config.position_embedding_type == "rope" and config.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters` must have a `rope_type` of {ROPE_TYPES} to be served by vLLM, but it is "
                f"{config.rope_parameters['rope_type']!r}: vLLM's differs from transformers'."
            )
        if config.position_embedding_type == "learned" and model_config.max_model_len > config.max_position_embeddings:
            raise ValueError(
                "`max_model_len` must not exceed the learned positions, `max_position_embeddings`="
                f"{config.max_position_embeddings}, but it is {model_config.max_model_len}."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse ways of serving that a recurrent state does not allow.

        Raises:
            `ValueError`: names the option.
        """
        config: ReBasedConfig = vllm_config.model_config.hf_config
        parallel = vllm_config.parallel_config.tensor_parallel_size
        if config.is_recurrent and vllm_config.speculative_config is not None:
            raise ValueError(
                "`speculative_config` cannot be used with recurrent layers "
                f"({sorted(set(config.layer_types) - {'full_attention', 'sliding_attention'})}): a rejected token "
                "cannot be taken back from their states."
            )
        sizes = {"num_attention_heads": config.num_attention_heads}
        if set(config.layer_types) & {"linear_attention", "hybrid_sliding"}:
            sizes["num_key_value_heads"] = config.num_key_value_heads
        if "conv" in config.layer_types:
            gated = config.conv_type == "gated"
            field = "conv_intermediate_size" if gated else "hidden_size"
            sizes[field] = getattr(config, field)
        if config.mlp_type != "none":
            sizes["intermediate_size"] = config.intermediate_size
        for field, size in sizes.items():
            if size % parallel:
                raise ValueError(
                    f"`tensor_parallel_size` must divide `{field}` ({size}) of this model, but it is {parallel}."
                )
