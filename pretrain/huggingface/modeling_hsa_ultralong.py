"""HSA-UltraLong (arXiv 2511.23319) in one file: PyTorch, and transformers' base classes where they are installed.

With transformers:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Without:

    model = HSAUltraLong.from_folder(folder)          # needs safetensors
    logits = model(tokens)                            # (B, L) int64 -> (B, L, vocabulary)

This is the plain form of the model, for reading, checking and short texts: every call computes the whole sequence, in
linear memory but without a cache. Millions of tokens want the streaming engine of the training stack.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

_BLOCK = 256  # queries that attend at a time


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x, cos, sin):
    """Rotary embedding of x (B, L, heads, D), halves paired."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


class WindowAttention(nn.Module):
    """Causal attention to the last `window` tokens (itself included); rotary positions, norms on queries and keys."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.base = (
            c["num_heads"],
            c["swa_kv_heads"],
            c["head_dim"],
            c["rope_base"],
        )
        self.q_proj = linear(c["hidden_size"], self.heads * self.dim)
        self.k_proj = linear(c["hidden_size"], self.kv_heads * self.dim)
        self.v_proj = linear(c["hidden_size"], self.kv_heads * self.dim)
        self.o_proj = linear(self.heads * self.dim, c["hidden_size"])
        self.q_norm = RMSNorm(self.dim, c["norm_eps"])
        self.k_norm = RMSNorm(self.dim, c["norm_eps"])

    def forward(self, x, window):
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, self.heads, self.dim))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.kv_heads, self.dim))
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.dim)
        frequencies = self.base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float64) / self.dim)
        out = []
        for start in range(0, length, _BLOCK):
            stop, first = min(start + _BLOCK, length), max(0, start - window + 1)
            # Angles are counted from the first key: only differences matter, and they stay exact at any length.
            angles = torch.arange(stop - first, device=x.device, dtype=torch.float64)[:, None] * frequencies
            wide = torch.promote_types(x.dtype, torch.float32)
            cos, sin = (torch.cat((f, f), -1)[:, None].to(wide) for f in (angles.cos(), angles.sin()))
            qb = rotate(q[:, start:stop], cos[start - first :], sin[start - first :])
            kb = rotate(k[:, first:stop], cos, sin)
            row = torch.arange(start, stop, device=x.device)[:, None]
            column = torch.arange(first, stop, device=x.device)
            mask = (column <= row) & (column > row - window)
            out.append(_attend(qb, kb, v[:, first:stop], mask))
        return self.o_proj(torch.cat(out, 1).flatten(2))


def _attend(q, k, v, mask):
    """q (B, T, Hq, D), k and v (B, N, Hkv, D), mask (T, N) or None -> (B, T, Hq, D), computed in fp32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    ratio = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    kh, vh = kh.repeat_interleave(ratio, 1), vh.repeat_interleave(ratio, 1)
    scores = qh @ kh.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ vh).transpose(1, 2).to(q.dtype)


class MLP(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden)

    def forward(self, x, scale=None):
        inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        if scale is not None:
            inner = (inner * scale).to(inner.dtype)
        return self.down_proj(inner)


class MixtureOfExperts(nn.Module):
    """Sigmoid router with a bias per expert that only decides who is chosen, and a shared expert."""

    def __init__(self, c):
        super().__init__()
        self.top_k = c["experts_per_token"]
        self.router = linear(c["hidden_size"], c["num_experts"])
        self.register_buffer("expert_bias", torch.zeros(c["num_experts"], dtype=torch.float32))
        sizes = c["hidden_size"], c["expert_ffn_hidden_size"]
        self.experts = nn.ModuleList(MLP(*sizes) for _ in range(c["num_experts"]))
        self.shared_expert = MLP(c["hidden_size"], c["shared_expert_ffn_hidden_size"])

    def forward(self, x):
        flat = x.flatten(0, 1)
        scores = F.linear(flat.float(), self.router.weight.float()).sigmoid()
        chosen = (scores + self.expert_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(flat[token], weights[token, slot, None]))
        return out.view_as(x) + self.shared_expert(x)


class EncoderLayer(nn.Module):
    """Bidirectional attention inside one chunk, without positions."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.dim = c["num_heads"], c["head_dim"]
        width = self.heads * self.dim
        self.input_norm = RMSNorm(c["hidden_size"], c["norm_eps"])
        self.q_proj, self.k_proj = linear(c["hidden_size"], width), linear(c["hidden_size"], width)
        self.v_proj, self.o_proj = linear(c["hidden_size"], width), linear(width, c["hidden_size"])
        self.q_norm, self.k_norm = RMSNorm(self.dim, c["norm_eps"]), RMSNorm(self.dim, c["norm_eps"])
        self.mlp_norm = RMSNorm(c["hidden_size"], c["norm_eps"])
        self.mlp = MLP(c["hidden_size"], c["encoder_ffn_hidden_size"])

    def forward(self, x):
        y = self.input_norm(x)
        q, k, v = (p(y).unflatten(-1, (self.heads, self.dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(_attend(self.q_norm(q), self.k_norm(k), v, None).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """Whole chunks of the lower decoder's output -> keys, values and one landmark per chunk: the context memory."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        hidden, eps = c["hidden_size"], c["norm_eps"]
        self.cls = nn.Parameter(torch.zeros(hidden))
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c["encoder_layers"]))
        self.final_norm = RMSNorm(hidden, eps)
        self.k_proj = linear(hidden, c["hsa_kv_heads"] * c["head_dim"])
        self.v_proj = linear(hidden, c["hsa_kv_heads"] * c["head_dim"])
        self.landmark_proj = linear(hidden, c["retrieval_dim"])
        self.k_norm = RMSNorm(c["head_dim"], eps)
        self.landmark_norm = RMSNorm(c["retrieval_dim"] // c["retrieval_heads"], eps)

    def forward(self, hidden):
        """hidden (B, C * S, width) -> k, v (B, C, S, Hkv, D) and landmarks (B, C, Hr, Dr)."""
        c = self.c
        batch, length, width = hidden.shape
        x = hidden.reshape(-1, c["chunk_size"], width)
        x = torch.cat((self.cls.to(x.dtype).expand(x.shape[0], 1, width), x), 1)
        for layer in self.layers:
            x = layer(x)
        x = self.final_norm(x)
        shape = (batch, length // c["chunk_size"], c["chunk_size"], c["hsa_kv_heads"], c["head_dim"])
        landmarks = self.landmark_proj(x[:, 0]).view(batch, shape[1], c["retrieval_heads"], -1)
        return (
            self.k_norm(self.k_proj(x[:, 1:]).view(shape)),
            self.v_proj(x[:, 1:]).view(shape),
            self.landmark_norm(landmarks),
        )


class HierarchicalSparseAttention(nn.Module):
    """Choose chunks by landmark, attend inside each with a softmax of its own, sum by the softmax of the scores."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = linear(c["hidden_size"], c["num_heads"] * c["head_dim"])
        self.retrieval_proj = linear(c["hidden_size"], c["retrieval_dim"])
        self.o_proj = linear(c["num_heads"] * c["head_dim"], c["hidden_size"])
        self.q_norm = RMSNorm(c["head_dim"], c["norm_eps"])
        self.retrieval_norm = RMSNorm(c["retrieval_dim"] // c["retrieval_heads"], c["norm_eps"])

    def forward(self, x, memory, top_k):
        c = self.c
        k, v, landmarks = memory
        batch, length, _ = x.shape
        chunks, size = landmarks.shape[1], c["chunk_size"]
        q = self.q_norm(self.q_proj(x).view(batch, length, c["num_heads"], c["head_dim"]))
        wide = torch.promote_types(x.dtype, torch.float32)
        r = self.retrieval_proj(x).view(batch, length, c["retrieval_heads"], -1).to(wide)
        r = self.retrieval_norm(r) * r.shape[-1] ** -0.5
        kept = min(top_k or chunks, chunks)
        out = []
        for start in range(0, length, _BLOCK // 8):
            stop = min(start + _BLOCK // 8, length)
            scores = torch.einsum("bthd,bchd->bthc", r[:, start:stop], landmarks.to(wide))
            position = torch.arange(start, stop, device=x.device)[:, None, None]
            seen = torch.arange(chunks, device=x.device) < position // size  # completed chunks only
            # Stable: of equal scores the earlier chunk wins.
            best, ids = scores.masked_fill(~seen, float("-inf")).sort(dim=-1, descending=True, stable=True)
            best, ids = best[..., :kept], ids[..., :kept]
            weights = torch.nan_to_num(best.softmax(-1))  # a token that sees no chunk gets 0
            heads = c["hsa_kv_heads"]
            ids, weights = (y.expand(-1, -1, heads, -1) for y in (ids, weights))
            row = torch.arange(batch, device=x.device)[:, None, None, None]
            head = torch.arange(heads, device=x.device)[:, None]
            kb, vb = (y[row, ids, :, head].to(wide) for y in (k, v))  # (B, T, Hkv, K, S, D)
            qb = q[:, start:stop].to(wide).unflatten(2, (heads, -1)) * c["head_dim"] ** -0.5
            p = torch.einsum("bthrd,bthksd->bthrks", qb, kb).softmax(-1) * weights[:, :, :, None, :, None]
            out.append(torch.einsum("bthrks,bthksd->bthrd", p, vb).flatten(2))
        return self.o_proj(torch.cat(out, 1).to(x.dtype))


class DecoderLayer(nn.Module):
    """r = x + window(x); h = HSA(r); out = r + MLP(norm(r + h)): HSA feeds the MLP and stays out of the residual,
    unless the configuration's `bypass` is false: out = (r + h) + MLP(norm(r + h)).
    """

    def __init__(self, c, index):
        super().__init__()
        hidden, eps, self.kind = c["hidden_size"], c["norm_eps"], c["layer_kinds"][index]
        if "swa" in self.kind:
            self.input_norm, self.attention = RMSNorm(hidden, eps), WindowAttention(c)
        if "hsa" in self.kind:
            self.hsa_norm, self.hsa = RMSNorm(hidden, eps), HierarchicalSparseAttention(c)
        self.mlp_norm = RMSNorm(hidden, eps)
        experts = c["num_experts"] > 0 and index >= c["dense_layers"]
        self.mlp = MixtureOfExperts(c) if experts else MLP(hidden, c["ffn_hidden_size"])
        self.bypass = c.get("bypass", True)

    def forward(self, x, memory, window, hsa_window, top_k):
        if "swa" in self.kind:
            x = x + self.attention(self.input_norm(x), hsa_window if "hsa" in self.kind else window)
        y = x
        if "hsa" in self.kind and memory is not None:
            y = x + self.hsa(self.hsa_norm(x), memory, top_k)
        return (x if self.bypass else y) + self.mlp(self.mlp_norm(y))


class HSAUltraLong(nn.Module):
    """The model of a config dictionary (the keys of config.json)."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.encoder = ChunkEncoder(c)
        self.layers = nn.ModuleList(DecoderLayer(c, i) for i in range(len(c["layer_kinds"])))
        self.norm = RMSNorm(c["hidden_size"], c["norm_eps"])
        if not c["tied_embeddings"]:
            self.lm_head = linear(c["hidden_size"], c["vocab_size"])

    def forward(self, tokens):
        """(B, L) int64 -> logits (B, L, vocabulary)."""
        c = self.c
        x, memory = self.embed_tokens(tokens), None
        for layer in self.layers:
            if "hsa" in layer.kind and memory is None:
                whole = tokens.shape[1] // c["chunk_size"] * c["chunk_size"]
                memory = self.encoder(x[:, :whole]) if whole else None
            x = layer(x, memory, c["window"], c["hsa_window"], c["hsa_top_k"])
        x = self.norm(x)
        return F.linear(x, self.embed_tokens.weight) if c["tied_embeddings"] else self.lm_head(x)

    @classmethod
    def from_folder(cls, folder):
        """Load an exported folder without transformers."""
        from safetensors.torch import load_file

        folder = Path(folder)
        model = cls(json.loads((folder / "config.json").read_text()))
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            state.update(load_file(file))
        model.load_state_dict({name.removeprefix("model."): x for name, x in state.items()}, assign=True)
        return model.eval()


try:
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput
except ImportError:
    pass
else:

    class HSAUltraLongConfig(PretrainedConfig):
        model_type = "hsa_ultralong"
        # Only what differs from the sizes of a checkpoint by name; config.json has everything else.
        attribute_map = {"num_attention_heads": "num_heads", "intermediate_size": "ffn_hidden_size"}

        def __init__(self, **fields):
            self.layer_kinds = fields.pop("layer_kinds", [])
            fields["tie_word_embeddings"] = False  # tied embeddings are one parameter here, nothing is to be tied
            fields["use_cache"] = False
            super().__init__(**fields)
            self.num_hidden_layers = len(self.layer_kinds)

    class HSAUltraLongForCausalLM(PreTrainedModel, GenerationMixin):
        config_class = HSAUltraLongConfig
        base_model_prefix = ""
        _supports_cache_class = False

        def __init__(self, config):
            super().__init__(config)
            self.model = HSAUltraLong(config.to_dict())
            self.post_init()

        def _init_weights(self, module):
            pass  # weights come from the checkpoint

        def get_input_embeddings(self):
            return self.model.embed_tokens

        def set_input_embeddings(self, value):
            self.model.embed_tokens = value

        def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
            return {"input_ids": input_ids, "attention_mask": attention_mask}

        def forward(self, input_ids, attention_mask=None, labels=None, **_):
            """Rows may be padded on the left or the right (attention_mask 0): each is computed without its padding."""
            if attention_mask is None or bool(attention_mask.all()):
                logits = self.model(input_ids)
            else:
                logits = input_ids.new_zeros(*input_ids.shape, self.config.vocab_size, dtype=self.dtype)
                for row, real in enumerate(attention_mask.bool()):
                    logits[row, real] = self.model(input_ids[row, real][None])[0].to(logits.dtype)
            loss = None
            if labels is not None:
                wide = logits[:, :-1].float().flatten(0, 1)
                loss = F.cross_entropy(wide, labels[:, 1:].flatten(), ignore_index=-100)
            return CausalLMOutput(loss=loss, logits=logits)
