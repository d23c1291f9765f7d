"""A two-layer model of Megatron parts with its optimizer, and a deterministic training step. Loaded by path."""

from __future__ import annotations

import torch

from parallel import compat, mesh
from parallel.optimizer import OptimizerSettings, build_optimizer, wrap_model

VOCABULARY, LENGTH, BATCH = 64, 16, 4


class Toy:
    """Model, optimizer and their steps. The global batch of a step is the same at every data-parallel size."""

    def __init__(
        self,
        settings: OptimizerSettings,
        *,
        bf16: bool = False,
        width: int = 32,
        experts: int = 0,
        dropout: float = 0.1,
        overlap: bool = False,
    ) -> None:
        torch.manual_seed(1)
        moe = {}
        if experts:
            expert_ranks = compat.parallel_state.get_expert_model_parallel_world_size()
            moe = dict(num_moe_experts=experts, moe_router_topk=2, moe_ffn_hidden_size=48, moe_router_dtype="fp32",
                       moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
                       moe_router_load_balancing_type="none", moe_token_dispatcher_type="alltoall",
                       expert_model_parallel_size=expert_ranks)  # fmt: skip
        self.config = compat.TransformerConfig(
            num_layers=2, hidden_size=width, num_attention_heads=4, ffn_hidden_size=2 * width, normalization="RMSNorm",
            gated_linear_unit=True, activation_func=torch.nn.functional.silu, bias_activation_fusion=False,
            add_bias_linear=False, hidden_dropout=dropout, attention_dropout=0.0, calculate_per_token_loss=True,
            use_cpu_initialization=True, hetereogenous_dist_checkpoint=True, bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32, **moe,
        )  # fmt: skip
        spec = compat.get_gpt_layer_local_spec(num_experts=experts or None, normalization="RMSNorm")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = compat.GPTModel(
            self.config,
            spec,
            VOCABULARY,
            LENGTH,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        ).to(device)
        self.device, self.settings = device, settings
        self.chunks = wrap_model([model], settings, overlap=overlap)
        self.optimizer = build_optimizer(settings, self.chunks)
        self.config.finalize_model_grads_func = compat.finalize_model_grads
        self.steps = 0

    def step(self) -> float:
        """One update on the batch that belongs to the step; returns the mean loss over the global batch."""
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(self.steps))
        mine = tokens[mesh.data_rank() :: mesh.data_size()].to(self.device)
        positions = torch.arange(LENGTH, device=self.device)

        def forward(batches, model):
            micro = next(batches)
            losses = model(micro[:, :-1], positions.expand(len(micro), -1), None, labels=micro[:, 1:])

            def reduce(output):
                count = torch.tensor(output.numel(), dtype=torch.int, device=self.device)
                total = output.float().sum()
                return total, count, {"loss": torch.stack([total.detach(), count.float()])}

            return losses, reduce

        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        results = compat.get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(mine.split(1)),
            model=self.chunks,
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        sums = torch.stack([result["loss"] for result in results]).sum(0)
        torch.distributed.all_reduce(sums)
        updated, self.grad_norm, _ = self.optimizer.step()
        assert updated
        self.steps += 1
        return (sums[0] / sums[1]).item()

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of all parameters and buffers by name."""
        return {
            name: value.detach().clone()
            for name, value in self.chunks[0].module.state_dict().items()
            if value is not None
        }


def settings(name: str, **changes) -> OptimizerSettings:
    """Settings at which a few steps change the losses visibly."""
    return OptimizerSettings(name=name, lr=1e-2, muon_lr=1e-2, weight_decay=0.1, **changes)
