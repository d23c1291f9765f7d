"""`hsa bench kernels`: every operator against its baselines in one run. A wrong result gets no time."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsa_kernels import hsa_attention, hsa_decode, reference, select_chunks, sliding_window_attention
from hsa_kernels.bench import cases
from hsa_kernels.bench.cases import Case, make_case, measure, peak_gigabytes
from hsa_kernels.triton import attention

SECTIONS = ("curve", "long", "ratios", "million", "window", "selection", "decode", "adversarial", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `hsa bench kernels`. Example: hsa bench kernels --json kernels.json --plot kernels.png"""
    parser.add_argument("--json", metavar="FILE", help="write all rows and the machine to FILE")
    parser.add_argument("--plot", metavar="FILE", help="write a picture of time against length (PNG)")
    parser.add_argument("--authors-path", metavar="DIR", help="checkout of the authors' repository, to time its kernel")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--lengths", nargs="+", type=int, default=[131072, 16384, 8192, 32768, 65536, 4096])


class Report:
    """Rows of the benchmark, printed as they come."""

    def __init__(self, machine: dict[str, Any], json_path: str | None) -> None:
        self.machine = machine
        self.ceiling: float = machine["matmul_tflops"]  # of a large bf16 matrix product in this run
        self.rows: list[dict[str, Any]] = []
        self._json = json_path

    def add(
        self,
        section: str,
        name: str,
        run: Callable[[], object] | None,
        *,
        error: float | None = None,
        tolerance: float = cases.TOLERANCE,
        flops: float | None = None,
        repeats: int = 7,
        **facts: Any,
    ) -> float | None:
        """Time one row unless its error exceeds the tolerance. Returns milliseconds, or None."""
        row: dict[str, Any] = {"section": section, "name": name, **facts}
        if error is not None:
            row["error"] = error
        text = f"{section:12s} {name:44s}"
        if error is not None and not error <= tolerance:
            row["refused"] = f"relative error {error:.1e} exceeds {tolerance:.0e}"
            print(f"{text}  REFUSED: {row['refused']}", flush=True)
        elif run is not None:
            try:
                row["peak_gib"] = peak_gigabytes(run)
                row["ms"] = measure(run, repeats)
            except (RuntimeError, ValueError) as problem:  # a baseline that does not fit, or is not there
                row["failed"] = str(problem).splitlines()[0][:160]
                print(f"{text}  failed: {row['failed']}", flush=True)
            else:
                text += f" {row['ms']:10.3f} ms  peak {row['peak_gib']:6.2f} GiB"
                if flops:
                    row["tflops"] = flops / row["ms"] / 1e9
                    row["ceiling_fraction"] = row["tflops"] / self.ceiling
                    text += f"  {row['tflops']:6.0f} TFLOP/s ({row['ceiling_fraction']:.0%} of a matrix product)"
                print(text + (f"  error {error:.1e}" if error is not None else ""), flush=True)
        self.rows.append(row)
        if self._json:  # after every row: a crash later loses nothing
            Path(self._json).write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")
        return row.get("ms")


def _matmul_ceiling() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    return 2 * 8192**3 / measure(lambda: a @ b) / 1e9


def _ours(case: Case) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return hsa_attention(q, k, v, w, case.indices, chunk_size=case.chunk_size)

    return run


def _theirs(case: Case, kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    indices = case.indices.clamp(min=0)  # their kernel reads chunk 0 for empty columns, whose weight is 0

    def run(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return kernel(q, k, v, w, indices, 0.0, case.chunk_size, case.scale, 0.0, 0.0)

    return run


def _settle(case: Case, run: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """One step, until the overlap of the selection is known: what is checked is then what is timed."""
    torch.autograd.grad(run(*inputs), inputs, case.cotangent)
    torch.cuda.synchronize()


def _attention_rows(
    report: Report, section: str, label: str, case: Case, run: Callable[..., Tensor], *, check: bool, **facts: Any
) -> None:
    attention.forget_overlap()  # the case before may have chosen another loop order
    inputs = case.inputs()
    error = None
    if check:
        _settle(case, run, inputs)
        error = cases.attention_error(case, run, backward=True)

    def forward() -> object:
        with torch.no_grad():
            return run(*inputs)

    def both() -> object:
        return torch.autograd.grad(run(*inputs), inputs, case.cotangent)

    report.add(section, f"{label} forward", forward, error=error, flops=case.flops(2), **facts)
    report.add(section, f"{label} forward+backward", both, error=error, flops=case.flops(7), repeats=5, **facts)


def _curve(report: Report, lengths: list[int], authors: Callable[..., Tensor] | None) -> None:
    for length in lengths:
        case = make_case(length, 16, 1, kind="overlap")
        facts: dict[str, Any] = {"length": length, "heads": "16/1"}
        _attention_rows(report, "curve", f"hsa {length}", case, _ours(case), check=True, method="hsa", **facts)
        if authors is not None:
            # Their error is reported by the section of long inputs; here they are a baseline.
            run = _theirs(case, authors)
            _attention_rows(report, "curve", f"authors {length}", case, run, check=False, method="authors", **facts)
        forward, both = cases.dense_attention(case)
        with torch.no_grad():
            report.add("curve", f"cudnn causal {length} forward", forward, method="cudnn", **facts)
        report.add("curve", f"cudnn causal {length} forward+backward", both, method="cudnn", repeats=5, **facts)


def _window(report: Report, lengths: list[int]) -> None:
    """The operator at every length, and what it could have taken at the longest."""
    for size in (4096, 512):
        for length in lengths if size == 4096 else [max(lengths)]:
            case = make_case(length, 16, 1, kind="random", top_k=1)
            inputs = case.inputs()[:3]
            methods: dict[str, Callable[..., Tensor]] = {"window": partial(sliding_window_attention, window=size)}
            if length == max(lengths):
                methods |= cases.window_methods(size)
            for method, run in methods.items():

                def both(run: Callable[..., Tensor] = run) -> object:
                    return torch.autograd.grad(run(*inputs), inputs, case.cotangent)  # noqa: B023

                facts: dict[str, Any] = {"length": length, "heads": "16/1", "window": size, "method": method}
                label = f"{method} {size} {length}"
                # The tolerance is wider: torch's kernels round P and dS once more than ours.
                error = cases.window_error(run, inputs, size)
                with torch.no_grad():
                    report.add("window", f"{label} forward", lambda: run(*inputs), error=error, tolerance=5e-3, **facts)  # noqa: B023
                report.add("window", f"{label} forward+backward", both, error=error, tolerance=5e-3, **facts)


def _full(report: Report) -> None:
    """Every visible chunk chosen, as stages with `top_k: full` do: selection and attention."""
    for length in (16384, 32768):
        case = make_case(length, 16, 1, kind="all", top_k=length // 64)
        facts: dict[str, Any] = {"length": length, "heads": "16/1", "kind": "all"}
        _attention_rows(
            report, "full", f"hsa {length} all chunks", case, _ours(case), check=True, method="hsa", **facts
        )
        g = torch.Generator(device="cuda").manual_seed(0)
        q, lm = (torch.randn(1, n, 1, 128, device="cuda", generator=g) for n in (length, length // 64))
        with torch.no_grad():
            run = partial(select_chunks, q, lm, top_k=length // 64)
            report.add("full", f"selection {length} all chunks", run, **facts)


def _long(report: Report, authors: Callable[..., Tensor] | None) -> None:
    for kind in ("overlap", "random"):
        case = make_case(131072, 16, 1, kind=kind)
        facts: dict[str, Any] = {"length": 131072, "heads": "16/1", "kind": kind}
        _attention_rows(report, "long", f"hsa 131072 {kind}", case, _ours(case), check=True, method="hsa", **facts)
        torch.use_deterministic_algorithms(True)
        try:
            label = f"hsa 131072 {kind} deterministic"
            _attention_rows(report, "long", label, case, _ours(case), check=True, method="deterministic", **facts)
        finally:
            torch.use_deterministic_algorithms(False)
        if authors is not None:
            run, label = _theirs(case, authors), f"authors 131072 {kind}"
            error = cases.attention_error(case, run, backward=False)
            print(f"{'long':12s} {label}: relative error of the output {error:.1e}")
            _attention_rows(report, "long", label, case, run, check=False, method="authors", **facts)


def _ratios(report: Report) -> None:
    for heads_kv in (1, 2, 4, 8, 16):
        case = make_case(32768, 16, heads_kv, kind="overlap")
        facts: dict[str, Any] = {"length": 32768, "heads": f"16/{heads_kv}"}
        label = f"hsa 32768 ratio {16 // heads_kv}"
        _attention_rows(report, "ratios", label, case, _ours(case), check=True, method="hsa", **facts)


def _adversarial(report: Report) -> None:
    for kind in ("hot", "clustered"):
        case = make_case(32768, 16, 1, kind=kind)
        label = f"hsa 32768 {kind}"
        _attention_rows(report, "adversarial", label, case, _ours(case), check=True, method="hsa", kind=kind)


def _selection(report: Report) -> None:
    length, top_k, dim = 131072, 64, 128
    g = torch.Generator(device="cuda").manual_seed(0)
    q, lm = (torch.randn(1, n, 1, dim, device="cuda", generator=g).bfloat16() for n in (length, length // 64))
    q.requires_grad_(), lm.requires_grad_()
    ids, scores = select_chunks(q, lm, top_k=top_k)
    # Exactness on the last block: the oracle's own scores of both choices, sorted, must agree.
    first = length - 2048
    want_ids, want = reference.select_chunks(q[:, first:], lm, top_k=top_k, query_offset=first)
    error = cases.relative(scores[:, first:].sort(-1)[0], want.sort(-1)[0])
    same = (ids[:, first:] == want_ids).float().mean().item()
    facts: dict[str, Any] = {"length": length, "same_ids": same}
    with torch.no_grad():
        report.add(
            "selection", "exact top-64, one group", lambda: select_chunks(q, lm, top_k=top_k), error=error,
            tolerance=1e-5, method="hsa", **facts,
        )  # fmt: skip
        report.add(
            "selection", "torch matmul + topk (no causal mask)", lambda: (q[0, :, 0] @ lm[0, :, 0].T).topk(top_k)
        )
    cotangent = torch.randn_like(scores)

    def both() -> object:
        return torch.autograd.grad(select_chunks(q, lm, top_k=top_k)[1], (q, lm), cotangent)

    report.add("selection", "exact top-64 with gradients", both, error=error, tolerance=1e-5, method="hsa", **facts)


def _million(report: Report) -> None:
    length = 1 << 20
    case = make_case(length, 16, 1, kind="overlap")
    run, inputs = _ours(case), case.inputs()
    attention.forget_overlap()
    _settle(case, run, inputs)
    error = cases.attention_error(case, run, backward=True)
    torch.cuda.empty_cache()

    def both() -> object:
        return torch.autograd.grad(run(*inputs), inputs, case.cotangent)

    # Outputs and gradients that the call returns or holds: o, dq, dk, dv, dw.
    results = sum(x.numel() * x.element_size() for x in (case.q, *inputs)) / 2**30
    report.add(
        "million", "hsa 1M forward+backward", both, error=error, flops=case.flops(7), repeats=3, method="hsa",
        length=length, results_gib=results,
    )  # fmt: skip


def _decode(report: Report) -> None:
    chunks, heads, dim = 1 << 18, 16, 128
    g = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=g, dtype=torch.bfloat16)

    q, q_select, lm = normal(1, heads, dim), normal(1, 1, dim), normal(1, chunks, 1, dim)
    k, v = normal(1, chunks * 64, 1, dim), normal(1, chunks * 64, 1, dim)
    visible = torch.tensor([chunks], dtype=torch.int32, device="cuda")
    args = (q, k, v, q_select, lm, visible)
    error = cases.relative(hsa_decode(*args, top_k=64), hsa_decode(*args, top_k=64, backend="reference"))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        hsa_decode(*args, top_k=64)
    report.add("decode", "16M tokens, one KV head, CUDA graph", graph.replay, error=error, repeats=50, method="hsa")
    flat = lm[0, :, 0]
    report.add("decode", "torch scores + topk only", lambda: (flat @ q_select[0, 0]).topk(64), repeats=50)
    bytes_ms = flat.numel() * 2 / 3.0e9
    print(f"{'decode':12s} reading the landmarks once at 3.0 TB/s: {bytes_ms:.3f} ms")


def _plot(report: Report, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, what in zip(axes, ("forward", "forward+backward"), strict=True):
        for method, label in (("hsa", "HSA, K 64"), ("authors", "authors' kernel"), ("cudnn", "cuDNN causal"),
                              ("window", "window 4096")):  # fmt: skip
            rows = [r for r in report.rows if r["section"] in ("curve", "window") and r.get("method") == method]
            rows = [r for r in rows if r.get("window", 4096) == 4096]
            rows = sorted((r for r in rows if r["name"].endswith(f" {what}") and "ms" in r), key=lambda r: r["length"])
            if rows:
                axis.plot([r["length"] for r in rows], [r["ms"] for r in rows], marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=what)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: argparse.Namespace) -> int:
    """Run the sections asked for. 0 when every result was right, 1 when one was refused, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("hsa: error: bench kernels needs a CUDA device; none is visible here", file=sys.stderr)
        return 2
    authors = None
    if args.authors_path:
        try:
            authors = cases.load_authors(args.authors_path)
        except FileNotFoundError as problem:
            print(f"hsa: error: {problem}", file=sys.stderr)
            return 2
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "matmul_tflops": _matmul_ceiling(),
    }
    report = Report(machine, args.json)
    print(f"{machine['device']}, torch {machine['torch']}, bf16 matrix product {report.ceiling:.0f} TFLOP/s")
    sections: dict[str, Callable[[], None]] = {
        "curve": lambda: _curve(report, args.lengths, authors),
        "window": lambda: _window(report, args.lengths),
        "long": lambda: _long(report, authors),
        "ratios": lambda: _ratios(report),
        "adversarial": lambda: _adversarial(report),
        "selection": lambda: _selection(report),
        "million": lambda: _million(report),
        "decode": lambda: _decode(report),
        "full": lambda: _full(report),
    }
    for name in args.only:
        sections[name]()
        torch.cuda.empty_cache()
    if args.plot:
        _plot(report, args.plot)
    refused = [r for r in report.rows if "refused" in r]
    return 1 if refused else 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
