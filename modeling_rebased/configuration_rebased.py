# Copyright The ReBased for Hugging Face authors. Licensed under the Apache License, Version 2.0.
"""Hold the configuration of a ReBased model."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Optional, TypeVar

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.utils import logging


logger = logging.get_logger(__name__)

KERNEL_COEFFICIENTS = {"rebased": (0.0, 0.0, 1.0), "based": (1.0, 1.0, 0.5)}
LAYER_TYPES = ("conv", "linear_attention", "sliding_attention", "full_attention", "hybrid_sliding")
LINEAR_LAYER_TYPES = ("linear_attention", "hybrid_sliding")
SOFTMAX_LAYER_TYPES = ("sliding_attention", "full_attention", "hybrid_sliding")
RECURRENT_LAYER_TYPES = ("conv", "linear_attention", "hybrid_sliding")  # these carry a state from token to token
# Layers that need no mask of the cached tokens: their states have left padding out.
PURELY_RECURRENT = {"conv", "linear_attention"}
MAX_FEATURE_DIM = 128
MAX_HEAD_DIM = 256
# Entries of a config.json that other parts of the library read, as they do those that begin with an underscore.
NOT_OF_THE_MODEL = (
    "auto_map",
    "custom_pipelines",
    "distributed_config",
    "model_type",
    "quantization_config",
)

# The type of a field that may be left out, for a value that follows from other fields. In a configuration that is made
# it is None only where no layer reads it, so a type checker takes the value for granted.
UNSET: Any = None
if TYPE_CHECKING:
    _T = TypeVar("_T")
    Filled = Annotated[_T, "None as an argument"]
else:
    Filled = Optional


def feature_blocks(feature_dim: int, coefficients: tuple[float, float, float]) -> list[int]:
    """Return the numbers of quadratic, linear and constant features of a key, without those the kernel does not have.

    Args:
        feature_dim (`int`): F, the size of one head's query or key.
        coefficients (`tuple[float, float, float]`): (c0, c1, c2) of the kernel; only whether each is zero matters.

    Returns:
        `list[int]`: F(F+1)/2 if c2 != 0, F if c1 != 0, 1 if c0 != 0, in this order.
    """
    sizes = (feature_dim * (feature_dim + 1) // 2, feature_dim, 1)
    return [size for size, coefficient in zip(sizes, reversed(coefficients)) if coefficient != 0]


def n_features(feature_dim: int, coefficients: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> int:
    """Return the number of features of a key, which is the number of rows of a recurrent state.

    Args:
        feature_dim (`int`): F, the size of one head's query or key.
        coefficients (`tuple[float, float, float]`, *optional*, defaults to `(0, 0, 1)`): (c0, c1, c2) of the kernel.
    """
    return sum(feature_blocks(feature_dim, coefficients))


def _check_code(folder: Path) -> None:
    """Check that the code files of a checkpoint's folder hold all that they import from each other.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for path in sorted(folder.glob("*_rebased.py")):
        if not path.is_file():
            continue  # a dangling link
        for name in re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if not (folder / f"{name}.py").is_file():
                raise FileNotFoundError(
                    f"The folder {str(folder)!r} lacks the code file {name}.py, which {path.name} imports. Copy or "
                    "download the whole folder again, with all of its *.py files (`cp -rL` also copies what links "
                    "point to). Or install the package and `import modeling_rebased`, which needs no code in the "
                    "folder."
                )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@strict
class ReBasedConfig(PreTrainedConfig):
    r"""
    Hold the configuration of a ReBased model (Aksenov et al., "Linear Transformers with Learnable Kernel Functions are
    Better In-Context Models", ACL 2024). The paper's models, Based, hybrids with softmax layers and the softmax
    baseline are all configurations of one model class.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000):
            Number of tokens.
        hidden_size (`int`, *optional*, defaults to 768):
            Size of the residual stream.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of layers.
        layer_types (`list[str]`, *optional*):
            The sequence mixer of each layer: "conv" (a short convolution, see `conv_type`), "linear_attention"
            (ReBased or Based), "sliding_attention" (softmax over a window), "full_attention" (softmax), or
            "hybrid_sliding" (ReBased and a softmax window in one layer). Defaults to alternating "conv" and
            "linear_attention", as in the paper.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Number of key and value heads. It must divide `num_attention_heads`.
        feature_dim (`int`, *optional*, defaults to 16):
            Size F of a query or key of the linear layers per head. Their state has F(F+1)/2 rows for ReBased.
        head_dim (`int`, *optional*, defaults to `hidden_size // num_attention_heads`):
            Size D of a value per head, and of the queries and keys of softmax layers. `head_dim *
            num_attention_heads` need not be `hidden_size`.
        kernel (`str`, *optional*, defaults to `"rebased"`):
            "rebased" (w = s^2) or "based" (w = 1 + s + s^2/2).
        kernel_coefficients (`list[float]`, *optional*):
            (c0, c1, c2) of w = c0 + c1 s + c2 s^2 instead of those of `kernel`. The polynomial must never be
            negative: c2 >= 0 and c1^2 <= 4 c0 c2.
        normalize (`bool`, *optional*, defaults to `True` for "rebased", `False` for "based"):
            Whether to bring queries and keys to zero mean and unit variance.
        use_gamma (`bool`, *optional*, defaults to `True` for "rebased", `False` for "based"):
            Whether to multiply queries and keys by a learnt gamma.
        use_beta (`bool`, *optional*, defaults to `True` for "rebased", `False` for "based"):
            Whether to add a learnt beta to queries and keys.
        qk_norm_scope (`str`, *optional*, defaults to `"all_heads"`):
            What one normalisation spans: "all_heads" (a vector of heads * feature_dim, as in the authors' code) or
            "head" (one head, with parameters that all heads share, as in flash-linear-attention).
        qk_norm_shared (`bool`, *optional*, defaults to `False`):
            Whether queries and keys share gamma and beta.
        qk_norm_eps (`float`, *optional*, defaults to 1e-5):
            Number that the normalisation adds to the variance.
        attention_eps (`float`, *optional*, defaults to 1e-12):
            Number that is added to the normaliser of the linear attention. It is 1e-12 in the authors' code and 1e-5
            in flash-linear-attention.
        decay (`str`, *optional*):
            Whether linear layers count older tokens less: `None`, not at all, or "gate". With a gate each token
            multiplies the state of a key-value head by sigmoid(W x + b) before it is added. The kernel must then be
            ReBased's.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value projections have biases.
        softmax_qk_norm (`bool`, *optional*, defaults to `False`):
            Whether softmax layers apply RMSNorm to each head's queries and keys before they rotate them, as in Qwen3.
            All heads of a layer share the gains. The epsilon is `norm_eps`.
        conv_type (`str`, *optional*, defaults to `"residual"`):
            What "conv" layers do: "residual", the paper's BaseConv, conv(u) * (W u + b) + u, or "gated", the short
            convolution of Based's released models, W_o (silu(conv(u_1)) * u_2) with u_1, u_2 = W_i u.
        conv_kernel_size (`int`, *optional*, defaults to 3):
            Number of tokens that the convolution of "conv" layers sees, its own included.
        conv_intermediate_size (`int`, *optional*):
            Width of u_1 and u_2. The default for "gated" is 2 * hidden_size; "residual" has none.
        conv_bias (`bool`, *optional*, defaults to `True`):
            Whether the convolution itself has a bias. The linear maps around it always have one.
        mlp_type (`str`, *optional*, defaults to `"gelu"`):
            "gelu" (two linear maps with `hidden_act` between), "swiglu" (gated) or "none": the identity, so that the
            second half of a layer is x + norm(x), as in the authors' MQAR runs.
        intermediate_size (`int`, *optional*):
            Width of the MLP. The default is 4 * hidden_size for "gelu". For "swiglu" it is 8/3 * hidden_size, rounded
            up to a multiple of 64.
        hidden_act (`str`, *optional*, defaults to `"gelu"` or, for "swiglu", `"silu"`):
            Activation of the MLP.
        mlp_bias (`bool`, *optional*, defaults to `True` for "gelu", `False` for "swiglu"):
            Whether the MLP's linear maps have biases.
        norm_type (`str`, *optional*, defaults to `"layernorm"`):
            Kind of the norms of the residual stream: "layernorm" or "rmsnorm".
        norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the norms of the residual stream.
        max_position_embeddings (`int`, *optional*, defaults to 2048):
            Longest sequence that learned positions can number. For other models, the length of training.
        position_embedding_type (`str`, *optional*, defaults to `"none"`):
            "none", "learned" (added to the word embedding) or "rope" (rotary, in softmax layers).
        rope_parameters (`dict`, *optional*):
            Rotary parameters, as transformers has them. `rope_theta` is 10000 by default.
        rope_linear_attention (`bool`, *optional*, defaults to `False`):
            Whether "rope" also rotates the queries and keys of the linear layers, after their normalisation.
        sliding_window (`int`, *optional*, defaults to 64):
            Number of tokens that "sliding_attention" and the window of "hybrid_sliding" see, their own included. It
            is at least 2.
        embedding_dropout (`float`, *optional*, defaults to 0.0):
            Dropout after the embedding.
        residual_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the output of each mixer and each MLP.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights. For `mlp.down_proj` and the `out_proj` of a "gated" convolution
            it is divided by sqrt(2 * num_hidden_layers), as in the authors' code.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the output layer is the word embedding.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether to return the cache for generation.
        kernel_backend (`str`, *optional*, defaults to `"auto"`):
            Implementation of the linear attention: "auto", "eager" (PyTorch) or "triton" (kernels for GPUs). See
            `rebased_attention`.
        pad_token_id (`int`, *optional*):
            Token of padding, below `vocab_size`. Its embedding starts at zero.
        bos_token_id (`int`, *optional*):
            Token that begins a text.
        eos_token_id (`int` or `list[int]`, *optional*):
            Token, or tokens, that end a text.

    ```python
    >>> from modeling_rebased import ReBasedConfig, ReBasedForCausalLM

    >>> configuration = ReBasedConfig(vocab_size=1000, hidden_size=96, num_hidden_layers=2)
    >>> model = ReBasedForCausalLM(configuration)
    >>> model.config.layer_types
    ['conv', 'linear_attention']

    ```
    """

    model_type = "rebased"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    base_model_pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    layer_types: Filled[list[str]] = UNSET
    num_attention_heads: int = 12
    num_key_value_heads: Filled[int] = UNSET
    feature_dim: int = 16
    head_dim: Filled[int] = UNSET
    kernel: Literal["rebased", "based"] = "rebased"
    kernel_coefficients: list[int | float] | tuple[int | float, ...] | None = None
    normalize: Filled[bool] = UNSET
    use_gamma: Filled[bool] = UNSET
    use_beta: Filled[bool] = UNSET
    qk_norm_scope: Literal["all_heads", "head"] = "all_heads"
    qk_norm_shared: bool = False
    qk_norm_eps: float = 1e-5
    attention_eps: float = 1e-12
    decay: Literal["gate"] | None = None
    attention_bias: bool = False
    softmax_qk_norm: bool = False
    conv_type: Literal["residual", "gated"] = "residual"
    conv_kernel_size: int = 3
    conv_intermediate_size: Filled[int] = UNSET
    conv_bias: bool = True
    mlp_type: Literal["none", "gelu", "swiglu"] = "gelu"
    intermediate_size: Filled[int] = UNSET
    hidden_act: Filled[str] = UNSET
    mlp_bias: Filled[bool] = UNSET
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    position_embedding_type: Literal["none", "learned", "rope"] = "none"
    rope_parameters: Filled[RopeParameters | dict] = UNSET
    rope_linear_attention: bool = False
    sliding_window: int | None = 64
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    kernel_backend: Literal["auto", "eager", "triton"] = "auto"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "ReBasedConfig":
        """Load the configuration as the library does.

        Code that comes with a checkpoint first checks its own folder: the library itself would stop at a missing file
        without a word about what to do.

        Raises:
            FileNotFoundError: the code in the folder is to be run, and one of its files is missing.
        """
        if cls.__module__.startswith("transformers_modules."):
            _check_code(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = ["linear_attention" if i % 2 else "conv" for i in range(self.num_hidden_layers)]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for flag in ("normalize", "use_gamma", "use_beta"):
            if getattr(self, flag) is None:
                setattr(self, flag, self.kernel == "rebased")
        if self.conv_type == "gated" and self.conv_intermediate_size is None:
            self.conv_intermediate_size = 2 * self.hidden_size
        if self.mlp_type != "none":
            swiglu = self.mlp_type == "swiglu"
            if self.intermediate_size is None:
                self.intermediate_size = -(-self.hidden_size * 8 // 192) * 64 if swiglu else 4 * self.hidden_size
            if self.hidden_act is None:
                self.hidden_act = "silu" if swiglu else "gelu"
            if self.mlp_bias is None:
                self.mlp_bias = not swiglu
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)
        # What the library takes for itself is no attribute now. The rest it sets as it is, misspelt fields too.
        unknown = sorted(
            name for name in kwargs if name in vars(self) and name not in NOT_OF_THE_MODEL and not name.startswith("_")
        )
        if unknown:
            logger.warning(
                f"{type(self).__name__} has no field {', '.join(map(repr, unknown))}; the model ignores it."
            )

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Leave `rope_parameters` alone where nothing is rotated. The library calls this to initialise them."""
        return super().convert_rope_params_to_dict(**kwargs) if self.position_embedding_type == "rope" else kwargs

    def validate_rope(self) -> None:
        """Check the rotary parameters of models with softmax layers, whose `head_dim` the library checks."""
        if self.position_embedding_type == "rope" and set(self.layer_types) & set(SOFTMAX_LAYER_TYPES):
            super().validate_rope()

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Return (c0, c1, c2) of the kernel."""
        c0, c1, c2 = self.kernel_coefficients or KERNEL_COEFFICIENTS[self.kernel]
        return float(c0), float(c1), float(c2)

    @property
    def n_features(self) -> int:
        """Return the number of rows of a linear layer's state per key-value head."""
        return n_features(self.feature_dim, self.coefficients)

    @property
    def is_recurrent(self) -> bool:
        """Return whether any layer carries a state from token to token."""
        return any(layer_type in RECURRENT_LAYER_TYPES for layer_type in self.layer_types)

    @property
    def layer_types_in_use(self) -> list[str]:
        """Return the types of the first `num_hidden_layers` layers.

        These are fewer than all while `generate` drafts with the first layers (`assistant_early_exit`).
        """
        return self.layer_types[: self.num_hidden_layers]

    @property
    def is_purely_recurrent(self) -> bool:
        """Return whether no layer has softmax attention, so that states are all that stays of earlier tokens."""
        return PURELY_RECURRENT.issuperset(self.layer_types)

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Return the tensor-parallel plan of the modules that this model has.

        Attention is split by heads, unless a layer needs all heads in one place (for a norm across them).
        """
        types = set(self.layer_types)
        whole = self.qk_norm_scope == "all_heads" and (self.normalize or self.use_gamma or self.use_beta)
        whole = whole or self.softmax_qk_norm  # its gains are all heads', so each process must see all gradients
        column, row = ("colwise_gather_output", "rowwise_split_input") if whole else ("colwise", "rowwise")
        if "hybrid_sliding" in types:  # its gate holds a number for every head
            column, row = "colwise_gather_output", "rowwise_split_input"
        plan: dict[str, str] = {}
        if types != {"conv"}:
            plan |= dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), column)
            plan["self_attn.o_proj"] = row
        if self.decay is not None and types & set(LINEAR_LAYER_TYPES) and column == "colwise":
            # With the other plan every process has the numbers of all heads, and needs no share.
            plan["self_attn.decay_proj"] = column
        if "hybrid_sliding" in types:
            plan |= dict.fromkeys(("self_attn.window_q_proj", "self_attn.window_k_proj"), column)
        if "conv" in types and self.conv_type == "residual":
            plan["conv.proj"] = "colwise_gather_output"
        elif "conv" in types:
            plan |= {"conv.in_proj": "colwise_gather_output", "conv.out_proj": "rowwise_split_input"}
        if self.mlp_type == "swiglu":
            plan["mlp.gate_proj"] = "colwise"
        if self.mlp_type != "none":
            plan |= {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        return {f"layers.*.{module}": style for module, style in plan.items()}

    def validate_layer_type(self) -> None:
        """Check `layer_types`. The library's own check, in 5.17, renames "conv" to "linear_attention"."""
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"`layer_types` must be of {LAYER_TYPES}, but holds {unknown}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must have one entry for each of `num_hidden_layers`={self.num_hidden_layers}, but has "
                f"{len(self.layer_types)}."
            )

    def validate_architecture(self) -> None:
        """Refuse a configuration that cannot work, and name the fields that contradict each other."""
        self._check_sizes()
        self._check_kernel()
        self._check_convolution()
        self._check_mlp()
        self._check_windows()
        self._check_rotary_embedding()

    def _check_sizes(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "conv_kernel_size",
            "max_position_embeddings",
        ):
            _require(getattr(self, field) >= 1, f"`{field}` must be at least 1, but got {getattr(self, field)}.")
        _require(
            self.pad_token_id is None or self.pad_token_id < self.vocab_size,
            f"`pad_token_id` ({self.pad_token_id}) must be less than `vocab_size` ({self.vocab_size}).",
        )
        for field in ("qk_norm_eps", "attention_eps", "norm_eps"):
            _require(getattr(self, field) > 0, f"`{field}` must be positive, but got {getattr(self, field)}.")
        for field in ("embedding_dropout", "residual_dropout"):
            value = getattr(self, field)
            _require(0 <= value < 1, f"`{field}` must be at least 0 and less than 1, but got {value}.")
        _require(
            self.initializer_range >= 0, f"`initializer_range` must not be negative, but got {self.initializer_range}."
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
            f"({self.num_key_value_heads}).",
        )
        _require(
            1 <= self.head_dim <= MAX_HEAD_DIM,
            f"`head_dim` must be 1 to {MAX_HEAD_DIM}, but it is {self.head_dim} (`hidden_size`={self.hidden_size}, "
            f"`num_attention_heads`={self.num_attention_heads}).",
        )
        _require(
            1 <= self.feature_dim <= MAX_FEATURE_DIM,
            f"`feature_dim` must be 1 to {MAX_FEATURE_DIM}, but got {self.feature_dim}.",
        )

    def _check_kernel(self) -> None:
        if self.kernel_coefficients is not None:
            c = tuple(self.kernel_coefficients)
            _require(
                len(c) == 3 and any(c) and c[2] >= 0 and c[0] >= 0 and c[1] ** 2 <= 4 * c[0] * c[2],
                "`kernel_coefficients` must be (c0, c1, c2) of a polynomial that is never negative and not zero: "
                f"c0 >= 0, c2 >= 0 and c1^2 <= 4 c0 c2, but got {c}.",
            )
        _require(
            self.decay is None or not any(self.coefficients[:2]),
            f"`decay={self.decay!r}` needs a kernel of squares alone, such as `kernel='rebased'`, but the "
            f"coefficients are {self.coefficients}.",
        )
        _require(
            not (
                self.qk_norm_shared
                and self.qk_norm_scope == "all_heads"
                and (self.use_gamma or self.use_beta)
                and self.num_key_value_heads != self.num_attention_heads
            ),
            "`qk_norm_shared=True` with `qk_norm_scope='all_heads'` needs as many `num_key_value_heads` "
            f"({self.num_key_value_heads}) as `num_attention_heads` ({self.num_attention_heads}): queries and keys "
            "have different sizes.",
        )

    def _check_convolution(self) -> None:
        width = self.conv_intermediate_size
        _require(
            width is None or self.conv_type == "gated",
            f"`conv_intermediate_size={width}` needs `conv_type='gated'`, but that is {self.conv_type!r}.",
        )
        _require(width is None or width >= 1, f"`conv_intermediate_size` must be at least 1, but got {width}.")

    def _check_mlp(self) -> None:
        if self.mlp_type != "none":
            _require(
                self.intermediate_size >= 1,
                f"`intermediate_size` must be at least 1 for `mlp_type={self.mlp_type!r}`, but got "
                f"{self.intermediate_size}.",
            )
            _require(
                self.hidden_act in ACT2FN,
                f"`hidden_act` must be an activation of transformers for `mlp_type={self.mlp_type!r}`, one of "
                f"{sorted(ACT2FN)}, but got {self.hidden_act!r}.",
            )

    def _check_windows(self) -> None:
        softmax = sorted(set(self.layer_types) & set(SOFTMAX_LAYER_TYPES))
        windowed = [t for t in softmax if t != "full_attention"]
        _require(
            # The library's caches keep every token for a window of one, and their masks then do not fit.
            not windowed or (self.sliding_window is not None and self.sliding_window >= 2),
            f"`sliding_window` must be at least 2 where `layer_types` has {windowed}, but got {self.sliding_window}.",
        )

    def _check_rotary_embedding(self) -> None:
        rope = self.position_embedding_type == "rope"
        rope_type = self.rope_parameters.get("rope_type") if rope else None
        _require(
            not (rope and set(self.layer_types) & set(SOFTMAX_LAYER_TYPES)) or self.head_dim % 2 == 0,
            f"`position_embedding_type='rope'` needs an even `head_dim` in softmax layers, but it is {self.head_dim}.",
        )
        _require(
            not rope
            or (
                {"rope_type", "rope_theta"} <= set(self.rope_parameters)
                and self.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
            ),
            "`rope_parameters` must be one flat set of parameters without a `partial_rotary_factor`, but they are "
            f"{self.rope_parameters}.",
        )
        _require(
            not rope or rope_type == "default" or rope_type in ROPE_INIT_FUNCTIONS,
            "`rope_parameters` must have a `rope_type` that transformers knows, one of "
            f"{sorted({'default', *ROPE_INIT_FUNCTIONS})}, but it is {rope_type!r}.",
        )
        _require(
            rope or not self.rope_linear_attention,
            "`rope_linear_attention=True` needs `position_embedding_type='rope'`, but that is "
            f"{self.position_embedding_type!r}.",
        )
        _require(
            not self.rope_linear_attention or self.feature_dim % 2 == 0,
            f"`rope_linear_attention=True` needs an even `feature_dim`, but it is {self.feature_dim}.",
        )
        _require(
            not self.rope_linear_attention or rope_type == "default" or self.feature_dim == self.head_dim,
            f"`rope_linear_attention=True` with `rope_parameters` of type {rope_type!r} needs `feature_dim` "
            f"({self.feature_dim}) to be `head_dim` ({self.head_dim}); only the 'default' type serves two sizes.",
        )


__all__ = ["ReBasedConfig"]
