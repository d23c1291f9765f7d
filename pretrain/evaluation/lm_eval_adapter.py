"""lm-evaluation-harness (package lm-eval, extra `lm-eval`) on our checkpoints: `hsa eval lm-eval`, or in Python

    lm_eval.simple_evaluate(model=CheckpointLM(engine, tokenizer), tasks=["lambada_openai"])

Its RULER tasks make their own data and fetch texts from the network; `offline_sources` gives them local files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import RecipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `hsa eval lm-eval` takes beside a checkpoint."""
    parser.add_argument("--tasks", required=True, metavar="T,T", help="the harness's task names, or a task's YAML file")
    parser.add_argument("--limit", type=int, metavar="N", help="samples per task, RULER's per length (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples (default: the task's)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="requests at a time, at most (default 16)")
    parser.add_argument("--lengths", metavar="L,L", help="sequence lengths of the RULER tasks: 4k,32k")
    parser.add_argument("--include-path", metavar="DIR", help="folder with further tasks")
    parser.add_argument("--essays", type=Path, metavar="FILE", help="text for RULER's essay haystacks, no network")
    parser.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD 2.0 JSON for ruler_qa_squad, no network")
    parser.add_argument("--hotpot", type=Path, metavar="FILE", help="HotpotQA JSON for ruler_qa_hotpot, no network")
    parser.add_argument("--out", metavar="DIR", help="folder for the JSON (default: RUN/eval)")
    parser.add_argument("--name", default="lm-eval", help="name of the file in it (default lm-eval)")


def main(args: argparse.Namespace) -> int:
    """Run the harness; RecipeError when it is not installed or does not know a task."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            f"hsa eval lm-eval needs lm-evaluation-harness ({error}): pip install 'hsa-ultralong[lm-eval]'"
        ) from None
    from lm_eval.utils import make_table

    from pretrain.evaluation.commands import load
    from pretrain.evaluation.lm_eval_model import CheckpointLM
    from pretrain.evaluation.lm_eval_ruler import ruler_samples, scores_by_length
    from pretrain.evaluation.report import save_json
    from pretrain.evaluation.streams import only_writer_to_stdout
    from pretrain.evaluation.units import parse_lengths

    loaded = load(args)
    tokenizer = loaded.model.tokenizer
    with only_writer_to_stdout() as out, tempfile.TemporaryDirectory() as folder:
        metadata: dict[str, Any] = {"tokenizer": tokenizer_folder(tokenizer, Path(folder))}
        if args.lengths:
            metadata["max_seq_lengths"] = parse_lengths(args.lengths, context=loaded.context, window=loaded.window)
        sources = offline_sources(args.essays, args.squad, args.hotpot)
        with missing_parts(), sources, ruler_samples(args.limit) as counts:
            manager = TaskManager(include_path=args.include_path, metadata=metadata)
            tasks = [task for task in args.tasks.split(",") if task]
            unknown = [t for t in tasks if t not in manager.all_tasks and not Path(t).is_file()]
            if unknown:
                raise RecipeError(
                    f"lm-evaluation-harness knows no task {', '.join(unknown)}: lm_eval ls tasks lists them"
                )
            results = lm_eval.simple_evaluate(
                model=CheckpointLM(loaded.engine, tokenizer, batch=args.batch),
                tasks=tasks,
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                task_manager=manager,
                metadata=metadata,
                log_samples=False,
                bootstrap_iters=0,
            )
        path = Path(args.out) if args.out else (loaded.run_dir or Path.cwd()) / "eval"
        value = {"evaluation": "lm-eval", "model": loaded.to_json(), "version": lm_eval.__version__}
        value |= {name: results[name] for name in ("results", "n-shot", "n-samples", "versions") if name in results}
        value |= {"lengths": scores_by_length(results["results"], counts)} if counts else {}
        file = save_json(json.loads(json.dumps(value, default=str)), path / f"{args.name}.json")
        print(f"{loaded.title}\n{make_table(results)}\n{file}", file=out, flush=True)
    return 0


@contextlib.contextmanager
def missing_parts() -> Iterator[None]:
    """RecipeError for packages and data that a task imports or reads when it is loaded."""
    try:
        yield
    except ImportError as error:
        what = str(error).splitlines()[0]
        raise RecipeError(f"--tasks: a package is missing ({what}): pip install 'hsa-ultralong[lm-eval]'") from None
    except LookupError as error:
        if "nltk" not in str(error):
            raise
        raise RecipeError(
            "--tasks: NLTK's punkt_tab is missing: python -m nltk.downloader punkt_tab, or name a folder that has "
            "tokenizers/punkt_tab in NLTK_DATA"
        ) from None


def tokenizer_folder(tokenizer: Any, folder: Path) -> str:
    """A folder that transformers' AutoTokenizer loads, for tasks that count tokens themselves."""
    source = Path(tokenizer.path)
    source = source / "tokenizer.json" if source.is_dir() else source
    (folder / "tokenizer.json").write_bytes(source.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    return str(folder)


@contextlib.contextmanager
def offline_sources(essays: Path | None, squad: Path | None, hotpot: Path | None) -> Iterator[None]:
    """RULER's tasks read these files instead of the network inside the block."""
    with contextlib.ExitStack() as stack:
        if essays is not None:
            import datasets

            original = datasets.load_dataset

            def load_dataset(path: str, *args: Any, **kwargs: Any) -> Any:
                if "paul_graham_essays" in path:
                    return {"text": [essays.read_text(encoding="utf-8")]}
                return original(path, *args, **kwargs)

            stack.enter_context(unittest.mock.patch.object(datasets, "load_dataset", load_dataset))
        files = {"SQuAD": squad, "hotpot": hotpot}
        if any(files.values()):
            import requests

            # The harness loads a task's functions from their files, as modules that cannot be imported by name.
            get = requests.get

            def read(url: str, *args: Any, **kwargs: Any) -> Any:
                file = next((f for word, f in files.items() if word in url and f is not None), None)
                if file is None:
                    return get(url, *args, **kwargs)
                response = requests.Response()
                response.status_code, response._content = 200, file.read_bytes()
                return response

            stack.enter_context(unittest.mock.patch.object(requests, "get", read))
        yield
