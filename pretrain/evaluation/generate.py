"""``hsa generate``: continue a prompt of any length; the continuation on stdout and nothing else there."""

import argparse
import sys
from pathlib import Path

import numpy as np

from pretrain.errors import RecipeError
from pretrain.evaluation.commands import add_model_arguments, load
from pretrain.evaluation.decoding import Sampling, TextStream, generate_tokens
from pretrain.evaluation.streams import only_writer_to_stdout
from pretrain.evaluation.units import format_length

EXAMPLE = """example:
  echo "It is a truth universally acknowledged, that" | hsa generate runs/demo --prompt-file - --max-new-tokens 64
  hsa generate runs/demo --prompt-file book.txt --temperature 0.8 --top-p 0.95 --seed 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``hsa generate``."""
    parser.epilog = EXAMPLE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0, or 1 with a sampling option)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens that hold this share")
    parser.add_argument("--top-k-sampling", type=int, metavar="N", help="sample from the N likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")


def main(args: argparse.Namespace) -> int:
    """Print the continuation as it is made, up to an end token or ``--max-new-tokens``."""
    sampling = sampling_of(args)
    if args.max_new_tokens < 1:
        raise RecipeError(f"--max-new-tokens is {args.max_new_tokens}: it must be at least 1")
    prompt = read_prompt(args.prompt_file)
    with only_writer_to_stdout() as out:
        loaded = load(args)
        tokenizer = loaded.model.tokenizer
        ids = np.array([tokenizer.encode(prompt)], dtype=np.int64)
        if ids.shape[1] == 0:
            raise RecipeError(f"the prompt in {args.prompt_file} has no tokens: give some text")
        context = f", training context {format_length(loaded.context)}" if loaded.context else ""
        print(f"{loaded.title}: prompt of {ids.shape[1]} tokens{context}", file=sys.stderr, flush=True)
        stream = TextStream(tokenizer)
        steps = generate_tokens(
            loaded.engine,
            ids,
            max_new_tokens=args.max_new_tokens,
            vocab_size=tokenizer.vocab_size,
            sampling=sampling,
        )
        for token in steps:
            if int(token[0]) == tokenizer.eos_id:
                break
            out.write(stream.push(int(token[0])))
            out.flush()
        out.write(stream.finish())
        out.flush()
        if out.isatty():
            print(file=sys.stderr)
    return 0


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Greedy unless sampling is asked for; a top-p or top-k alone means temperature 1."""
    asked = args.top_p is not None or args.top_k_sampling is not None
    return Sampling(
        temperature=args.temperature if args.temperature is not None else float(asked),
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k_sampling or 0,
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
