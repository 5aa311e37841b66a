"""How does a trained model write a story?

    python sample.py out/demo                # one story, token by token
    python sample.py out/demo --prompt "Once upon a time" -n 3 --temperature 0.5
    python sample.py out/demo --prompt -     # you begin, the model continues
    python sample.py out/tiny_1l out/tiny_8l --prompt "Tom was sad" # side by side, as Markdown
    python sample.py out/demo --without 1.0  # without layer 1's head 0
    python sample.py out/demo_instruct --words "find, boat, red" --features Dialogue,BadEnding
"""

import argparse
import codecs
import itertools
import re
import sys
from pathlib import Path

import prepare
from data import common
from data.grammar import FIELDS, format_instructions
from data.text import shorten_spaces
from model import best_dtype, find_device, load_model, tune_malloc

# -------------------- loading a run

def find_run(path):
    """A run's folder or a checkpoint file -> the checkpoint file."""
    path = Path(path)
    file = path if path.is_file() else path / "ckpt.pt"
    if not file.is_file():
        raise SystemExit(f"{path} has no trained model. Use data/demo_model, train one (python "
                         "train.py config/demo.py) or import one (python -m study.hf)")
    return file


def load_run(path, device="auto", dtype=None, without=()):
    """Load a trained run -> model, tokenizer, meta (its meta.json).

    dtype: of the weights; None means the fastest on this device. without: (layer, head) pairs of
    attention heads to switch off."""
    path, device = find_run(path), find_device(device)
    tune_malloc()
    model, _ = load_model(path)
    for layer, head in without:
        if layer >= model.config.n_layer or head >= model.config.n_head:
            raise SystemExit(f"--without {layer}.{head}: this model has {model.config.n_layer} "
                             f"layers of {model.config.n_head} heads, counted from 0")
        model.remove_head(layer, head)
    model.to(device, dtype or best_dtype(device))
    tokenizer = prepare.load_tokenizer(path.parent)
    if tokenizer.n_vocab != model.config.vocab_size:
        raise SystemExit(f"{path.parent}: model and tokenizer belong to different runs")
    return model.eval(), tokenizer, prepare.read_meta(path.parent)


def results_folder(path):
    """Where the scripts write results about a run: next to the checkpoint, or in out/ for
    data/demo_model."""
    folder = find_run(path).parent.resolve()
    if folder.parent == prepare.HERE / "data":
        folder = Path("out", folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -------------------- writing stories

def encode_prompt(tokenizer, prompt, block_size):
    """The ids of the prompt after an end token: in training, each story follows one. A space at the
    end is dropped: it is part of the next token."""
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(shorten_spaces(prompt.rstrip(" ")))]
    if len(ids) > block_size:
        print(f"The prompt has {len(ids)} tokens; the model's context is {block_size}, so it reads "
              f"the last {block_size // 2}.", file=sys.stderr)
    return ids


def stream_text(model, tokenizer, prompt, max_new_tokens=400, temperature=0.8, top_k=0, top_p=1.0,
                seed=0):
    """Yield the continuation of one prompt, piece by piece. A character may need several tokens;
    it is yielded when it is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    stop = tokenizer.eot_token
    for [token] in model.stream([ids], max_new_tokens, temperature, top_k, top_p, stop, seed):
        if token != stop:
            yield decoder.decode(tokenizer.decode_single_token_bytes(token))
    yield decoder.decode(b"", final=True)


def generate_texts(model, tokenizer, prompts, max_new_tokens=400, temperature=0.8, top_k=0,
                   top_p=1.0, seed=0):
    """The continuations of many prompts, generated together -> list of str."""
    ids = [encode_prompt(tokenizer, prompt, model.config.block_size) for prompt in prompts]
    stop = tokenizer.eot_token
    rows = model.generate(ids, max_new_tokens, temperature, top_k, top_p, stop, seed)
    return [tokenizer.decode(row) for row in rows]


def print_stream(prompt, pieces):
    for piece in itertools.chain([prompt.rstrip(" ")], pieces):
        print(common.printable(piece), end="", flush=True)
    print()


# -------------------- command line

def layer_and_head(text):
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text}: expected LAYER.HEAD, for example 1.0")
    layer, head = text.split(".")
    return int(layer), int(head)


def add_sampling_options(parser, temperature):
    """The options of all commands that load a run and sample from it."""
    add = parser.add_argument
    add("--temperature", type=float, default=temperature,
        help="0: the most likely token; 1: the model's own distribution; default %(default)s")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--without", action="append", default=[], type=layer_and_head, metavar="LAYER.HEAD",
        help="switch off an attention head (both count from 0); may be repeated")


def parse_args(parser, argv=None):
    """Parse and check the options of `add_sampling_options`."""
    args = parser.parse_args(argv)
    if not args.temperature >= 0:
        parser.error("--temperature must not be negative")
    if not 0 <= args.seed < 1 << 31:
        parser.error("--seed must be between 0 and 2^31")
    return args


def main(argv=None):
    parser = common.command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs, or checkpoint files")
    add("--prompt", action="append", help="how the story begins; may be repeated; -: type it")
    for field in FIELDS:  # --features, --words, --summary, --sentence
        add("--" + field.lower().split()[-1], dest=field, metavar="TEXT",
            help=f"an instruction, for models trained on them: {field}")
    add("-n", "--num_samples", type=int, default=1, help="stories per prompt")
    add("--max_new_tokens", type=int, default=400)
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0: all")
    add("--top_p", type=float, default=1.0, help="sample from the most likely tokens whose "
        "probabilities sum to p; 1: all")
    add_sampling_options(parser, temperature=0.8)
    args = parse_args(parser, argv)
    if args.num_samples < 1 or not 0 < args.max_new_tokens < 1_000_000:
        parser.error("-n and --max_new_tokens must be at least 1 and below a million")
    if args.top_k < 0 or not 0 < args.top_p <= 1:
        parser.error("--top_k must not be negative, and --top_p must be in (0, 1]")
    instructions = {field: vars(args)[field] for field in FIELDS if vars(args)[field]}
    if instructions and args.prompt:
        parser.error("give either --prompt or instructions, not both")
    prompts = args.prompt or [format_instructions(instructions) if instructions else ""]
    if "-" in prompts and len(args.runs) * len(prompts) * args.num_samples > 1:
        parser.error("--prompt - works with one model, prompt and sample")

    sampling = {name: getattr(args, name) for name in
                ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    runs = [load_run(run, args.device, without=args.without) for run in args.runs]
    if instructions and not all(meta.get("instruct") for _, _, meta in runs):
        raise SystemExit("This model was not trained on instructions. Use --prompt, or train "
                         "config/demo_instruct.py")
    rows = [prompt for prompt in prompts for _ in range(args.num_samples)]
    model, tokenizer, _ = runs[0]
    if len(runs) > 1:
        columns = [generate_texts(*run[:2], rows, **sampling) for run in runs]
        print(common.format_table([["prompt", *args.runs], *zip(rows, *columns)]))
    elif prompts == ["-"]:
        print("Begin a story, and the model continues it. An empty line ends.", file=sys.stderr)
        for line in sys.stdin or []:
            if not line.strip():
                break
            line = line.rstrip("\n")
            print_stream(line, stream_text(model, tokenizer, line, **sampling))
            sampling["seed"] += 1
    elif len(rows) == 1:
        print_stream(prompts[0], stream_text(model, tokenizer, prompts[0], **sampling))
    else:
        for prompt, story in zip(rows, generate_texts(model, tokenizer, rows, **sampling)):
            print(common.printable(prompt.rstrip(" ") + story) + "\n" + "-" * 40)


if __name__ == "__main__":
    main()
