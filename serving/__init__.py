"""Serve ReBased models with vLLM: the plug-in that vLLM finds by itself once this package is installed."""

__all__ = ["register"]


def register() -> None:
    """Make vLLM know ReBased's configuration and model.

    vLLM calls this function in each of its processes, through the entry point group `vllm.general_plugins`. Calling it
    again changes nothing.
    """
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import modeling_rebased  # noqa: F401  registers ReBasedConfig with AutoConfig

    from .vllm_checks import ReBasedServingChecks

    architecture = "ReBasedForCausalLM"
    # By name, so that no process imports the model before it needs it.
    ModelRegistry.register_model(architecture, "modeling_rebased.serving.vllm_model:ReBasedForCausalLM")
    MODELS_CONFIG_MAP[architecture] = ReBasedServingChecks
    # The operations that read requests' states stay outside the compiled pieces of the model, as attention does.
    for name in ("vllm::rebased_linear_attention", "vllm::rebased_short_conv"):
        if name not in CompilationConfig._attention_ops:
            CompilationConfig._attention_ops.append(name)
