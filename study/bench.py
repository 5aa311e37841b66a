"""How fast are training and sampling, compared with transformers and with the machine's limit?

    python -m study.bench               # 3 minutes on two CPU cores
    python -m study.bench --ladder      # on a GPU: what each optimization is worth

GPT-Neo and GPT-2 are those of transformers (if installed), in the shape of tiny_8l. All take turns,
because a machine's speed changes from minute to minute: the tables show medians, and each ratio is
the median of the ratios within a round. The last line is JSON with all ratios.
"""

import importlib.util
import json
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
from model import GPT, GPTConfig, best_dtype, tune_malloc
from study.hf import neo_config
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
            n_head=SHAPE.n_head, eos_token_id=0)
        return transformers.GPT2LMHeadModel(config).to(device)
    config = neo_config(replace(SHAPE, block_size=T, window=256))
    config = transformers.GPTNeoConfig(**config, eos_token_id=0)
    return transformers.GPTNeoForCausalLM(config).to(device)


def their_step(kind, device, T, tokens):        # in the default precision of transformers
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


def matrix_product(device):
    size, dtype = WORK[device][0], best_dtype(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


def measure(contestants, rounds, device):
    """{name: function} -> {name: seconds of each round}; in a round, each runs once."""
    seconds = {name: [] for name in contestants}
    for i in range(rounds + 2):                         # the first two only warm up
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def speedup(seconds, name, other):              # of `name`, compared with `other`
    return statistics.median(b / a for a, b in zip(seconds[name], seconds[other]))


def print_table(title, seconds, tokens):
    """Print speeds as Markdown -> {title and name: how many times as fast as this ours is}."""
    ratios = {}
    print(f"\n| {title} | tokens/s | ours / this |\n|---|--:|--:|")
    for name, times in seconds.items():
        speed, ratio = tokens / statistics.median(times), speedup(seconds, "ours", name)
        print(f"| {name} | {speed:,.0f} | {ratio:.2f} |", flush=True)
        if name != "ours":
            ratios[f"{title}: ours / {name}"] = round(ratio, 3)
    return ratios


def climb_ladder(device, rounds):
    size, tokens = WORK[device]
    [times] = measure({"": matrix_product(device)}, rounds, device).values()
    rate = 2 * size ** 3 / statistics.median(times)                     # FLOP/s
    print("\n| training step | tokens/s | of the matrix rate | memory |\n|---|--:|--:|--:|")
    settings, T = {}, SHAPE.block_size
    for name, change in LADDER.items():
        settings |= change
        torch.cuda.reset_peak_memory_stats()
        step = our_step(device, T, tokens, **settings)
        [times] = measure({name: step}, rounds, device).values()
        speed = tokens / statistics.median(times)
        width = settings["n_embd"]
        config = GPTConfig(settings["vocab_size"], T, SHAPE.n_layer, width // 64, width)
        share = speed * GPT(config).flops_per_token() / rate
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"| {name} | {speed:,.0f} | {share:.0%} | {memory:,.1f} GB |", flush=True)


def compare_training(device, T, rounds, peers):
    """Training steps of ours and of the peers, and our share of the matrix rate -> ratios."""
    size, tokens = WORK[device]
    steps = {"ours": our_step(device, T, tokens), "matrix product": matrix_product(device)}
    steps |= {kind: their_step(kind, device, T, tokens) for kind in peers}
    seconds = measure(steps, rounds, device)
    flops = tokens * GPT(replace(SHAPE, block_size=T)).flops_per_token()
    share = speedup(seconds, "ours", "matrix product") * flops / (2 * size ** 3)
    del seconds["matrix product"]
    ratios = print_table(f"training, T = {T}", seconds, tokens)
    print(f"Ours reaches {share:.0%} of the rate of a {size} x {size} matrix product.")
    return ratios | {f"training, T = {T}: of the matrix rate": round(share, 3)}


def main(argv=None):
    parser = prepare.command_parser(__doc__)
    parser.add_argument("--ladder", action="store_true", help="compare our own optimizations")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if args.ladder and not gpu:
        parser.error("--ladder needs a CUDA GPU")
    tune_malloc()
    machine = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU cores"
    print(f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if args.ladder:
        climb_ladder(device, args.rounds)
        return
    peers = ["GPT-Neo", "GPT-2"] if importlib.util.find_spec("transformers") else []
    ratios = {}
    for T in (256, 512):
        ratios |= compare_training(device, T, args.rounds, peers)
    for rows in (1, 64):
        runs = {"ours": our_sampling(device, rows)}
        runs |= {kind: their_sampling(kind, device, rows) for kind in peers}
        seconds = measure(runs, max(1, args.rounds // 2), device)
        ratios |= print_table(f"sampling, rows: {rows}", seconds, rows * NEW_TOKENS)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
