"""GPT-2 with linear attention, decoding on a recurrent state."""

from torch import Tensor, nn
from torch.nn import init
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .attention_lin_jax import (
    AttentionOptions,
    Mixer,
    build_attention,
    build_convolution,
    build_factor,
    build_window,
    mix_tokens,
)
from .cache_lin_jax import LinJaxCache  # noqa: F401 - from a folder, transformers 4 copies what is named here, no more
from .causal_lm_lin_jax import LinJaxForCausalLM, LinJaxModel
from .configuration_lin_jax import LinJaxGPT2Config
from .drafts_lin_jax import NGrams  # noqa: F401
from .int8_lin_jax import Int8Linear  # noqa: F401
from .linear_attention_lin_jax import LinearAttention  # noqa: F401
from .other_attention_lin_jax import FullAttention  # noqa: F401
from .pretrained_lin_jax import LinJaxPreTrainedModel  # noqa: F401
from .recurrence_lin_jax import Rows, State
from .speculation_lin_jax import decode  # noqa: F401
from .versions_lin_jax import require_version  # noqa: F401
from .windowed_attention_lin_jax import WindowedMemory  # noqa: F401


class LinJaxGPT2Attention(nn.Module):
    """Projections around a token mixer."""

    def __init__(self, config: LinJaxGPT2Config, layer: int) -> None:
        super().__init__()
        self.heads = config.n_head
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.options = AttentionOptions.of(config.attention, layer)
        heads, head_dim = {"heads": self.heads, "kv_heads": self.heads}, config.n_embd // self.heads
        self.mixer = build_attention(self.options, head_dim, layer, **heads)
        self.windowed = build_window(self.options, head_dim, **heads)
        self.alpha = build_factor(self.options)
        self.dconv_ada = build_convolution(self.options, config.n_head)

    def initial_values(self) -> dict[str, Tensor]:
        """Where the learnt factor starts."""
        return {} if self.alpha is None else {"alpha": build_factor(self.options).data}

    def forward(self, x: Tensor, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        queries, keys, values = self.c_attn(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        mixer = Mixer(self.options, self.mixer, self.alpha, self.dconv_ada, self.windowed)
        mixed, state = mix_tokens(mixer, queries, keys, values, rows, state)
        return self.c_proj(mixed.flatten(2)), state


class LinJaxGPT2MLP(nn.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, config: LinJaxGPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.activation = ACT2FN[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every token."""
        return self.c_proj(self.activation(self.c_fc(x)))


class LinJaxGPT2Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LinJaxGPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = LinJaxGPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = LinJaxGPT2MLP(config)

    def forward(self, x: Tensor, context: None, rows: Rows, state: State | None) -> tuple[Tensor, State | None]:
        """Outputs `[B, T, E]`, and the state after them if one was given."""
        mixed, state = self.attn(self.ln_1(x), rows, state)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), state


class LinJaxGPT2Model(LinJaxModel):
    """Embeddings of tokens and positions, layers and final norm."""

    config_class = LinJaxGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["LinJaxGPT2Layer"]
    _input_embed_layer = "wte"

    def __init__(self, config: LinJaxGPT2Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(LinJaxGPT2Layer(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)

    def layer_stack(self) -> nn.ModuleList:
        """The layers."""
        return self.h

    def enter(self, x: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """Embeddings of tokens and positions, added."""
        return x + self.wpe(positions), None

    def leave(self, x: Tensor) -> Tensor:
        """The final norm."""
        return self.ln_f(x)


class LinJaxGPT2LMHeadModel(LinJaxForCausalLM):
    """A GPT-2 with linear attention and a language model's head."""

    config_class = LinJaxGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["LinJaxGPT2Layer"]
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: LinJaxGPT2Config) -> None:
        super().__init__(config)
        self.transformer = LinJaxGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
