"""How fast are training and sampling, compared with transformers and with the machine's limit?

    python -m study.bench                           # 3 minutes on two CPU cores
    python -m study.bench --llama2c llama2.c/run    # also the C program of llama2.c
    python -m study.bench --ladder                  # on a GPU: what each optimization is worth
    python -m study.bench --profile                 # which operations take the time

GPT-Neo and GPT-2 are those of transformers (if installed), in the shape of tiny_8l; the machine's
limit is a matrix product with as many FLOPs as our training step. All take turns, because a
machine's speed changes from minute to minute: the tables show medians, and each ratio is the median
of the ratios within a round. The last line is JSON with all ratios.
"""

import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
from data import common
from model import GPT, ChunkedCrossEntropy, GPTConfig, best_dtype, tune_malloc
from study.hf import neo_config
from study.scaling import flops_per_token
from train import Settings, make_optimizers

SHAPE = GPTConfig(vocab_size=10_000, n_layer=8, n_head=4, n_embd=256)
NEW_TOKENS = 200            # per row, in sampling
WORK = {"cpu": (2048, 4_096), "cuda": (8192, 65_536)}   # width of the matrix, tokens of a step

# From a simple training step to that of train.py: each row changes the one before.
LADDER = {
    "float32, AdamW, 50,257 tokens": dict(
        tf32=False, dtype=torch.float32, fused_attention=False, fused_adamw=False,
        chunked_loss=False, optimizer="adamw", micro_batches=4, vocab_size=50_257, n_embd=256),
    "TF32": dict(tf32=True), "bfloat16": dict(dtype=None),
    "fused attention": dict(fused_attention=True), "fused AdamW": dict(fused_adamw=True),
    "10,000 tokens": dict(vocab_size=10_000), "chunked loss": dict(chunked_loss=True),
    "Muon": dict(optimizer="muon"), "torch.compile": dict(compile=True),
    "all rows at once": dict(micro_batches=1), "width 512": dict(n_embd=512),
    "width 768": dict(n_embd=768)}


def make_step(model, loss_fn, optimizers, batches):
    """A training step: forward and backward for each micro-batch, clipping, optimizers."""
    def step():
        for batch in batches:
            (loss_fn(batch) / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step


def our_step(device, T, tokens, tf32=True, dtype=None, fused_attention=True, fused_adamw=True,
             chunked_loss=True, optimizer="muon", compile=False, micro_batches=1,
             vocab_size=SHAPE.vocab_size, n_embd=SHAPE.n_embd):
    """The defaults are what train.py does (it compiles on GPUs)."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    n_head = SHAPE.n_head * n_embd // SHAPE.n_embd
    model = GPT(GPTConfig(vocab_size, T, SHAPE.n_layer, n_head, n_embd)).to(device)
    optimizers = make_optimizers(model, Settings(optimizer=optimizer), torch.device(device))
    if not fused_adamw:
        optimizers = [torch.optim.AdamW(model.parameters(), foreach=False)]
    batch = torch.randint(vocab_size, (tokens // T, T), device=device)
    dtype = dtype or best_dtype(device)

    def loss_fn(x):
        kernel = nullcontext() if fused_attention else sdpa_kernel(SDPBackend.MATH)
        with torch.autocast(device, dtype, dtype != torch.float32), kernel:
            if chunked_loss:
                return model(x, x)[1]
            return F.cross_entropy(model(x)[0].flatten(0, 1), x.flatten())

    loss_fn = torch.compile(loss_fn, dynamic=False) if compile else loss_fn
    return make_step(model, loss_fn, optimizers, batch.chunk(micro_batches))


def their_model(kind, T, device):
    """transformers' model of the same shape."""
    import transformers
    transformers.logging.set_verbosity_error()
    if kind == "GPT-2":
        config = transformers.GPT2Config(
            vocab_size=SHAPE.vocab_size, n_positions=T, n_embd=SHAPE.n_embd, n_layer=SHAPE.n_layer,
            n_head=SHAPE.n_head, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        return transformers.GPT2LMHeadModel(config).to(device)
    config = neo_config(replace(SHAPE, block_size=T, window=256))
    config = transformers.GPTNeoConfig(**config, eos_token_id=0)
    return transformers.GPTNeoForCausalLM(config).to(device)


def their_step(kind, device, T, tokens):        # float32 weights; on a GPU, TF32 products
    model = their_model(kind, T, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    batch = torch.randint(SHAPE.vocab_size, (tokens // T, T), device=device)
    return make_step(model, lambda x: model(x, labels=x).loss, [optimizer], [batch])


def our_sampling(device, rows):
    model = GPT(SHAPE).to(device, best_dtype(device)).eval()
    return lambda: model.generate([[1]] * rows, NEW_TOKENS)


def their_sampling(kind, device, rows):
    model = their_model(kind, SHAPE.block_size, device).eval()
    start = torch.ones(rows, 1, dtype=torch.long, device=device)
    return lambda: model.generate(start, attention_mask=start, do_sample=True, top_k=0, top_p=1.0,
                                  max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                                  pad_token_id=0)


def llama2c_sampling(program):
    """llama2.c with random weights of about our size: its MLP has three matrices instead of two."""
    V, T, L, H, C = SHAPE.vocab_size, SHAPE.block_size, SHAPE.n_layer, SHAPE.n_head, SHAPE.n_embd
    hidden = 8 * C // 3
    attention, mlp, norms, rope = 4 * L * C * C, 3 * L * C * hidden, (2 * L + 1) * C, T * C // H
    weights = 0.02 * torch.randn(V * C + attention + mlp + norms + rope)
    folder = tempfile.TemporaryDirectory()                      # exists as long as run() does
    model, tokenizer = Path(folder.name, "model.bin"), Path(folder.name, "tokenizer.bin")
    header = struct.pack("7i", C, hidden, L, H, H, V, T)
    model.write_bytes(header + weights.numpy().tobytes())
    tokenizer.write_bytes(struct.pack("i", 1) + V * struct.pack("=fi1s", 0.0, 1, b"a"))

    def run():
        subprocess.run([os.path.abspath(program), model, "-z", tokenizer, "-n", str(NEW_TOKENS),
                        "-p", "1"], cwd=folder.name, check=True, capture_output=True)
    return run


def matrix_product(device, flops):
    """The machine's limit: products of large square matrices, with this many FLOPs in all."""
    size = WORK[device][0]
    a, b = torch.randn(2, size, size, device=device).to(best_dtype(device))
    n, rest = divmod(flops, 2 * size ** 3)

    def run():
        for _ in range(n):
            a @ b
        a[:rest // (2 * size ** 2)] @ b
    return run


def losses(device, tokens):
    """The loss over the vocabulary, forward and backward, computed in several ways."""
    x, weight = (torch.randn(rows, SHAPE.n_embd, device=device, requires_grad=True)
                 for rows in (tokens, SHAPE.vocab_size))
    targets, dtype = torch.randint(len(weight), (tokens,), device=device), best_dtype(device)

    def run(loss_fn):
        with torch.autocast(device, dtype, dtype != torch.float32):
            loss = loss_fn(x, weight, targets)
        torch.autograd.grad(loss, (x, weight))

    runs = {"ours": partial(run, ChunkedCrossEntropy.apply),
            "all logits": partial(run, lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y))}
    if hasattr(F, "linear_cross_entropy"):                      # since torch 2.13
        runs["linear_cross_entropy"] = partial(run, F.linear_cross_entropy)
    return runs


def measure(runs, rounds, device):
    """{name: function} -> {name: seconds of each round}; in a round, each runs once."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 2):                         # the first two only warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(title, runs, tokens, rounds, device):
    """Measure, and print a Markdown table -> {title and name: how many times as fast ours is}."""
    seconds, ratios = measure(runs, rounds, device), {}
    print(f"\n| {title} | tokens/s | ours / this |\n|---|--:|--:|")
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"], times))
        print(f"| {name} | {tokens / statistics.median(times):,.0f} | {ratio:.2f} |", flush=True)
        if name != "ours":
            ratios[f"{title}: ours / {name}"] = round(ratio, 3)
    return ratios


def climb_ladder(device, tokens, rounds):
    flops, settings = int(1e12), {}
    [times] = measure({"": matrix_product(device, flops)}, rounds, device).values()
    rate = flops / statistics.median(times)             # per second
    print("\n| training step | tokens/s | of the matrix rate | memory |\n|---|--:|--:|--:|")
    for name, change in LADDER.items():
        settings |= change
        torch.cuda.reset_peak_memory_stats()
        step = our_step(device, SHAPE.block_size, tokens, **settings)
        [times] = measure({name: step}, rounds, device).values()
        speed = tokens / statistics.median(times)
        shape = replace(SHAPE, vocab_size=settings["vocab_size"], n_embd=settings["n_embd"])
        share = speed * flops_per_token(GPT(shape)) / rate
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"| {name} | {speed:,.0f} | {share:.0%} | {memory:,.1f} GB |", flush=True)


def print_profile(device, tokens):
    runs = {"training": our_step(device, SHAPE.block_size, tokens),
            "sampling, 1 row": our_sampling(device, 1)}
    for name, run in runs.items():
        run()                                           # warms up
        with torch.profiler.profile() as profile:
            run()
        order = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
        print(f"\n{name}\n{profile.key_averages().table(sort_by=order, row_limit=20)}")


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("--ladder", action="store_true", help="compare our own optimizations")
    parser.add_argument("--profile", action="store_true", help="list the slowest operations")
    parser.add_argument("--llama2c", metavar="PATH", help="the compiled program of llama2.c")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.rounds < 1 or args.ladder and device == "cpu":
        parser.error("--rounds must be at least 1, and --ladder needs a CUDA GPU")
    if args.llama2c and not os.access(args.llama2c, os.X_OK):
        parser.error(f"--llama2c: {args.llama2c} is not a program")
    tune_malloc()
    gpu, tokens, ratios = device == "cuda", WORK[device][1], {}
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if args.ladder:
        return climb_ladder(device, tokens, args.rounds)
    if args.profile:
        return print_profile(device, tokens)
    peers = ["GPT-Neo", "GPT-2"] if importlib.util.find_spec("transformers") else []
    for T in (256, 512):
        flops = tokens * flops_per_token(GPT(replace(SHAPE, block_size=T)))
        runs = {"ours": our_step(device, T, tokens)}
        runs |= {"matrix product": matrix_product(device, flops)}
        runs |= {kind: their_step(kind, device, T, tokens) for kind in peers}
        ratios |= compare(f"training, T = {T}", runs, tokens, args.rounds, device)
    ratios |= compare("loss", losses(device, tokens), tokens, args.rounds, device)
    for rows in (1, 64):
        runs = {"ours": our_sampling(device, rows)}
        runs |= {kind: their_sampling(kind, device, rows) for kind in peers}
        if args.llama2c and rows == 1:
            runs["llama2.c"] = llama2c_sampling(args.llama2c)
        ratios |= compare(f"sampling, rows: {rows}", runs, rows * NEW_TOKENS,
                          max(1, args.rounds // 2), device)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
