"""``hsa generate``: continue a prompt of any length; the continuation on stdout and nothing else there."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.context_file import load_context, save_context
from pretrain.errors import RecipeError
from pretrain.evaluation.commands import add_model_arguments, load
from pretrain.evaluation.decoding import Sampling, StopText, TextStream, continue_tokens
from pretrain.evaluation.streams import only_writer_to_stdout
from pretrain.evaluation.units import format_length

EXAMPLE = """example:
  echo "It is a truth universally acknowledged, that" | hsa generate runs/demo --prompt-file - --max-new-tokens 64
  hsa generate runs/demo --prompt-file book.txt --temperature 0.8 --top-p 0.95 --seed 1
  hsa generate runs/demo --prompt-file library.txt --max-new-tokens 0 --context-out library.context
  hsa generate runs/demo --context-in library.context --prompt-file question.txt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hsa generate``."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="UTF-8 text; - reads standard input; optional with --context-in"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--context-in", metavar="DIR", help="go on with a saved context; the prompt comes behind it")
    parser.add_argument("--context-out", metavar="DIR", help="save everything read and generated, to go on later")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0, or 1 with a sampling option)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this share")
    parser.add_argument("--top-k-sampling", type=int, metavar="N", help="sample from the N likeliest tokens")
    parser.add_argument(
        "--min-p", type=float, help="sample from tokens at least this likely, relative to the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 makes repetition rarer (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")


def main(args: argparse.Namespace) -> int:
    """Print the continuation as it is made, up to an end token, a stop text or ``--max-new-tokens``."""
    sampling = sampling_of(args)
    least = 0 if args.context_out else 1
    if args.max_new_tokens < least:
        raise RecipeError(f"--max-new-tokens is {args.max_new_tokens}: it must be at least {least}")
    if args.prompt_file is None and args.context_in is None:
        raise RecipeError("nothing to continue: give --prompt-file, or --context-in with a saved context")
    prompt = "" if args.prompt_file is None else read_prompt(args.prompt_file)
    with only_writer_to_stdout() as out:
        loaded = load(args)
        tokenizer, engine = loaded.model.tokenizer, loaded.engine
        ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
        if ids.shape[1] == 0 and args.prompt_file is not None:
            raise RecipeError(f"the prompt in {args.prompt_file} has no tokens: give some text")
        context = f", training context {format_length(loaded.context)}" if loaded.context else ""
        print(f"{loaded.title}: prompt of {ids.shape[1]} tokens{context}", file=sys.stderr, flush=True)
        before: list[Any] = []
        if args.context_in is not None:
            logits, known = load_context(engine, args.context_in, tokenizer_fingerprint=tokenizer.fingerprint)
            before = known.tolist()
            print(f"after a saved context of {engine.positions[0]} tokens", file=sys.stderr, flush=True)
        else:
            engine.reset()
        if ids.shape[1]:
            logits = engine.prefill(ids)
        seen = torch.unique(torch.cat((ids[0], torch.tensor(before, dtype=torch.int64))))
        stream, stop = TextStream(tokenizer), StopText(args.stop)
        steps = continue_tokens(
            engine,
            logits,
            seen[None],
            max_new_tokens=args.max_new_tokens,
            vocab_size=tokenizer.vocab_size,
            sampling=sampling,
        )
        generated: list[int] = []
        for token in steps:
            generated.append(int(token[0]))
            if generated[-1] == tokenizer.eos_id:
                break
            out.write(stop.push(stream.push(generated[-1])))
            out.flush()
            if stop.stopped:
                break
        out.write(stop.push(stream.finish()) + stop.finish())
        out.flush()
        if args.context_out is not None:
            if generated:  # the last token was shown but not read yet
                logits = engine.decode(torch.tensor(generated[-1:]))
            save_context(
                engine,
                args.context_out,
                tokenizer_fingerprint=tokenizer.fingerprint,
                logits=logits,
                seen=torch.unique(torch.cat((seen, torch.tensor(generated, dtype=torch.int64)))),
            )
            print(f"{args.context_out}: {engine.positions[0]} tokens", file=sys.stderr, flush=True)
        if out.isatty():
            print(file=sys.stderr)
    return 0


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Greedy unless sampling is asked for; a top-p, top-k or min-p alone means temperature 1."""
    asked = any(value is not None for value in (args.top_p, args.top_k_sampling, args.min_p))
    return Sampling(
        temperature=args.temperature if args.temperature is not None else float(asked),
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k_sampling or 0,
        min_p=args.min_p or 0.0,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def read_prompt(path: str) -> str:
    """The text of a file, or of standard input for ``-``; RecipeError when it cannot be read or is empty."""
    name = "standard input" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"--prompt-file: cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"--prompt-file: {name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise RecipeError(f"--prompt-file: the prompt in {name} is empty: give some text")
    return text
