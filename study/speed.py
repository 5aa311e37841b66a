"""How fast are training and sampling, and how near to what the machine can do?

    python study/speed.py                       # four minutes on two CPU cores
    python study/speed.py --compile             # torch.compile, too (slow to start on a CPU)
    python study/speed.py --ladder              # on a CUDA GPU: what each thing that we do is worth
    pip install transformers                    # if it is there, it is measured as well

Everything is measured in turn, round after round, for machines are not the same from one minute to
the next; the table holds medians, and its ratios are medians of the ratios within a round. The
shape is tiny_8l's: 8 layers of width 256, a vocabulary of 10,000.
"""

import argparse
import dataclasses
import math
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model                                                                    # noqa: E402
import prepare                                                                  # noqa: E402
from model import GPT, GPTConfig, best_dtype, keep_memory                       # noqa: E402
from train import Settings, make_optimizers                                     # noqa: E402

SHAPE = dict(vocab_size=10_000, n_layer=8, n_head=4, n_embd=256)
NEW = 200                   # tokens that a row samples
COPIED = 1 << 28            # bytes
attend = model.attend


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


@dataclasses.dataclass
class Step:
    """How a training step is done; as it stands here, train.py's."""
    tf32: bool = True           # what is float32 may be multiplied in TF32
    dtype: torch.dtype | None = None    # of most products; None: the fastest
    flash: bool = True          # attention that never writes the scores down
    fused: bool = True          # AdamW in one kernel
    vocab: int = 0              # 0: that of SHAPE
    sliced: bool = True         # the loss without ever holding all the logits
    muon: bool = True           # instead of AdamW for all
    compiled: bool = False
    whole: bool = True          # all rows at once, not a quarter at a time
    width: int = 0              # 0: that of SHAPE

    def config(self, T):
        return GPTConfig(self.vocab or SHAPE["vocab_size"], T, SHAPE["n_layer"],
                         self.width // 64 or SHAPE["n_head"], self.width or SHAPE["n_embd"])


# From the plainest step to ours: what a rung is called, and what it changes in the one before.
LADDER = [("float32, attention and loss written out, AdamW, a vocabulary of 50,257", Step(
              tf32=False, dtype=torch.float32, flash=False, fused=False, vocab=50_257,
              sliced=False, muon=False, whole=False)),
          ("TF32", dict(tf32=True)), ("bfloat16", dict(dtype=None)),
          ("fused attention", dict(flash=True)), ("fused AdamW", dict(fused=True)),
          ("a vocabulary of 10,000", dict(vocab=0)), ("the loss in slices", dict(sliced=True)),
          ("Muon", dict(muon=True)), ("compiled", dict(compiled=True)),
          ("all rows at once", dict(whole=True)),
          ("... of width 512", dict(width=512)), ("... of width 768", dict(width=768))]


def written_out(q, k, v, mask=None, dropout=0.0):
    """model.attend as one would write it first; see there."""
    T = q.size(2)
    scores = q @ k.mT / math.sqrt(q.size(-1))                               # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v


# Each function below makes one thing ready and returns a function that does it once.

def product(device, size, dtype):
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    return lambda: a @ b


def copy(device):
    a, b = (torch.ones(COPIED // 4, device=device) for _ in "ab")
    return lambda: b.copy_(a)


def our_step(device, T, tokens, how=Step()):
    """A step of train.py: forward, backward, gradients clipped, optimizers."""
    gpt = GPT(how.config(T)).to(device)
    if how.fused:
        optimizers = make_optimizers(gpt, Settings(optimizer="muon" if how.muon else "adamw"),
                                     torch.device(device))
    else:
        optimizers = [torch.optim.AdamW(gpt.parameters(), foreach=False)]
    loss_of = gpt.loss if how.sliced else lambda x, y: gpt(x, y)[1]
    loss_of = torch.compile(loss_of, dynamic=False) if how.compiled else loss_of
    x, y = torch.randint(gpt.config.vocab_size, (2, tokens // T, T), device=device)
    rows = len(x) if how.whole else len(x) // 4
    dtype = how.dtype or best_dtype(device)

    def step():
        torch.set_float32_matmul_precision("high" if how.tf32 else "highest")
        model.attend = attend if how.flash else written_out
        for some_x, some_y in zip(x.split(rows), y.split(rows)):
            with torch.autocast(device, dtype, dtype != torch.float32):
                loss = loss_of(some_x, some_y) * (rows / len(x))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peer(kind, T):
    """transformers' model of our shape, or None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    layers, heads, width = (SHAPE[key] for key in ("n_layer", "n_head", "n_embd"))
    if kind == "GPT-Neo":
        config = transformers.GPTNeoConfig(
            vocab_size=SHAPE["vocab_size"], max_position_embeddings=T, hidden_size=width,
            num_layers=layers, num_heads=heads, window_size=256,
            attention_types=[[["global", "local"], layers // 2]])
        return transformers.GPTNeoForCausalLM(config)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=SHAPE["vocab_size"], n_positions=T, n_embd=width, n_layer=layers, n_head=heads))


def peer_step(kind, device, T, tokens):
    """A step of the peer in its default precision, with AdamW."""
    if (model := peer(kind, T)) is None:
        return None
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")
    x = torch.randint(SHAPE["vocab_size"], (tokens // T, T), device=device)

    def step():
        model(x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_text(device, rows):
    gpt = GPT(Step().config(512)).to(device, best_dtype(device)).eval()
    return lambda: gpt.generate([[1]] * rows, NEW)


def peer_text(kind, device, rows):
    if (model := peer(kind, 512)) is None:
        return None
    model = model.to(device).eval()
    start = torch.ones(rows, 1, dtype=torch.long, device=device)
    return lambda: model.generate(
        start, attention_mask=start, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NEW,
        min_new_tokens=NEW, pad_token_id=0, eos_token_id=0)


# ---------------------------------------------------------------------------------------- measuring

def measure(contestants, device, rounds):
    """Seconds of {name: function or None}, each once a round, one after the other, so that all see
    the same machine -> {name: list of seconds}."""
    contestants = {name: do for name, do in contestants.items() if do}
    for do in contestants.values():                     # warm up
        do()
        do()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, do in contestants.items():
            wait(device)
            start = time.perf_counter()
            do()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(make, *how):
    """MB at the peak of one step, in a process that does nothing else (on CUDA: on the device)."""
    step = make(*how)
    step()
    if "cuda" in how:
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        status = Path("/proc/self/status").read_text()      # Linux: of this process alone
        return int(status.split("VmHWM:")[1].split()[0]) / 1e3
    except OSError:
        return math.nan


def alone(*call):
    """Do a call of peak_memory in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, call)


def ratio(seconds, name, other):
    """How many times as fast `name` is as `other`: the median of the rounds."""
    if name not in seconds or other not in seconds:
        return ""
    return f"{statistics.median(b / a for a, b in zip(seconds[name], seconds[other])):.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compiled steps, too")
    parser.add_argument("--ladder", action="store_true", help="from the plainest step to ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of a step (default: 4096; CUDA: 65536)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.tokens is not None and (args.tokens < 1 or args.tokens % 512):
        parser.error("--rounds must be 1 or more, and --tokens a multiple of 512")
    if args.ladder and not torch.cuda.is_available():
        parser.error("--ladder is of things that matter on a CUDA GPU, and torch sees none here")
    prepare.command(study, args)


def climb(device, T, tokens, rounds, rate):
    """Print what each rung of the LADDER makes of a step; rate is that of the matrix product."""
    print("\n| training step: the row above, and ... | tokens/s | of the matrix rate | memory |\n"
          "|---|--:|--:|--:|")
    how = Step()
    for name, change in LADDER:
        how = dataclasses.replace(how, **change) if isinstance(change, dict) else change
        torch.cuda.reset_peak_memory_stats()
        [times] = measure({"": our_step(device, T, tokens, how)}, device, rounds).values()
        speed = tokens / statistics.median(times)
        print(f"| {name} | {speed:,.0f} | "
              f"{speed * GPT(how.config(T)).flops_per_token() / rate:.0%} | "
              f"{torch.cuda.max_memory_allocated() / 1e9:,.1f} GB |", flush=True)


def study(args):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = args.tokens or (65_536 if device == "cuda" else 4_096)
    size, low = (8192 if device == "cuda" else 2048), best_dtype(device)
    keep_memory()
    machine = torch.cuda.get_device_name() if device == "cuda" else \
        f"{torch.get_num_threads()} CPU cores ({platform.processor() or platform.machine()})"
    print(f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")

    print("| limit | rate |\n|---|--:|")
    for kind in dict.fromkeys((torch.float32, low)):
        [times] = measure({"": product(device, size, kind)}, device, args.rounds).values()
        rate = 2 * size ** 3 / statistics.median(times)         # in the end, of the fastest type
        print(f"| {size}³ product, {str(kind)[6:]} | {rate / 1e9:,.0f} GFLOP/s |")
    [times] = measure({"": copy(device)}, device, args.rounds).values()
    print(f"| memory copied | {2 * COPIED / statistics.median(times) / 1e9:,.0f} GB/s |")

    if args.ladder:
        return climb(device, 512, tokens, args.rounds, rate)
    print("\n| training step | tokens/s | of the matrix rate | times GPT-Neo | peak memory |\n"
          "|---|--:|--:|--:|--:|")
    for T in (256, 512):
        makers = {f"ours, T = {T}": (our_step, device, T, tokens),
                  f"ours, compiled, T = {T}": args.compile and (our_step, device, T, tokens,
                                                                Step(compiled=True)),
                  f"GPT-Neo, T = {T}": (peer_step, "GPT-Neo", device, T, tokens),
                  f"GPT-2, T = {T}": (peer_step, "GPT-2", device, T, tokens)}
        makers = {name: how for name, how in makers.items() if how}
        steps = {name: make(*how) for name, (make, *how) in makers.items()}
        seconds = measure({"product": product(device, size, low), **steps}, device, args.rounds)
        work = GPT(Step().config(T)).flops_per_token() * tokens
        for name, how in makers.items():
            if name not in seconds:
                print(f"| {name} | transformers is not installed | | | |")
                continue
            share = statistics.median(work / a / (2 * size ** 3 / b)
                                      for a, b in zip(seconds[name], seconds["product"]))
            print(f"| {name} | {tokens / statistics.median(seconds[name]):,.0f} | {share:.0%} | "
                  f"{ratio(seconds, name, f'GPT-Neo, T = {T}')} | {alone(*how):,.0f} MB |")

    print(f"\n| sampling {NEW} tokens a row | tokens/s | times GPT-Neo |\n|---|--:|--:|")
    for rows in (1, 64):
        texts = {f"ours, rows: {rows}": our_text(device, rows),
                 f"GPT-Neo, rows: {rows}": peer_text("GPT-Neo", device, rows),
                 f"GPT-2, rows: {rows}": peer_text("GPT-2", device, rows)}
        seconds = measure(texts, device, max(2, args.rounds // 2))
        for name in texts:
            if name not in seconds:
                print(f"| {name} | transformers is not installed | |")
                continue
            print(f"| {name} | {rows * NEW / statistics.median(seconds[name]):,.0f} | "
                  f"{ratio(seconds, name, f'GPT-Neo, rows: {rows}')} |")


if __name__ == "__main__":
    main()
