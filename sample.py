"""How does a trained model tell a story?

    python sample.py out/tiny_8l                                    # one story, as it is written
    python sample.py out/tiny_8l --prompt "Once upon a time" -n 3 --temperature 0.8
    python sample.py out/tiny_8l --prompt -                         # you begin, it goes on
    python sample.py out/tiny_1l out/tiny_8l --prompt "Tom was sad"     # a table in Markdown
    python sample.py out/instruct_8l --words "quit, oak, gloomy" --features Dialogue,BadEnding
    python sample.py roneneldan/TinyStories-33M                     # what the paper's authors made
"""

import argparse
import codecs
import sys
from pathlib import Path

import torch

import prepare
from model import GPT, GPTConfig, best_device, best_dtype, keep_memory, read_checkpoint

FEATURES = ("Dialogue", "BadEnding", "MoralValue", "Twist", "Foreshadowing", "Conflict")


def find_run(path):
    """What a user calls a run -> its checkpoint file. It is a run's folder, or a checkpoint, or a
    released model: its name on the hub (roneneldan/...) or a folder with its config.json, which
    becomes a run's folder here."""
    path = Path(path)
    on_hub = path.parent.as_posix() == "roneneldan" and not path.exists()
    folder = Path("out", path.name) if on_hub else path
    file = path if path.is_file() else folder / "ckpt.pt"
    if not file.exists() and (on_hub or (folder / "config.json").is_file()):
        from study.released import adopt
        adopt(path.as_posix(), folder)
    if not file.is_file():
        runs = ", ".join(run.parent.as_posix() for run in sorted(Path("out").glob("*/ckpt.pt")))
        raise SystemExit(f"There is no trained model at {path}. " + (
            f"There is: {runs}" if runs else "Make one: python train.py config/demo.py"))
    return file


def load_run(path, device="auto", dtype=None):
    """A run, as `find_run` knows it -> its GPT and its tokenizer. dtype: of the weights; None: what
    the device multiplies fastest."""
    file = find_run(path)
    keep_memory()
    device = best_device() if device == "auto" else device
    if torch.device(device).type not in ("cpu", best_device()):
        print(f"torch sees no {device.upper()} device; leave --device away", file=sys.stderr)
        raise SystemExit(2)
    try:
        checkpoint = read_checkpoint(file, device)
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError("some of its weights are not finite: the training has failed")
        model.to(device, dtype or best_dtype(torch.device(device).type))
        tokenizer = prepare.load_tokenizer(file.parent)
    except Exception as error:              # a damaged file can raise nearly anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise SystemExit(f"{file} cannot be read: {why}")
    return model.eval(), tokenizer


def encode_prompt(tokenizer, prompt, block_size):
    """A story begins after the end mark of the one before it; so does a prompt."""
    ids = [tokenizer.eot_token] + tokenizer.encode_ordinary(prompt)
    if len(ids) > block_size:
        print(f"The prompt has {len(ids)} tokens; the model, whose context is {block_size}, reads "
              f"the last {block_size // 2}.", file=sys.stderr)
    return ids


def write(model, tokenizer, prompt, **how):
    """Print one story as it is written. A character may need several tokens: it waits for all."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(prompt, end="", flush=True)
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    for [token] in model.stream([ids], stop=tokenizer.eot_token, **how):
        if token != tokenizer.eot_token:
            piece = tokenizer.decode_single_token_bytes(token)
            print(decoder.decode(piece), end="", flush=True)
    print(decoder.decode(b"", final=True))


def tell(model, tokenizer, prompts, **how):
    """The continuation of each prompt, all written at once -> list of str."""
    ids = [encode_prompt(tokenizer, prompt, model.config.block_size) for prompt in prompts]
    return [tokenizer.decode(row) for row in model.generate(ids, stop=tokenizer.eot_token, **how)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, checkpoint files, or "
                        "models of the hub (roneneldan/TinyStories-33M)")
    parser.add_argument("--prompt", action="append", help="how the story begins; "
                        "-: ask me; more than one can be given (default: the model begins)")
    parser.add_argument("--words", help="of a model that has learned from instructions: words that "
                        "the story must hold")
    parser.add_argument("--features", help="what it must have, of " + ", ".join(FEATURES))
    parser.add_argument("--summary", help="what happens in it")
    parser.add_argument("--sentence", help="a sentence that must stand in it")
    parser.add_argument("-n", "--num_samples", type=int, default=1, help="stories for each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: the likeliest token; 1: as the model has learned; default 0.8")
    parser.add_argument("--top_k", type=int, default=0,
                        help="draw from the k likeliest tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the likeliest tokens that add up to p; 1: all")
    parser.add_argument("--seed", type=int, default=0, help="the same command with the same seed "
                        "tells the same stories")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    features, words = ([part.strip() for part in (text or "").split(",") if part.strip()]
                       for text in (args.features, args.words))
    asked = {"Features": ", ".join(features), "Words": ", ".join(words), "Summary": args.summary,
             "Random sentence": args.sentence}
    asked = {field: text for field, text in asked.items() if text}
    prompts = args.prompt or [prepare.instructions(asked) if asked else ""]
    if args.prompt and asked:
        parser.error("a story begins with a --prompt or with instructions, not with both")
    if unknown := {*features} - {*FEATURES}:
        parser.error(f"--features does not know {unknown.pop()}; it knows {', '.join(FEATURES)}")
    if args.num_samples < 1 or args.max_new_tokens < 1:
        parser.error("-n and --max_new_tokens must be 1 or more")
    if not args.temperature >= 0 or args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature and --top_k must not be negative; --top_p lies in (0, 1]")
    if not 0 <= args.seed < 1e9:
        parser.error("--seed must not be negative, nor beyond a billion")
    if "-" in prompts and (len(args.runs) > 1 or len(prompts) > 1):
        parser.error("--prompt - talks with one model, and needs no other prompt")
    prepare.command(answer, args, prompts)


def answer(args, prompts):
    """Let the runs tell what was asked for."""
    how = {name: getattr(args, name) for name in
           ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    loaded = [load_run(run, args.device) for run in args.runs]
    rows = [prompt for prompt in prompts for _ in range(args.num_samples)]
    if len(loaded) > 1:
        columns = [tell(*one, rows, **how) for one in loaded]
        head = ["prompt", *args.runs]
        for cells in [head, ["---"] * len(head), *zip(rows, *columns)]:
            lines = ("<br>".join(cell.strip().splitlines()) for cell in cells)
            print("| " + " | ".join(line.replace("|", "\\|") for line in lines) + " |")
    elif prompts == ["-"]:
        print("Begin a story, and the model goes on. An empty line ends.", file=sys.stderr)
        while line := ask():
            write(*loaded[0], line, **how)
            how["seed"] += 1
    elif len(rows) == 1:
        write(*loaded[0], prompts[0], **how)
    else:
        for prompt, story in zip(rows, tell(*loaded[0], rows, **how)):
            print(prompt + story + "\n" + "-" * 40)


def ask():
    """A line from the terminal, or of a file; "" at its end."""
    return input("> ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")


if __name__ == "__main__":
    main()
