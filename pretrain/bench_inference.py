"""`hsa bench prefill` and `hsa bench decode`: reading and continuing long texts, beside what bounds them.

Weights are random and made on the device: speed does not depend on them. Before anything is timed, prompt and decode
are compared with the full forward pass at a small length; a wrong result prints no time and ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from parallel import mesh
from parallel.model_config import ModelConfig, count_parameters
from pretrain.context_store import Placement
from pretrain.errors import RecipeError
from pretrain.evaluation.units import format_length, parse_lengths
from pretrain.inference import InferenceEngine, Reading
from pretrain.model import HSAModel, transformer_config
from pretrain.prefill_graph import WORTH
from recipes import PRESETS_DIR

# window, window inside HSA layers, top-k: the paper's, and for 345m its authors'.
SCHEDULES = {"345m": (512, 512, 32), "demo": (32, 32, 16)}
PAPER_SCHEDULE = (4096, 512, 64)
# Largest relative error against the full forward pass, or, where that is more, so many times what one rounding of the
# embedding changes (with random weights, chunks and experts nearly tie, and in half precision another one is taken).
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}
ROUNDINGS = 8
GROSS = 0.5  # never allowed: unrelated logits are 1.4 apart


@dataclass
class Case:
    """A model with random weights and how it reads."""

    name: str
    model: HSAModel
    engine: InferenceEngine

    @property
    def sizes(self) -> ModelConfig:
        return self.model.model


def add_arguments(parser: argparse.ArgumentParser, lengths: str) -> None:
    """What both benchmarks take."""
    presets = sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))
    parser.add_argument("presets", nargs="*", default=["345m"], metavar="PRESET", help=f"of {', '.join(presets)}")
    parser.add_argument("--lengths", default=lengths, metavar="L,L", help=f"tokens of context (default {lengths})")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default bf16 on a GPU, fp32 without")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--segment", type=int, metavar="N", help="tokens per forward pass of a prompt")
    parser.add_argument("--window", type=int, metavar="N", help="tokens (default: the preset's published one)")
    parser.add_argument("--hsa-window", type=int, metavar="N", help="tokens inside HSA layers")
    parser.add_argument("--top-k", type=int, metavar="K", help="chunks per token")
    parser.add_argument("--memory", choices=("device", "host"), default="device", help="where keys and values lie")
    parser.add_argument("--memory-fp8", action="store_true", help="keep them as 8-bit floats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")


def run(args: argparse.Namespace, measure: Callable[[Case, list[int], argparse.Namespace], list[dict]]) -> int:
    """Build, check and measure every preset; figures are printed as they come."""
    lengths = parse_lengths(args.lengths)
    for name in args.presets:
        if not (PRESETS_DIR / f"{name}.yaml").is_file():
            known = ", ".join(sorted(path.stem for path in PRESETS_DIR.glob("*.yaml")))
            raise RecipeError(f"no preset {name!r}: there are {known}")
    device = mesh.initialize(None, args.device, seed=0)
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    records: list[dict[str, Any]] = []
    status = 0
    try:
        for name in args.presets:
            case = build(name, device, precision, args)
            count = count_parameters(case.sizes)
            settings = case.engine.settings
            print(
                f"{name}: {count.total / 1e6:.1f}M parameters, {precision}, {_device_name(device)}, window "
                f"{settings['window']}, in HSA layers {settings['hsa_window']}, top-k {settings['top_k']}",
                flush=True,
            )
            error, rounding = error_at_a_small_length(case)
            allowed = min(GROSS, max(TOLERANCE[precision], ROUNDINGS * rounding))
            print(f"  error against the full forward pass: {error:.2e} (allowed {allowed:.2e})", flush=True)
            if not error <= allowed:
                print(f"hsa bench: {name}: the result is wrong, no time is shown", file=sys.stderr, flush=True)
                status = 1
                continue
            head = {"preset": name, "precision": precision, "device": _device_name(device), "error": error, **settings}
            records += [{**head, **record} for record in measure(case, lengths, args)]
            del case
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        mesh.shutdown()
        if args.json is not None:
            args.json.write_text(json.dumps(records, indent=1) + "\n")
    return status


def build(name: str, device: torch.device, precision: str, args: argparse.Namespace) -> Case:
    """A preset with random weights, made on the device."""
    sizes = ModelConfig(**OmegaConf.load(PRESETS_DIR / f"{name}.yaml"))  # type: ignore[arg-type]
    window, hsa_window, top_k = SCHEDULES.get(name, PAPER_SCHEDULE)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = HSAModel(transformer_config(sizes, bf16=precision == "bf16"), sizes, max_length=4096).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
    model.requires_grad_(False)
    model.rotary_pos_emb.to(device)
    engine = InferenceEngine(
        model,
        window=args.window or window,
        hsa_window=args.hsa_window or hsa_window,
        top_k=args.top_k or top_k,
        segment=args.segment,
        memory=Placement(host=args.memory == "host", fp8=args.memory_fp8),
        frozen=True,
    )
    return Case(name, model, engine)


def error_at_a_small_length(case: Case) -> tuple[float, float]:
    """Relative error of the logits after a prompt of two segments and of the next three tokens, and that of the full
    forward pass when every number of the embedding is off by one rounding.
    """
    engine, chunk = case.engine, case.sizes.chunk_size
    length = 15 * chunk + 5
    tokens = _tokens(case, length + 3)
    engine.model.set_schedule(**engine.settings)  # type: ignore[arg-type]
    with torch.no_grad():
        padded = torch.nn.functional.pad(tokens.to(engine.device), (0, -tokens.shape[1] % chunk))
        full = case.model(padded)[0, length - 1 : length + 3].float()
        embedding = case.model.embedding.word_embeddings
        hook = embedding.register_forward_hook(_one_rounding)
        rounded = case.model(padded)[0, length - 1 : length + 3].float()
        hook.remove()
    segment, engine.segment = engine.segment, length - 9  # the last tokens lean on a halo
    engine.reset()
    streamed = [engine.prefill(tokens[:, :length])]
    streamed += [engine.decode(tokens[:, i]) for i in range(length, length + 3)]
    engine.reset()
    engine.segment = segment
    return tuple(((x - full).norm() / full.norm()).item() for x in (torch.cat(streamed), rounded))  # type: ignore[return-value]


def _one_rounding(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """The output with every number moved by its last bit, up or down."""
    sign = torch.where(torch.arange(output.shape[-1], device=output.device) % 2 == 0, 1.0, -1.0).to(output.dtype)
    return output * (1 + sign * torch.finfo(output.dtype).eps)


def _tokens(case: Case, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, case.sizes.vocab_size, (1, length), generator=generator)


# ---------------------------------------------------------------------------------------------------------- prefill


def add_prefill_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa bench prefill`."""
    add_arguments(parser, "64k,1m,4m,16m")
    parser.add_argument(
        "--full-until", default="64k", metavar="L", help="up to this length the full computation is timed too"
    )


def prefill(args: argparse.Namespace) -> int:
    """Seconds per million tokens of a prompt."""
    return run(args, measure_prefill)


def measure_prefill(case: Case, lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """Time every length; beside it the full computation and the floor of dense attention."""
    engine, sizes = case.engine, case.sizes
    (until,) = parse_lengths(args.full_until)
    rate = matmul_rate(case.model)
    _timed(engine, _tokens(case, engine.segment * (WORTH + 1) + engine.segment // 2))  # compiles, records
    records = []
    for length in lengths:
        tokens = _tokens(case, length)
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _timed(engine, tokens)
        record: dict[str, Any] = {"bench": "prefill", "length": length, "seconds": seconds}
        record["seconds_per_million"] = seconds / length * 2**20
        # Scores and sums of a causal pass over every layer, at the rate of this machine's own matrix products.
        record["dense_attention_floor"] = 2 * length**2 * sizes.num_heads * sizes.head_dim * sizes.num_layers / rate
        if length <= until:
            engine.full_prefill = True
            _timed(engine, tokens)
            record["full_seconds"] = _timed(engine, tokens)
            engine.full_prefill = False
        if engine.device.type == "cuda":
            record["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        full = f"{record['full_seconds']:9.3f} s" if "full_seconds" in record else "          -"
        peak = f", peak {record['peak_gigabytes']:.1f} GB" if "peak_gigabytes" in record else ""
        print(
            f"  {format_length(length):>5}: {seconds:9.3f} s, {record['seconds_per_million']:8.3f} s per million; full "
            f"computation {full}; dense attention alone at least {record['dense_attention_floor']:.3f} s{peak}",
            flush=True,
        )
        records.append(record)
    engine.reset()
    return records


def _timed(engine: InferenceEngine, prompt: torch.Tensor) -> float:
    """Seconds of one prompt, read from nothing."""
    engine.reset()
    _wait(engine.device)
    started = time.perf_counter()
    engine.prefill(prompt)
    _wait(engine.device)
    return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------- decode


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hsa bench decode`."""
    add_arguments(parser, "64k,16m")
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="generated tokens that are timed")


def decode(args: argparse.Namespace) -> int:
    """Tokens per second behind a context of random memory."""
    return run(args, measure_decode)


def measure_decode(case: Case, lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """Time greedy generation (one token to the host at a time) at every length, and what its growth may cost."""
    engine, sizes = case.engine, case.sizes
    bandwidth = read_bandwidth(engine)
    records: list[dict[str, Any]] = []
    for length in lengths:
        length = length // sizes.chunk_size * sizes.chunk_size
        pretend_to_have_read(engine, length)
        token = torch.zeros(1, dtype=torch.int64, device=engine.device)

        def generate(count: int, token: torch.Tensor = token) -> None:
            for _ in range(count):
                token = engine.decode(token).argmax(-1)
                token.cpu()

        generate(4)
        _wait(engine.device)
        started = time.perf_counter()
        generate(args.tokens)
        seconds = (time.perf_counter() - started) / args.tokens
        landmarks = landmark_bytes(case, length)
        floor = (landmarks + other_bytes(case)) / bandwidth
        record = {
            "bench": "decode",
            "length": length,
            "milliseconds": seconds * 1e3,
            "tokens_per_second": 1 / seconds,
            "floor_milliseconds": floor * 1e3,
        }
        growth = ""
        if records:
            first = records[0]
            extra = (landmarks - landmark_bytes(case, first["length"])) / bandwidth * 1e3
            record["growth_milliseconds"] = record["milliseconds"] - first["milliseconds"]
            record["landmark_floor_milliseconds"] = extra
            growth = (
                f"; {record['growth_milliseconds']:+.3f} ms from {format_length(first['length'])}, reading the further "
                f"landmarks takes {extra:.3f} ms"
            )
        print(
            f"  {format_length(length):>5}: {1 / seconds:8.1f} tokens/s, {seconds * 1e3:.3f} ms (bytes alone "
            f"{floor * 1e3:.3f} ms at {bandwidth / 1e9:.0f} GB/s){growth}",
            flush=True,
        )
        records.append(record)
    engine.reset()
    return records


def pretend_to_have_read(engine: InferenceEngine, length: int) -> None:
    """Put the engine behind a context of random numbers; length is a multiple of the chunk size."""
    sizes, store = engine.model.model, engine.store
    chunks = length // sizes.chunk_size
    engine.reset()
    engine._reserve(1, chunks + 64, keep=False)
    for x in (store.k, store.v, store.scales, store.landmarks):
        if x.dtype == torch.uint8:
            x.random_(0, 120)  # bytes that are numbers in FP8
        elif x.numel():
            x.normal_()
    parameter = next(engine.model.parameters())
    halos = {}
    for layer in (*engine.lower, *engine.upper):
        if layer.has_window:
            window = engine.settings["hsa_window"] if layer.has_hsa else engine.settings["window"]
            shape = (min(length, int(window or 1) - 1), 1, sizes.swa_kv_heads, sizes.head_dim)
            halos[layer.layer_number] = (
                torch.randn(shape, dtype=parameter.dtype, device=engine.device),
                torch.randn(shape, dtype=parameter.dtype, device=engine.device),
            )
    engine.rewind([Reading((0,), length, halos, None)])


def landmark_bytes(case: Case, length: int) -> int:
    """Bytes of landmarks that one token reads."""
    element = case.engine.store.landmarks.element_size()
    return case.sizes.hsa_layers * (length // case.sizes.chunk_size) * case.sizes.retrieval_dim * element


def other_bytes(case: Case) -> int:
    """Bytes of weights, windows and chosen chunks that one token reads."""
    sizes, settings = case.sizes, case.engine.settings
    element = next(case.model.parameters()).element_size()
    weights = count_parameters(sizes)
    used = weights.active - (0 if sizes.tied_embeddings else weights.embedding // 2)
    windows = sum(
        int((settings["hsa_window"] if "hsa" in kind else settings["window"]) or 0)
        for kind in sizes.layer_kinds()
        if "swa" in kind
    )
    chosen = sizes.hsa_layers * int(settings["top_k"] or 0) * sizes.chunk_size * sizes.hsa_kv_heads
    return element * (used + 2 * sizes.head_dim * (windows * sizes.swa_kv_heads + chosen))


# ------------------------------------------------------------------------------------------------------- the machine


def matmul_rate(model: HSAModel) -> float:
    """FLOP/s of this device's matrix products in the model's dtype, measured."""
    parameter = next(model.parameters())
    size = 8192 if parameter.device.type == "cuda" else 512
    a = torch.randn(size, size, dtype=parameter.dtype, device=parameter.device)
    return 2 * size**3 / _best(parameter.device, lambda: a @ a)


def read_bandwidth(engine: InferenceEngine) -> float:
    """Bytes per second that a sum over a large tensor reads, measured."""
    size = 1 << (31 if engine.device.type == "cuda" else 24)
    data = torch.ones(size // 4, dtype=torch.float32, device=engine.device)
    return size / _best(engine.device, data.sum)


def _best(device: torch.device, work: Callable[[], Any]) -> float:
    times = []
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
