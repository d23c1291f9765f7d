"""The shape of a model, as a preset file states it. Pure data: importing this module imports neither torch nor
Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Ablations:
    """What a model leaves out of the method or does otherwise (docs/study.md). The defaults are the method.

    hsa: false: the same decoder without HSA layers and chunk encoder, plain causal attention where windows cover the
    context; a baseline. bypass: HSA's output feeds the MLP only; false: it enters the residual stream as well.
    hsa_rope: rotary positions, absolute, on HSA's queries and on the memory's keys. recency_decay: a learned scalar per
    HSA layer lowers the weights of chosen chunks, place by place from the newest (the authors' code; the choice itself
    stays as it is). selection_noise: scale of Gumbel noise on the scores that choose chunks, in training.
    """

    hsa: bool = True
    bypass: bool = True
    hsa_rope: bool = False
    recency_decay: bool = False
    selection_noise: float = 0.0

    def named(self) -> list[str]:
        """The options that differ from the method."""
        return [name for name, value in vars(self).items() if value != getattr(Ablations, name)]

    def experiments(self) -> list[str]:
        """Those of them that run with data parallelism only and are not exported; without the bypass is no such."""
        return [name for name in self.named() if name != "bypass"]


@dataclass
class ModelConfig:
    """Sizes of one HSA-UltraLong model (arXiv 2511.23319, section 2). All sizes are global, before any parallel split.

    The lower decoder has `lower_layers` sliding-window (SWA) layers. The upper decoder has `upper_layers` SWA layers in
    `hsa_layers` groups; each group opens with one HSA layer: with `swa_in_hsa` the group's first SWA layer carries HSA
    as well, without it the HSA layer is an extra layer with an MLP of its own.
    """

    preset: str = "demo"
    vocab_size: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int = 0  # SwiGLU width of the dense MLPs
    lower_layers: int = 0
    upper_layers: int = 0
    hsa_layers: int = 1
    swa_in_hsa: bool = True
    num_heads: int = 0  # query heads of SWA and of HSA
    head_dim: int = 0
    swa_kv_heads: int = 0
    hsa_kv_heads: int = 0
    retrieval_heads: int = 1  # 1 (shared) or hsa_kv_heads
    retrieval_dim: int = 0  # over all retrieval heads
    chunk_size: int = 64  # tokens
    encoder_layers: int = 1
    encoder_ffn_hidden_size: int = 0
    num_experts: int = 0  # 0: every MLP is dense
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    shared_expert_ffn_hidden_size: int = 0
    dense_layers: int = 1  # leading layers whose MLP stays dense in a mixture of experts
    expert_bias_update_rate: float = 1e-3
    router_z_loss: float = 0.0  # weight of the mean logsumexp(router logits)^2 of every layer with experts
    rope_base: float = 10000.0
    tied_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    ablations: Ablations = field(default_factory=Ablations)

    @property
    def num_layers(self) -> int:
        """Decoder layers, HSA layers included, chunk encoder not."""
        extra = self.ablations.hsa and not self.swa_in_hsa
        return self.lower_layers + self.upper_layers + (self.hsa_layers if extra else 0)

    @property
    def first_hsa_layer(self) -> int:
        """Index of the decoder layer that owns the chunk encoder; `num_layers` without HSA."""
        return next((i for i, kind in enumerate(self.layer_kinds()) if "hsa" in kind), self.num_layers)

    def shared_heads(self) -> dict[str, int]:
        """Heads that serve several query heads each, by field name."""
        return {name: getattr(self, name) for name in ("swa_kv_heads", "hsa_kv_heads", "retrieval_heads")}

    def split_widths(self) -> dict[str, int]:
        """Sizes that tensor-parallel ranks cut into equal parts, by field name (heads and experts apart)."""
        names = ["vocab_size", "ffn_hidden_size", "encoder_ffn_hidden_size"]
        if self.num_experts:
            names.append("shared_expert_ffn_hidden_size")
        return {name: getattr(self, name) for name in names}

    def layer_kinds(self) -> list[str]:
        """One of "swa", "hsa" (HSA alone) or "swa+hsa" for every decoder layer, bottom to top."""
        if not self.ablations.hsa:
            return ["swa"] * self.num_layers
        kinds = ["swa"] * self.lower_layers
        starts = {group * self.upper_layers // self.hsa_layers for group in range(self.hsa_layers)}
        for index in range(self.upper_layers):
            if index in starts:
                kinds += ["swa+hsa"] if self.swa_in_hsa else ["hsa", "swa"]
            else:
                kinds.append("swa")
        return kinds

    def uses_experts(self, layer: int) -> bool:
        """True when decoder layer `layer` (from 0) has a mixture of experts instead of a dense MLP."""
        return self.num_experts > 0 and layer >= self.dense_layers

    def problems(self) -> list[str]:
        """Everything that makes these sizes impossible, each as `field: what is wrong`."""
        found = []
        positive = (
            "vocab_size hidden_size ffn_hidden_size lower_layers upper_layers num_heads head_dim swa_kv_heads "
            "hsa_kv_heads retrieval_heads retrieval_dim chunk_size encoder_layers encoder_ffn_hidden_size hsa_layers"
        ).split()
        if self.num_experts:
            positive += ["experts_per_token", "expert_ffn_hidden_size", "shared_expert_ffn_hidden_size"]
        found += [
            f"model.{name}: must be positive, is {getattr(self, name)}" for name in positive if getattr(self, name) <= 0
        ]
        if found:
            return found
        if self.hsa_layers > self.upper_layers:
            found.append(
                f"model.hsa_layers: {self.hsa_layers} groups need as many upper_layers, there are {self.upper_layers}"
            )
        for name in ("swa_kv_heads", "hsa_kv_heads"):
            if self.num_heads % getattr(self, name):
                found.append(f"model.{name}: {getattr(self, name)} does not divide num_heads {self.num_heads}")
        if self.num_heads // self.hsa_kv_heads > 32:
            found.append(
                f"model.hsa_kv_heads: over 32 query heads per key/value head ({self.num_heads}/{self.hsa_kv_heads})"
            )
        if self.retrieval_heads not in (1, self.hsa_kv_heads):
            found.append(
                f"model.retrieval_heads: must be 1 or hsa_kv_heads ({self.hsa_kv_heads}), is {self.retrieval_heads}"
            )
        if self.retrieval_dim % self.retrieval_heads:
            found.append(
                f"model.retrieval_dim: {self.retrieval_dim} is no multiple of retrieval_heads {self.retrieval_heads}"
            )
        if self.num_experts and self.experts_per_token > self.num_experts:
            found.append(f"model.experts_per_token: {self.experts_per_token} of {self.num_experts} experts")
        if self.router_z_loss < 0:
            found.append(f"model.router_z_loss: must not be negative, is {self.router_z_loss}")
        if self.head_dim % 2:
            found.append(f"model.head_dim: must be even for rotary embeddings, is {self.head_dim}")
        others = [name for name in self.ablations.named() if name != "hsa"]
        if others and not self.ablations.hsa:
            found.append(
                f"model.ablations.{others[0]}: changes HSA, which model.ablations.hsa: false leaves out; set either"
            )
        if self.ablations.selection_noise < 0:
            found.append(f"model.ablations.selection_noise: must not be negative, is {self.ablations.selection_noise}")
        return found


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all of them, those of the embeddings (input, and output when untied), and those one token
    uses.
    """

    total: int
    embedding: int
    active: int  # embeddings included

    @property
    def active_without_embedding(self) -> int:
        return self.active - self.embedding


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Exact parameter counts by arithmetic, norms and expert biases' buffers treated as the model builds them."""
    h, d = model.hidden_size, model.head_dim
    query = model.num_heads * d
    swa = h * (query + 2 * model.swa_kv_heads * d) + query * h + 2 * d + h  # qkv, output, q/k norms, input norm
    hsa = 2 * h * query + h * model.retrieval_dim + d + model.retrieval_dim // model.retrieval_heads + h
    hsa += int(model.ablations.recency_decay)
    dense = 3 * h * model.ffn_hidden_size + h
    expert = 3 * h * model.expert_ffn_hidden_size
    moe = model.num_experts * expert + 3 * h * model.shared_expert_ffn_hidden_size + h * model.num_experts + h
    moe_active = moe - (model.num_experts - model.experts_per_token) * expert

    total = active = 0
    for layer, kind in enumerate(model.layer_kinds()):
        attention = (swa if "swa" in kind else 0) + (hsa if "hsa" in kind else 0)
        total += attention + (moe if model.uses_experts(layer) else dense)
        active += attention + (moe_active if model.uses_experts(layer) else dense)
    encoder_layer = 4 * h * query + 2 * d + 3 * h * model.encoder_ffn_hidden_size + 2 * h
    memory = 2 * h * model.hsa_kv_heads * d + d + h * model.retrieval_dim + model.retrieval_dim // model.retrieval_heads
    encoder = 0
    if model.ablations.hsa:  # [CLS], layers, final norm, projections to the memory
        encoder = h + model.encoder_layers * encoder_layer + h + memory
    embedding = model.vocab_size * h * (1 if model.tied_embeddings else 2)
    rest = encoder + h + embedding  # final norm
    return ParameterCount(total=total + rest, embedding=embedding, active=active + rest)
