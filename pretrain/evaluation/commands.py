"""``hsa eval``: measure a checkpoint, print a table, leave JSON and pictures in RUN/eval; or join such results."""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.wordings import VALUES
from pretrain.errors import RecipeError, RunDirError
from pretrain.evaluation import join, lm_eval_adapter
from pretrain.evaluation.units import format_length, parse_lengths

EXAMPLES = {
    "niah": "hsa eval niah runs/demo --lengths 1x,4x,16x,64x --depths 5 --samples 20\n"
    "  hsa eval niah runs/h100-16m --lengths 4k,1m,16m --haystacks 4 --values number,word,uuid --templates eval\n"
    "  hsa eval niah runs/demo --lengths 1x --distance 8w --samples 100",
    "ruler": "hsa eval ruler runs/demo --lengths 4k,64k --tasks niah_multiquery,variable_tracking",
    "ppl": "hsa eval ppl runs/demo --lengths 1x,4x data.held_out=novel.txt\n"
    "  hsa eval ppl runs/demo --lengths 1x,4x,16x --last 64 --samples 50 data.held_out=novel.txt",
    "lm-eval": "hsa eval lm-eval runs/demo --tasks lambada_openai --limit 100",
}
_HELP = {
    "niah": "Needle in a haystack: one fact in held-out text, by depth and length.",
    "ruler": "RULER's tasks by length: needles, variables, word counts, questions about documents; and copy.",
    "ppl": "Perplexity of held-out text by position, beside a unigram model.",
}
_LM_EVAL = "Tasks of lm-evaluation-harness, by its own code (extra lm-eval)."
_DEFAULT_LENGTHS = {"niah": "1x,4x,16x,64x", "ruler": "1x,4x,16x", "ppl": "1x,4x"}
_LENGTH_HELP = "comma-separated tokens: 4096, 4k, 16m (binary), 4x (training contexts)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the evaluations to the parser of ``hsa eval``."""
    kinds = parser.add_subparsers(dest="evaluation", required=True, metavar="{niah,ruler,ppl,lm-eval,join}")
    harness = kinds.add_parser("lm-eval", help=_LM_EVAL, description=_LM_EVAL, epilog=f"example: {EXAMPLES['lm-eval']}")
    add_model_arguments(harness)
    lm_eval_adapter.add_arguments(harness)
    several = kinds.add_parser("join", help=join.HELP, description=join.HELP, epilog=f"example: {join.EXAMPLE}")
    join.add_arguments(several)
    for kind, help_ in _HELP.items():
        one = kinds.add_parser(
            kind,
            help=help_,
            description=help_,
            epilog=f"example:\n  {EXAMPLES[kind]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_model_arguments(one, haystacks=kind != "ppl")
        default = _DEFAULT_LENGTHS[kind]
        one.add_argument("--lengths", default=default, metavar="L,L", help=f"{_LENGTH_HELP} (default {default})")
        one.add_argument("--batch", type=int, default=16, metavar="N", help="samples at a time, at most (default 16)")
        one.add_argument("--out", metavar="DIR", help="folder for JSON and pictures (default: RUN/eval)")
        one.add_argument("--name", default=kind, help=f"name of the files in it (default {kind})")
        one.add_argument("--json", metavar="FILE", help="write the JSON here instead")
        if kind == "ppl":
            one.add_argument("--samples", type=int, metavar="N", help="sequences per length (default: all that fit)")
            one.add_argument(
                "--last",
                type=int,
                metavar="N",
                help="score only the last N tokens of sequences that end at the same places: the same tokens behind "
                "every length",
            )
            continue
        one.add_argument("--samples", type=int, default=20, metavar="N", help="questions per cell (default 20)")
        one.add_argument("--seed", type=int, default=0, help="another seed asks other questions (default 0)")
        one.add_argument(
            "--templates",
            choices=("train", "eval"),
            default="train",
            help="wording of needles and questions: as in training, or one never trained on (default train)",
        )
        if kind == "niah":
            one.add_argument(
                "--values",
                default="number",
                metavar="V,V",
                help=f"what needles hold: {', '.join(VALUES)} (default number)",
            )
            one.add_argument("--depths", type=int, default=5, metavar="N", help="even steps from 0 to 1 (default 5)")
            one.add_argument(
                "--distance",
                metavar="D,D",
                help="instead of depths: tokens between needle and question, such as 512 or 8w (sliding windows)",
            )
        else:
            one.add_argument("--tasks", metavar="T,T", help="comma-separated (default: all)")
            one.add_argument("--qa", metavar="FILE", help="documents and questions for the task qa: JSON as SQuAD's")


def add_model_arguments(parser: argparse.ArgumentParser, *, haystacks: bool = False) -> None:
    """Which model, where and how it reads a prompt: shared by ``hsa eval`` and ``hsa generate``.

    haystacks: with ``--haystacks``, by which a text is read once and can be asked in several ways.
    """
    several = "; with --haystacks several to compare: {}" if haystacks else ""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory (its latest) or one step directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values to change")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: CUDA where it is")
    parser.add_argument(
        "--top-k",
        metavar="K",
        help="chunks per token, or full (default: the last stage's)" + several.format("4,16,64"),
    )
    if haystacks:
        parser.add_argument(
            "--haystacks",
            type=int,
            metavar="N",
            help="read N texts per length and ask all questions of them, each an edit (default: a text per question)",
        )
    parser.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="N",
        help="the N best chunks of a token bring the chunks beside them, for sentences across an edge (default 0)",
    )
    parser.add_argument(
        "--retrieval-temperature",
        metavar="T",
        help="divide the scores of chunks by it before their softmax: below 1 the best one weighs more, which long "
        "texts want (default 1)" + several.format("1,0.5"),
    )
    parser.add_argument(
        "--distance-decay",
        metavar="D",
        help="scores of chunks n tokens back, beyond the training context C, fall by D ln(n / C): reading a long text "
        "gains, single facts far back lose (default 0)" + several.format("0,0.25"),
    )
    parser.add_argument(
        "--full-prefill",
        action="store_true",
        help="run the upper decoder over the whole prompt (slower, for comparison; the result is the same)",
    )
    parser.add_argument(
        "--memory",
        choices=("device", "host"),
        default="device",
        help="where the keys and values of the context memory lie; host: chosen chunks are fetched (default device)",
    )
    parser.add_argument(
        "--memory-fp8", action="store_true", help="keep them as 8-bit floats: half the bytes, about 1%% error"
    )


@dataclass
class Loaded:
    """A model ready to be asked, and what a report says about it."""

    model: Any  # pretrain.model_io.LoadedModel
    engine: Any
    context: int | None  # longest training context so far, tokens
    window: int | None  # sliding window of the checkpoint's stage, tokens
    run_dir: Path | None
    settings: dict[str, Any]  # what was asked of the engine
    ways: list[dict[str, Any]] = field(default_factory=lambda: [{}])  # more than one only of shared texts
    all_chunks: bool = False  # nothing else was asked for, and tokens of the checkpoint's stage read every chunk

    @property
    def title(self) -> str:
        """Name, step and stage, for titles."""
        return f"{self.model.recipe.name} · step {self.model.step:,} ({_stage_name(self.model.stage)})"

    def to_json(self) -> dict[str, Any]:
        """The head of a result file."""
        return {
            "name": self.model.recipe.name,
            "step": self.model.step,
            "stage": _stage_name(self.model.stage),
            "run_dir": str(self.run_dir) if self.run_dir else None,
            "training_context": self.context,
            "window": self.window,
            "settings": self.settings,
        }


def load(args: argparse.Namespace) -> Loaded:
    """Load the checkpoint of ``args`` and make its engine.

    Raises RunDirError when there is no such checkpoint, RecipeError for a bad option, and what loading raises.
    """
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_dir():
        what = "is a file" if checkpoint.exists() else "does not exist"
        raise RunDirError(f"no checkpoint: {checkpoint} {what}; give a run directory or one of its step directories")
    options: dict[str, Any] = {}
    several: dict[str, list[Any]] = {}
    if args.top_k is not None:
        several["top_k"] = _top_ks(args.top_k)
    if args.retrieval_temperature is not None:
        several["retrieval_temperature"] = _numbers("--retrieval-temperature", args.retrieval_temperature, above=True)
    if args.distance_decay is not None:
        several["distance_decay"] = _numbers("--distance-decay", args.distance_decay, above=False)
    for name, values in several.items():
        if len(values) > 1 and not getattr(args, "haystacks", None):
            shared = "add --haystacks, or give one" if hasattr(args, "haystacks") else "give one here"
            raise RecipeError(f"--{name.replace('_', '-')}: several are asked of texts that questions share: {shared}")
        options[name] = values[0]
    ways = [dict(zip(several, way, strict=True)) for way in itertools.product(*several.values())]
    if args.neighbours < 0:
        raise RecipeError(f"--neighbours is {args.neighbours}: it must be 0 (none) or larger")
    if args.neighbours:
        options["neighbours"] = args.neighbours
    if args.full_prefill:
        options["full_prefill"] = True
    if args.memory != "device" or args.memory_fp8:
        from pretrain.context_store import Placement

        options["memory"] = Placement(host=args.memory == "host", fp8=args.memory_fp8)
    from pretrain.model_io import load_for_inference

    loaded = load_for_inference(checkpoint, device=args.device, overrides=tuple(args.overrides))
    if not loaded.recipe.model.ablations.hsa:
        _refuse_memory_options(args)
    asked = {**options, **{name: values for name, values in several.items() if len(values) > 1}}
    if "memory" in options:
        asked["memory"] = asdict(options["memory"])
    stages = list(loaded.recipe.stages)
    names = [stage.name for stage in stages]
    stage = _stage_name(loaded.stage)
    done = stages[: names.index(stage) + 1] if stage in names else stages
    context = max((int(stage.context) for stage in done), default=None)
    if args.distance_decay is not None:
        options["decay_from"] = context
    return Loaded(
        model=loaded,
        engine=loaded.engine_factory(**options),
        context=context,
        window=int(done[-1].window) if done else None,
        run_dir=run_dir_of(checkpoint),
        ways=ways,
        all_chunks=args.top_k is None and loaded.recipe.model.ablations.hsa and bool(done) and done[-1].top_k is None,
        settings=asked,
    )


def _refuse_memory_options(args: argparse.Namespace) -> None:
    """RecipeError for an option about the context memory, which a model without HSA does not have."""
    for name, unset in (
        ("haystacks", None),
        ("top_k", None),
        ("neighbours", 0),
        ("retrieval_temperature", None),
        ("distance_decay", None),
        ("memory", "device"),
        ("memory_fp8", False),
    ):
        if getattr(args, name, unset) != unset:
            raise RecipeError(
                f"--{name.replace('_', '-')}: {args.checkpoint} was trained with model.ablations.hsa: false and has no "
                "context memory: leave it out"
            )


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint path is, or lies in; None for a step directory on its own."""
    path = checkpoint.resolve()
    if (path / "checkpoints").is_dir():
        return path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _stage_name(stage: Any) -> str:
    return str(getattr(stage, "name", stage))


def _top_ks(text: str) -> list[int | None]:
    found: list[int | None] = []
    for part in text.split(","):
        if part != "full" and (not part.isdigit() or int(part) < 1):
            raise RecipeError(f"--top-k is {text!r}: write a number of chunks of at least 1, or full")
        found.append(None if part == "full" else int(part))
    return list(dict.fromkeys(found))


def _numbers(option: str, text: str, *, above: bool) -> list[float]:
    """Finite numbers, above 0 or also 0."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf or (value == 0 and not above) for value in found):
        least = "a number above 0" if above else "0 or more"
        raise RecipeError(f"{option} is {text!r}: write {least}, such as 0.5")
    return list(dict.fromkeys(found))


def main(args: argparse.Namespace) -> int:
    """Run one evaluation; RecipeError, RunDirError and DataError for what the user can repair."""
    if args.evaluation == "lm-eval":
        return lm_eval_adapter.main(args)
    if args.evaluation == "join":
        return join.main(args)
    for name in ("samples", "batch", "depths", "haystacks", "last"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise RecipeError(f"--{name} is {value}: it must be at least 1")
    for part in (args.lengths, getattr(args, "distance", None)):
        if part:  # a typing mistake is found before the model is loaded
            parse_lengths(part, context=1, window=1)
    if args.evaluation == "ruler":
        from pretrain.evaluation.ruler import parse_tasks

        parse_tasks(args.tasks, documents=args.qa is not None, shared=bool(args.haystacks))
    loaded = load(args)
    folder = Path(args.out) if args.out else (loaded.run_dir or Path.cwd()) / "eval"
    lengths = parse_lengths(args.lengths, context=loaded.context, window=loaded.window)
    _say_what_all_chunks_cost(loaded, max(lengths))
    began = time.perf_counter()
    result, table, draw = _EVALUATIONS[args.evaluation](args, loaded, lengths)

    from pretrain.evaluation.report import log_pictures, save_json

    picture = draw(folder / f"{args.name}.png")
    value = {
        "evaluation": args.evaluation,
        "model": loaded.to_json(),
        "seconds": round(time.perf_counter() - began, 3),
        **result,
    }
    path = save_json(value, Path(args.json) if args.json else folder / f"{args.name}.json")
    print(f"{loaded.title}\n{table}\n{path}\n{picture}", flush=True)
    if loaded.run_dir is not None:
        log_pictures(loaded.run_dir, [picture], _say)
    return 0


def _say_what_all_chunks_cost(loaded: Loaded, longest: int) -> None:
    """Reading every chunk is quick at the training length and quadratic beyond it."""
    if loaded.all_chunks and loaded.context is not None and longest > loaded.context:
        chunks = longest // loaded.model.recipe.model.chunk_size
        _say(
            f"stage {_stage_name(loaded.model.stage)} reads all chunks, {chunks:,} per token at "
            f"{format_length(longest)}: --top-k 32 reads the best 32"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _values(text: str) -> list[str]:
    kinds = list(dict.fromkeys(part for part in text.replace(" ", ",").split(",") if part))
    for kind in kinds or [text]:
        if kind not in VALUES:
            raise RecipeError(f"--values: {kind!r} is none of {', '.join(VALUES)}")
    return kinds


def _edit_options(data: Any, values: str = "number") -> dict[str, Any]:
    """Options of `make_facts` from a recipe's data section."""
    return {**{name: getattr(data.synthetic, name) for name in ("digits", "keys", "queries", "hops")}, "values": values}


def _run_shared(args: argparse.Namespace, loaded: Loaded, hay: Any, asks: list[Any], lengths: list[int]) -> Any:
    from pretrain.evaluation.shared import run_shared
    from pretrain.shared_prompt import SharedPrompt

    return run_shared(
        SharedPrompt(loaded.engine),
        loaded.model.tokenizer,
        hay,
        asks,
        lengths=lengths,
        haystacks=args.haystacks,
        seed=args.seed,
        templates=args.templates,
        batch=args.batch,
        ways=loaded.ways,
        progress=_say,
    )


def task_options(data: Any) -> dict[str, float]:
    """How synthetic samples of a recipe's data section look: the options of `build_sample`."""
    return {name: getattr(data.synthetic, name) for name in ("digits", "keys", "queries", "hops", "copy_random")}


_Outcome = tuple[dict[str, Any], str, Callable[[Path], Path]]  # JSON, table, function that draws the picture


def _niah(args: argparse.Namespace, loaded: Loaded, lengths: list[int]) -> _Outcome:
    from pretrain.evaluation import plots, report
    from pretrain.evaluation.haystack import Haystack
    from pretrain.evaluation.heldout import load_held_out
    from pretrain.evaluation.niah import run_niah
    from pretrain.evaluation.retrieval import depth_grid
    from pretrain.evaluation.shared import Ask, together

    data = loaded.model.recipe.data
    kinds = _values(args.values)
    hay = Haystack(load_held_out(data.held_out, loaded.model.tokenizer))
    if args.haystacks:
        if args.distance:
            raise RecipeError("--distance needs a text of its own for every question: leave out --haystacks")
        asks = [
            Ask(f"niah_single.{kind}", "niah_single", args.samples, depth_grid(args.depths), _edit_options(data, kind))
            for kind in kinds
        ]
        found = _run_shared(args, loaded, hay, asks, lengths)
        results, first = list(found.values()), list(found.values())[:: len(found) // len(kinds)]
        kinds = [label.removeprefix("niah_single.") for label in found]
    else:
        results = [
            run_niah(
                loaded.engine,
                loaded.model.tokenizer,
                hay,
                lengths=lengths,
                depths=args.depths,
                distances=parse_lengths(args.distance, context=loaded.context, window=loaded.window)
                if args.distance
                else (),
                samples=args.samples,
                seed=args.seed,
                templates=args.templates,
                options={**task_options(data), "values": kind},
                batch=args.batch,
                progress=_say,
            )
            for kind in kinds
        ]
        first = results
    result = together(first, "niah_single")  # of several settings the first one
    if len(kinds) > 1:
        value = {**result.to_json(), "values": {kind: r.to_json() for kind, r in zip(kinds, results, strict=True)}}
        table = "\n\n".join(f"{kind}\n{report.niah_table(r)}" for kind, r in zip(kinds, results, strict=True))
        return (
            value,
            table,
            lambda path: plots.needle_map(result, path, model=loaded.title, training_context=loaded.context),
        )
    return (
        result.to_json(),
        report.niah_table(result),
        lambda path: plots.needle_map(result, path, model=loaded.title, training_context=loaded.context),
    )


def _ruler(args: argparse.Namespace, loaded: Loaded, lengths: list[int]) -> _Outcome:
    from pretrain.evaluation import plots, report
    from pretrain.evaluation.haystack import Haystack
    from pretrain.evaluation.heldout import load_held_out
    from pretrain.evaluation.ruler import TASK_OPTIONS, RulerResult, parse_tasks, run_ruler
    from pretrain.evaluation.ruler_tasks import load_documents
    from pretrain.evaluation.shared import Ask

    data = loaded.model.recipe.data
    hay = Haystack(load_held_out(data.held_out, loaded.model.tokenizer))
    tasks = parse_tasks(args.tasks, documents=args.qa is not None, shared=bool(args.haystacks))
    if args.haystacks:
        options = _edit_options(data)
        asks = [Ask(t, t, args.samples, options={**options, **TASK_OPTIONS.get(t, {})}) for t in tasks]
        result = RulerResult(_run_shared(args, loaded, hay, asks, lengths))
    else:
        result = run_ruler(
            loaded.engine,
            loaded.model.tokenizer,
            hay,
            tasks=tasks,
            lengths=lengths,
            samples=args.samples,
            seed=args.seed,
            templates=args.templates,
            options={**task_options(data), "documents": load_documents(args.qa) if args.qa else None},
            batch=args.batch,
            progress=_say,
        )
    return (
        result.to_json(),
        report.ruler_table(result),
        lambda path: plots.accuracy_by_length(result.tasks, path, model=loaded.title, training_context=loaded.context),
    )


def _ppl(args: argparse.Namespace, loaded: Loaded, lengths: list[int]) -> _Outcome:
    from pretrain.evaluation import plots, report
    from pretrain.evaluation.heldout import load_held_out, unigram_counts
    from pretrain.evaluation.ppl import run_ppl

    data, tokenizer = loaded.model.recipe.data, loaded.model.tokenizer
    text = load_held_out(data.held_out, tokenizer)
    try:
        counts = unigram_counts(data.mix, tokenizer.vocab_size)
    except (ValueError, OSError) as error:  # the checkpoint may have travelled without its training data
        _say(f"warning: no unigram baseline, the training shards cannot be read: {error}")
        counts = None
    result = run_ppl(
        loaded.engine,
        tokenizer,
        text,
        contexts=lengths,
        sequences=args.samples,
        last=args.last,
        reference=loaded.context,
        unigram_counts=counts,
        batch=args.batch,
        progress=_say,
    )
    draw = plots.perplexity_by_position if args.last is None else plots.perplexity_by_context
    return (
        result.to_json(),
        report.ppl_table(result),
        lambda path: draw(result, path, model=loaded.title, training_context=loaded.context),
    )


_EVALUATIONS = {"niah": _niah, "ruler": _ruler, "ppl": _ppl}
