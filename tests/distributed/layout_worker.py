"""The ranks of the layout tests: a small model trained at each layout asked for, and what rank 0 gathered of it.

Arguments: a JSON file with a list of jobs, a folder, and a device, cpu (gloo) or cuda (NCCL, each rank a GPU). For each
number of ranks one set of processes runs all jobs of that number one after the other, with new process groups where
sizes change, and saves each result as FOLDER/NAME.pt as soon as it is there. What a set prints is in
FOLDER/ranks-N.log. On the CPU modules are imported once, then sets are forked, one after the other; CUDA wants fresh
processes, so there all sets start at once.

A job is {"name": str, "ranks": int, "parallel": {...}, "model": {...}, "window": int, "hsa_window": int, "top_k": int
or null, "length": int, "steps": int, "micro_batch": int, "recompute": str, "overlap": bool, "probe": position of
the token to change}. Its result holds losses, grad_norms (one per step), gradients after the first step and weights
after the last by global parameter name, parameters whose copies differ, what a step adds to `traffic` by rank, and
positions that move.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from pathlib import Path

import torch

from data_pipeline.batch import PackedBatch
from data_pipeline.evidence import PLACES
from parallel import compat, mesh
from parallel.context import traffic
from parallel.evidence import EvidenceLoss
from parallel.mesh import ParallelConfig
from parallel.model_config import Ablations, ModelConfig
from parallel.optimizer import OptimizerSettings, build_optimizer, wrap_model
from parallel.optional import ComputeConfig
from pretrain.layout_forward import whole_logits
from pretrain.model import build_chunks, global_parts
from pretrain.train_step import TrainStep
from tests.conftest import free_port

SMALL = dict(
    vocab_size=64, hidden_size=32, ffn_hidden_size=48, lower_layers=2, upper_layers=3, hsa_layers=2,
    num_heads=4, head_dim=8, swa_kv_heads=2, hsa_kv_heads=2, retrieval_heads=2, retrieval_dim=16, chunk_size=8,
    encoder_ffn_hidden_size=32, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=16,
    shared_expert_ffn_hidden_size=16, init_std=0.1,
)  # fmt: skip

TIMEOUT = {"cpu": 30, "cuda": 1}  # minutes; a GPU test that hangs should not use up the machine


def packed_batch(step, batch, length, chunk):
    """The global batch of a step: random tokens in documents of whole chunks, with padding, weights, domains, and one
    token of four told where in its document it is answered, and named."""
    g = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, 64, (batch, length), generator=g)
    starts = torch.rand(batch, length // chunk, generator=g) < 0.15
    starts[:, 0] = False
    starts[0] = False  # one sequence is a single document
    documents = starts.cumsum(1).int().repeat_interleave(chunk, dim=1)
    labels = torch.roll(tokens, -1, dims=1)
    same = torch.nn.functional.pad(documents[:, 1:] == documents[:, :-1], (0, 1))
    weights = torch.rand(batch, length, generator=g) * same * (torch.rand(batch, length, generator=g) < 0.9)
    domains = torch.randint(0, 2, (batch, length), generator=g).short()
    place = torch.arange(length)
    first = torch.where(starts.repeat_interleave(chunk, dim=1), place // chunk * chunk, 0).cummax(1).values
    room = (place - first + 1)[..., None]
    answered = first[..., None] + (room * torch.rand(batch, length, PLACES, generator=g)).long()
    answered[torch.rand(batch, length, generator=g) < 0.75] = -1
    return PackedBatch(
        tokens=tokens,
        labels=labels * same,
        loss_weights=weights,
        documents=documents,
        domains=domains,
        evidence=answered.int(),
    )


class Recorder:
    """The optimizer, keeping the gradients it is given the first time."""

    def __init__(self, optimizer, chunks):
        self.optimizer, self.chunks, self.gradients = optimizer, chunks, None

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        if self.gradients is None:
            self.gradients = {}
            gather_gradients(self.chunks)
            for chunk in self.chunks:
                for name, parameter in chunk.module.named_parameters():
                    count = getattr(parameter, "partition_count", 1)
                    split = (getattr(parameter, "partition_dim", 0), count)
                    for part, gradient in global_parts(name, parameter.main_grad, chunk.module):
                        self.gradients[part] = (gradient.detach().cpu().clone(), split)
        return self.optimizer.step()


def gather_gradients(chunks):
    """Under the distributed optimizer each rank has the sums of its share of every bucket: fill in the others."""
    for buffer in (buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)):
        if buffer.ddp_config.use_distributed_optimizer:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=group)


def whole(name, shards):
    """A whole gradient out of those of the tensor-parallel ranks, in rank order."""
    dim, count = shards[0][1]
    tensors = [tensor for tensor, _ in shards]
    if count == 1:
        for tensor in tensors[1:]:
            torch.testing.assert_close(tensor, tensors[0], rtol=1e-5, atol=1e-7, msg=f"{name} differs between ranks")
        return tensors[0]
    tensors = tensors[:count]
    if ".linear_fc1." in name:
        return torch.cat([t.chunk(2)[0] for t in tensors] + [t.chunk(2)[1] for t in tensors])
    return torch.cat(tensors, dim=dim)


def run(job, device):
    parallel = ParallelConfig(**job["parallel"])
    mesh.initialize(parallel, device, seed=1, timeout_minutes=TIMEOUT[device.type])
    mesh.check_topology(parallel, mesh.world_size())
    model = ModelConfig(**{**SMALL, **job.get("model", {})}, ablations=Ablations(bypass=job.get("bypass", True)))
    chunks = build_chunks(
        model,
        max_length=job["length"],
        seed=3,
        parallel=parallel,
        recompute=job.get("recompute", "none"),
        compute=ComputeConfig(**job.get("compute", {})),
        device=device,
    )
    for chunk in chunks:
        chunk.set_schedule(window=job["window"], hsa_window=job["hsa_window"], top_k=job["top_k"])
        chunk.schedule.evidence = EvidenceLoss(weight=0.1, chunks=64)
    settings = OptimizerSettings(**{"lr": 3e-3, "distributed": False, **job.get("optimizer", {})})
    wrapped = wrap_model(chunks, settings, overlap=job.get("overlap", False))
    recorder = Recorder(build_optimizer(settings, wrapped), wrapped)
    moved, logits = probe(wrapped, job, model, device)
    step = TrainStep(wrapped, recorder, ["a", "b"], device)
    results = []
    for number in range(job["steps"]):
        batch = packed_batch(number, 4, job["length"], model.chunk_size)
        share = 4 // mesh.data_size()
        rows = slice(mesh.data_rank() * share, (mesh.data_rank() + 1) * share)
        mine = PackedBatch(**{name: getattr(batch, name)[rows] for name in vars(batch)})
        traffic.reset()
        results.append(step(mine, job.get("micro_batch", 1), wants_stop=False))
    place = compat.parallel_state.get_tensor_model_parallel_rank()
    gathered = mesh.gather_objects((place, recorder.gradients, vars(traffic).copy(), trained_weights(wrapped)))
    gradients = gather_parts([(place, found) for place, found, _, _ in gathered])
    shards = [(place, found) for place, _, _, found in gathered]
    return {
        "weights": gather_parts(shards),
        "unequal copies": unequal_copies(shards),
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "domains": [result.domain_losses for result in results],
        "experts": [result.experts for result in results],
        "positions": [result.position_losses for result in results],
        "evidence": [result.evidence for result in results],
        "gradients": gradients,
        "held": mesh.gather_objects(held_numbers(wrapped, recorder.optimizer)),
        "traffic": [counted for _, _, counted, _ in gathered],
        "moved": moved,
        "logits": logits,
    }


def held_numbers(chunks, optimizer):
    """(numbers of this rank's parameters, numbers of its optimizer's moments)."""
    states = [state for chained in optimizer.chained_optimizers for state in chained.optimizer.state.values()]
    moments = sum(value.numel() for state in states for value in state.values() if value.dim())
    return sum(p.numel() for chunk in chunks for p in chunk.parameters()), moments


def trained_weights(chunks):
    """This rank's parameters by global name, each with its split."""
    return {
        part: (values, (getattr(parameter, "partition_dim", 0), getattr(parameter, "partition_count", 1)))
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
        for part, values in global_parts(name, parameter.detach().cpu().clone(), chunk.module)
    }


def gather_parts(ranks):
    """Whole tensors by global name, out of (tensor-parallel rank, shards by name) of every rank."""
    result = {}
    for name in sorted({name for _, found in ranks for name in found}):
        holders = sorted(((place, found[name]) for place, found in ranks if name in found), key=lambda x: x[0])
        result[name] = whole(name, _one_per_place(holders))
    return result


def unequal_copies(ranks):
    """Names of parameters that differ in a bit between ranks that hold the same part."""
    seen, unequal = {}, set()
    for place, found in ranks:
        for name, (tensor, _) in found.items():
            if not torch.equal(seen.setdefault((place, name), tensor), tensor):
                unequal.add(name)
    return sorted(unequal)


def _one_per_place(holders):
    """Shards by tensor-parallel rank; holders of the same shard are copies and must agree."""
    by_place = {}
    for place, (tensor, partition) in holders:
        if place in by_place:
            torch.testing.assert_close(tensor, by_place[place][0], rtol=1e-5, atol=1e-7)
        else:
            by_place[place] = (tensor, partition)
    return [by_place[place] for place in sorted(by_place)]


def probe(chunks, job, model, device):
    """Positions whose logits move when one token changes, in a packed batch, and the logits before it does."""
    batch = packed_batch(99, 2, job["length"], model.chunk_size)
    tokens, documents = batch.tokens.to(device), batch.documents.to(device)
    changed = tokens.clone()
    changed[:, job["probe"]] = (changed[:, job["probe"]] + 1) % model.vocab_size
    for chunk in chunks:
        chunk.eval()
    before = whole_logits(chunks, tokens, documents)
    after = whole_logits(chunks, changed, documents)
    for chunk in chunks:
        chunk.train()
    return ((before - after).abs().amax(-1) > 1e-5).nonzero().tolist(), before.cpu()


def rank_main(jobs, rank, ranks, port, folder, device):
    """One rank: all jobs of one number of ranks."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(folder / f"ranks-{ranks}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = mesh.initialize(device=device, seed=1, timeout_minutes=TIMEOUT[device])
    sizes = ParallelConfig()
    for job in jobs:
        started = time.perf_counter()
        wanted = ParallelConfig(**{**job["parallel"], "balance_selection": None, "sequence": None})
        if wanted != sizes:
            compat.parallel_state.destroy_model_parallel()
            sizes = wanted
        result = run(job, place)
        if mesh.is_writer():
            torch.save(result, folder / f"{job['name']}.pt")
            print(f"{job['name']}: {time.perf_counter() - started:.1f} s", flush=True)
    mesh.barrier()
    mesh.shutdown()


def start_ranks(jobs, ranks, folder, device):
    """The started processes of one set."""
    context, port = multiprocessing.get_context("fork" if device == "cpu" else "spawn"), free_port()
    arguments = [(jobs, rank, ranks, port, folder, device) for rank in range(ranks)]
    processes = [context.Process(target=rank_main, args=given) for given in arguments]
    for process in processes:
        process.start()
    return processes


def wait_for(processes):
    """Wait for a set; when one process fails the others are ended, since they would wait for it."""
    while alive := [process for process in processes if process.is_alive()]:  # one list: an empty one waits for ever
        multiprocessing.connection.wait([process.sentinel for process in alive])
        if any(process.exitcode for process in processes):
            for process in processes:
                process.kill()
    for process in processes:
        process.join()


def main():
    jobs, folder, device = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3]
    waiting = []
    for ranks in sorted({job["ranks"] for job in jobs}):
        processes = start_ranks([job for job in jobs if job["ranks"] == ranks], ranks, folder, device)
        if device == "cpu":
            wait_for(processes)
        else:
            waiting.append(processes)
    for processes in waiting:
        wait_for(processes)


if __name__ == "__main__":
    main()
