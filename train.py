"""How does a transformer learn to tell stories?

    python train.py config/demo.py                              # on a laptop, in minutes
    python train.py config/tiny_8l.py --learning_rate=1e-3      # each setting below can be changed
    torchrun --standalone --nproc_per_node=4 train.py config/tiny_8l.py         # on several GPUs

It writes out/<name of the config>/: ckpt.pt, the tokenizer, log.csv and loss.png. Ctrl-C at any
time: the step is finished and saved, and the same command goes on.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import inspect
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

# Threads that wait for one another spin. Asleep instead (on Linux), they lose a twentieth of the
# time on an idle machine, and win half of it on a busy one. Torch reads this when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import prepare
from model import GPT, GPTConfig, best_device, best_dtype, keep_memory, read_checkpoint


@dataclass
class Settings:
    # what to learn from, and where to keep what was learned
    dataset: str = "tinystories"    # a name under data/, or the path of a prepared folder
    story_only: bool = False        # learn to write stories, but not the instructions before them
    out_dir: str = ""               # default: out/<name of the config>
    # the model (see model.py)
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 256               # width
    block_size: int = 512           # tokens of context
    pos: str = "rope"               # rope, learned
    norm: str = "rms"               # rms, layer
    act: str = "relu2"              # relu2, gelu
    qk_norm: bool = True
    bias: bool = False
    window: int = 0                 # tokens that every second layer looks back; 0: all
    init: str = "zero"              # zero, copy, normal
    value_residual: bool = True
    dropout: float = 0.0
    # the optimizer
    optimizer: str = "muon"         # muon (for matrices, AdamW for the rest), adamw (for all)
    learning_rate: float = 5e-3     # at its peak
    schedule: str = "linear"        # after warm-up: constant, cosine, linear (flat, then falling)
    warmup_steps: int = 50
    decay: float = 0.6              # linear: the share of the steps after warm-up in which it falls
    final_lr: float = 0.0           # what cosine and linear fall to, as a share of the peak
    momentum: float = 0.85          # of Muon
    beta2: float = 0.99             # of AdamW: how slowly it forgets the size of gradients
    weight_decay: float = 0.3       # of matrices
    grad_clip: float = 1.0          # longest gradient that is followed in full; 0: any
    batch_tokens: int = 65_536      # tokens of one step, over all GPUs
    micro_batch: int = 0            # rows at a time: only a matter of memory; 0: all of them
    max_steps: int = 7_000
    # looking at it
    eval_interval: int = 500        # steps between two looks at the validation text; 0: at the end
    eval_tokens: int = 163_840      # how much is read, as windows and as whole stories; 0: all
    log_interval: int = 20          # steps between two lines
    save_interval: int = 500        # steps between two checkpoints; 0: at the end
    keep_checkpoints: bool = False  # keep the weights of each, as ckpt_<step>.pt
    # the machine
    seed: int = 0
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "auto"             # auto, bfloat16, float16, float32
    compile: str = "auto"           # torch.compile: True, False, auto (on CUDA)
    # a run that is already there
    resume: bool = False            # go on though harmless settings have changed (not needed else)
    overwrite: bool = False         # throw it away


CHOICES = {"optimizer": ("muon", "adamw"), "schedule": ("constant", "cosine", "linear"),
           "device": ("auto", "cpu", "cuda", "mps"),
           "dtype": ("auto", "bfloat16", "float16", "float32"),
           "compile": ("auto", "True", "False")}
BOUNDS = {"learning_rate": (1e-9, 1e9), "batch_tokens": (1, 1e9), "max_steps": (1, 1e9),
          "log_interval": (1, 1e9), "decay": (0, 1), "final_lr": (0, 1), "momentum": (0, 0.9999),
          "beta2": (0, 0.9999)}
HARMLESS = {"eval_interval", "eval_tokens", "log_interval", "save_interval", "max_steps",
            "keep_checkpoints", "micro_batch", "device", "dtype", "compile"}


# -------------------------------------------------------------------------------------- settings

def boolean(text):
    return ("False", "True").index(text) == 1           # ValueError: it is neither


def nearest(word, words):
    return difflib.get_close_matches(word, words, n=1, cutoff=0)[0]


def load_config(argv):
    """Settings from ["config/demo.py", "--key=value", ...]. What a config file sets becomes such
    an option, so that one parser checks all; those that are given count more."""
    parser = argparse.ArgumentParser(
        usage="python train.py [CONFIG.py] [--name=value ...]", allow_abbrev=False,
        description=__doc__ + "\n" + inspect.getsource(Settings),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type,
                            choices=CHOICES.get(field.name), help=argparse.SUPPRESS)
    options, name = [], "run"
    for path in (Path(arg) for arg in argv if not arg.startswith("-")):
        given, name = {}, path.stem
        if not path.is_file():
            known = [file.stem for file in (prepare.HERE / "config").glob("*.py")]
            parser.error(f"there is no config file {path}: settings are --name=value, without "
                         f"spaces; or did you mean config/{nearest(name, known)}.py?")
        try:
            exec(compile(path.read_text(encoding="utf-8-sig"), path, "exec"), given)
        except Exception as error:
            parser.error(f"{path}: {type(error).__name__}: {error}")
        options += [f"--{key}={value}" for key, value in given.items()  # not what it imports
                    if not (key[0] == "_" or inspect.ismodule(value) or callable(value))]
    options += [arg for arg in argv if arg.startswith("-")]
    settings, unknown = parser.parse_known_args(options, Settings())
    if unknown:
        parser.error(f"there is no setting {unknown[0]}; did you mean "
                     f"--{nearest(unknown[0], vars(settings))}? -h lists them")
    for key, value in vars(settings).items():
        least, most = BOUNDS.get(key, (0, 1e9))
        if isinstance(value, (int, float)) and not least <= value <= most:      # nan is not
            parser.error(f"{key} is {value}; it must lie between {least} and {most:g}")
    try:
        model_config(settings, vocab_size=1)            # are its sizes possible?
        deal(settings, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        parser.error(str(error))
    settings.out_dir = settings.out_dir or f"out/{name}"
    return settings


def model_config(settings, vocab_size):
    names = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(vocab_size, **{name: getattr(settings, name) for name in names})


def deal(settings, world):
    """The rows of a step (of all ranks), and how many a rank takes at a time."""
    rows, rest = divmod(settings.batch_tokens, settings.block_size)
    micro = min(settings.micro_batch or rows, max(rows // world, 1))
    if rest or rows % (world * max(micro, 1)):
        raise ValueError(f"batch_tokens {settings.batch_tokens} cannot be dealt to {world} "
                         f"process(es) in micro-batches of {micro} x {settings.block_size} tokens")
    return rows, micro


# ------------------------------------------------------------------------------------------ data

def find_data(dataset):
    """The folder of a data set and its meta.json; the ones that we know are prepared if missing."""
    known = dataset in prepare.SAMPLES or dataset in prepare.SOURCES
    named = prepare.HERE / "data" / dataset         # a path that is absolute stays what it is
    folder = named if named.is_dir() or not Path(dataset).is_dir() else Path(dataset)
    if not (folder / "meta.json").is_file():
        if not known:
            raise SystemExit(f"There is no prepared data set {dataset!r}. Make it: "
                             f"python prepare.py {dataset} --input STORIES.txt")
        print(f"Preparing {dataset} first (python prepare.py {dataset}):")
        prepare.main([dataset])
    anew = f"Make it anew: python prepare.py {dataset} --force" + " --input FILE" * (not known)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {split: 2 * meta[split]["tokens"] for split in ("train", "val")}
        entries = meta["vocab_size"], prepare.load_tokenizer(folder).n_vocab
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{folder} is damaged ({type(error).__name__}: {error}). {anew}")
    for split, size in sizes.items():
        path = folder / f"{split}.bin"
        if not path.is_file() or path.stat().st_size != size or not size:
            raise SystemExit(f"{path} does not hold the {size:,} bytes that its meta.json names. "
                             + anew)
        largest = int(np.memmap(path, np.uint16, "r").max())
        if largest >= min(entries):
            raise SystemExit(f"{path} holds the id {largest}, but the vocabulary of its meta.json "
                             f"has {entries[0]} entries, and its tokenizer {entries[1]}. {anew}")
    return folder, meta


@functools.lru_cache(maxsize=4)
def epoch_order(windows, block_size, seed, epoch):
    """How one epoch reads the stream: where its first window begins, and the order of windows."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(block_size)), rng.permutation(windows)


def targets(ids, eot, mark):
    """The token that follows each of ids (N,), but -1 where it is not part of a story -> (N - 1,).
    A story begins after the ids `mark` and ends with the id `eot`; without a mark, all is story."""
    if not mark:
        return ids[1:]
    place = np.arange(len(ids) - 1)                     # of the last mark, and of the last end
    marked = np.all([ids[i:len(ids) - len(mark) + i] == token for i, token in enumerate(mark)], 0)
    marked = np.pad(marked, (len(mark) - 1, 0))         # where a mark is complete
    began, ended = (np.maximum.accumulate(np.where(here, place, -1))
                    for here in (marked, ids[:-1] == eot))
    return np.where(began > ended, ids[1:], -1)


def get_batch(file, block_size, rows, seed, eot=0, mark=()):
    """The windows of the token stream that have the numbers `rows`, counted from the start of
    training -> x, y (len(rows), block_size) int64; y is x one token later (see `targets`). An epoch
    shuffles the windows and moves their edges; within it each token is a target once, but for up to
    two windows at the ends. A function of its arguments alone: a resumed run needs nothing else."""
    data = np.memmap(file, dtype=np.uint16, mode="r")   # anew: the pages before are let go again
    windows = len(data) // block_size - 1
    x, y = np.empty((2, len(rows), block_size), dtype=np.int64)
    for i, row in enumerate(rows):
        offset, order = epoch_order(windows, block_size, seed, row // windows)
        start = offset + int(order[row % windows]) * block_size
        back = min(start, block_size) if mark else 0    # what began before the window?
        ids = data[start - back:start + block_size + 1].astype(np.int64)
        x[i], y[i] = ids[back:-1], targets(ids, eot, mark)[back:]
    return torch.from_numpy(x), torch.from_numpy(y)


def validation(path, meta, block_size, eval_tokens, rows, mark=()):
    """Two views of the same validation text, each a list of batches x, y of at most `rows` rows:
    windows of the stream, which can be compared with other runs; and whole stories, each read
    from its own beginning (cut at block_size), as it is when one is told."""
    data = np.fromfile(path, dtype=np.uint16)[:eval_tokens + 1 if eval_tokens else None]
    data, eot = data.astype(np.int64), meta["eot"]
    n = (len(data) - 1) // block_size * block_size
    if n <= 0:
        raise SystemExit(f"{path}: {len(data)} tokens of it are read, and a window takes "
                         f"{block_size + 1}. Give prepare.py more text with --valid, or lower "
                         "--block_size, or raise --eval_tokens.")
    x, y = (torch.from_numpy(ids[:n]).view(-1, block_size)
            for ids in (data, targets(data, eot, mark)))
    windows = list(zip(x.split(rows), y.split(rows)))
    stories = np.split(data, np.flatnonzero(data == eot) + 1)[:-1]
    stories = [np.append(eot, story)[:block_size + 1] for story in stories]
    stories.sort(key=len)                           # like lengths together: little padding
    whole = []
    for i in range(0, len(stories), rows):
        pairs = [(story[:-1], targets(story, eot, mark)) for story in stories[i:i + rows]]
        x, y = (nn.utils.rnn.pad_sequence([*map(torch.from_numpy, column)], batch_first=True,
                                          padding_value=-1) for column in zip(*pairs))
        whole.append((x.clamp(min=0), y))
    return windows, whole


def bits_per_byte(batches, tokenizer):
    """What turns nats per token of these batches of x, y into bits per byte of their text."""
    asked = torch.cat([y[y >= 0] for _, y in batches]).tolist()
    text = sum(len(tokenizer.decode_single_token_bytes(i)) for i in asked
               if i != tokenizer.eot_token)
    return len(asked) / max(text, 1) / math.log(2)


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """Mean loss in nats per token over batches of x, y."""
    model.eval()
    total, count = 0.0, 0
    for x, y in batches:
        with autocast():
            loss = model(x.to(device), y.to(device))[1]
        n = int((y >= 0).sum())
        total, count = total + (loss.item() * n if n else 0.0), count + n
    model.train()
    return total / count if count else math.nan


# --------------------------------------------------------------------------------------- machine

def choose_device(settings, local_rank):
    name = best_device() if settings.device == "auto" else settings.device
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    try:
        torch.ones(1, device=device).add_(1)
    except (RuntimeError, AssertionError) as error:     # there is none, or torch is not made for it
        raise SystemExit(f"{device} cannot be used with torch {torch.__version__} ("
                         f"{str(error).splitlines()[0][:120]}). Use --device=cpu, or install the "
                         "torch build that fits your GPU and driver (pytorch.org).")
    if name == "cuda":
        torch.cuda.set_device(device)
    return device


def can_compile(device):
    """Whether torch.compile works here. It needs a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
        return True
    except Exception as error:                          # each part of it fails in its own way
        print(f"torch.compile does not work here ({type(error).__name__}); going on without it. "
              "--compile=False says so from the start.", file=sys.stderr)
        return False


def orthogonalize(x):
    """Matrices (n, rows, columns) -> their nearest with all singular values about one, by five
    steps of Newton and Schulz's iteration with the coefficients of Keller Jordan's Muon."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(best_dtype(x.device.type))     # bfloat16 is exact enough, where it is not slower
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)      # -4.7750 a + 2.0315 a @ a
        x = torch.baddbmm(x, b, x, beta=3.4445)                     # 3.4445 x + b @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update moves all directions of a matrix alike (Keller Jordan 2024; scaled so
    that AdamW's learning rate fits, arXiv 2502.16982). A parameter of three axes is a stack of
    matrices; all of one shape are worked on at once."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))    # Nesterov's
                updates = orthogonalize(torch.stack(updates).view(-1, *shape[-2:]))
                size = group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                for p, update in zip(params, updates.view(-1, *shape)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)


def make_optimizers(model, settings, device):
    """Muon for the matrices of the blocks, AdamW for vectors and embeddings; or AdamW for all."""
    matrices = [p for p in model.blocks.parameters() if p.ndim >= 2]
    held = {id(p) for p in matrices}
    groups = [{"params": [p for p in model.parameters() if id(p) not in held], "weight_decay": 0.0}]
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        groups.append(decayed)
    optimizers = [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.beta2),
                                    fused=device.type == "cuda")]
    if settings.optimizer == "muon":
        optimizers.append(Muon([decayed], dict(lr=settings.learning_rate,
                                               momentum=settings.momentum)))
    return optimizers


def lr_share(settings, step):
    """The learning rate of a step (0, 1, ...) as a share of its peak."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    left = (settings.max_steps - step) / max(settings.max_steps - settings.warmup_steps, 1)
    share = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left),
             "linear": min(1.0, left / settings.decay if settings.decay else 1.0)}
    return settings.final_lr + (1 - settings.final_lr) * share[settings.schedule]


# ---------------------------------------------------------------------------------- what is kept

def keep(path, write):
    """Write a file of a run -> whether it could be written (whole, or not at all): a full disk does
    not stop the training, which tries again the next time."""
    try:
        with prepare.whole(path) as file:
            write(file)
        return True
    except (OSError, RuntimeError) as error:        # torch words a full disk as a RuntimeError
        write(copy := io.BytesIO())
        size, free = copy.tell() / 1e6, shutil.disk_usage(path.parent).free / 1e6
        why = error if free > size else f"it takes {size:,.1f} MB, and {free:,.1f} MB are free"
        print(f"Could not write {path}: {why}. What was there before stays; the next time it is "
              "tried again.", file=sys.stderr)
        return False


COLUMNS = ["step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb", "lr", "grad_norm",
           "tokens_per_s"]


def write_log(path, log):
    rows = [COLUMNS, *([row.get(column, "") for column in COLUMNS] for row in log)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    keep(path, lambda file: file.write(text.encode()))


def read_log(path):
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != COLUMNS:
        raise SystemExit(f"{path} is not as train.py wrote it (has a spreadsheet saved it?). The "
                         "training's own command writes it anew.")
    return rows


def draw_loss(folder, log, bound=None):
    """The log as loss.png, with the entropy of the grammar where we know it."""
    from matplotlib.figure import Figure        # pyplot would look for a screen
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for column, style in (("train_loss", "-"), ("val_loss", "o-")):
        points = [(row["tokens"], row[column]) for row in log if column in row]
        if points:
            axes.plot(*zip(*points), style, label=column.replace("_", " "), markersize=4)
    if bound:
        axes.axhline(bound, color="gray", linestyle=":",
                     label="the grammar's own entropy (whole stories)")
    axes.set(xlabel="tokens", ylabel="nats per token", yscale="log", title=folder.name)
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    keep(folder / "loss.png", lambda file: figure.savefig(file, dpi=120))


def checkpoints(folder):
    return [*folder.glob("ckpt.pt"), *folder.glob("ckpt_[0-9]*.pt")]


def take_up(settings, meta, model, optimizers, scaler):
    """Go on with the run that is in out_dir, if there is one -> its step, seconds, log, and loss
    since the last log line: sum and steps."""
    folder = Path(settings.out_dir)
    if settings.overwrite or not checkpoints(folder):
        return 0, 0.0, [], torch.zeros(()), 0
    other = "Choose another --out_dir, or throw that run away with --overwrite=True."
    try:
        checkpoint = read_checkpoint(folder / "ckpt.pt")
        checkpoint["log"]           # an earlier train.py had none: nothing can go on from there
        old, new = checkpoint["settings"], asdict(settings)
        differ = {key: f"{key} ({old.get(key)} there, {new[key]} here)" for key in new
                  if old.get(key) != new[key] and key not in ("resume", "overwrite", "out_dir")}
        if differ and not (settings.resume and HARMLESS.issuperset(differ)):
            shown = ", ".join([*differ.values()][:4]) + " and more" * (len(differ) > 4)
            raise SystemExit(f"{folder} holds a run with other settings: {shown}. "
                             + "Go on with these by --resume=True. " * HARMLESS.issuperset(differ)
                             + other)
        if checkpoint["meta"] != meta:
            raise SystemExit(f"{folder} has learned from another version of {settings.dataset}. "
                             + other)
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
        return tuple(checkpoint[key] for key in ("step", "seconds", "log", "loss_sum",
                                                 "loss_steps"))
    except Exception as error:      # a damaged file can raise nearly anything, another model.py too
        why = " ".join(str(error).split())[:120]
        raise SystemExit(f"{folder / 'ckpt.pt'} cannot be continued ({type(error).__name__}: "
                         f"{why}). {other}")


# ------------------------------------------------------------------------------------------ main

@contextlib.contextmanager
def signals_kept():
    """While it lasts, SIGINT and SIGTERM only go into the list that it gives; a second one ends."""
    signals = []

    def on_signal(number, frame):
        if signals:
            os._exit(128 + number)
        signals.append(number)
        if os.environ.get("RANK", "0") == "0":
            print("\nFinishing this step, then saving (once more to leave at once) ...", flush=True)

    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, on_signal) for number in both]
    try:
        yield signals
    finally:
        for number, handler in zip(both, before):
            signal.signal(number, handler)


def train(settings):
    """One run, from where it stands to its end, or to a signal."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(settings, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=4))
    if rank == 0:
        find_data(settings.dataset)                     # the others wait until it is there
    if world > 1:
        dist.barrier()
    with signals_kept() as signals:
        learn(settings, rank, world, device, signals)


def learn(settings, rank, world, device, signals):
    """Train, on data that is there."""
    folder, T = Path(settings.out_dir), settings.block_size
    say = functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    data, meta = find_data(settings.dataset)
    if meta["train"]["tokens"] < 2 * T:
        raise SystemExit(f"{data} has {meta['train']['tokens']} tokens to learn from; a block_size "
                         f"of {T} needs {2 * T} at least.")
    rows, micro = deal(settings, world)
    mark = meta.get("story_mark", (-1,)) if settings.story_only else ()
    windows, stories = validation(data / "val.bin", meta, T, settings.eval_tokens, min(micro, 16),
                                  mark)
    if not any((y >= 0).any() for _, y in windows):
        raise SystemExit(f"{data} has no instructions (no line begins with Story:), so story_only "
                         "has nothing to count.")
    file = open(data / "train.bin", "rb")       # kept open: another one in its place is not read
    tokenizer = prepare.load_tokenizer(data)
    bits = bits_per_byte(windows, tokenizer)
    uncut = all((y == meta["eot"]).any(dim=1).all() for _, y in stories)
    bound = meta.get("entropy_bound", {}).get("nats_per_token") \
        if uncut and not settings.story_only else None

    keep_memory()
    dtype = best_dtype(device.type) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    autocast = functools.partial(torch.autocast, device.type, dtype, dtype != torch.float32)
    torch.set_float32_matmul_precision("high")          # what stays float32 may use TF32
    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings, meta["vocab_size"])).to(device)
    optimizers = make_optimizers(model, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, seconds, log, loss_sum, loss_steps = take_up(settings, meta, model, optimizers, scaler)
    loss_sum = loss_sum.to(device)
    if world > 1 and largest(step, device) != step:
        raise SystemExit(f"{folder} is at step {step} here, and further on another machine: let "
                         "them share the folder, or copy it.")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for old in checkpoints(folder) if settings.overwrite else ():
            old.unlink()
        write_log(folder / "log.csv", log)
        for name in ("tokenizer.tiktoken", "meta.json"):
            prepare.write_text(folder / name, (data / name).read_text(encoding="utf-8"))
    wanted = settings.compile == "True" or settings.compile == "auto" and device.type == "cuda"
    compiled = wanted and step < settings.max_steps and can_compile(device)
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss

    tokens_per_step, flops = rows * T, model.flops_per_token()
    say(f"{folder}: {model.count_parameters():,} parameters ({model.count_parameters(False):,} "
        f"without embeddings), {settings.max_steps * tokens_per_step:,} tokens = "
        f"{settings.max_steps * tokens_per_step / meta['train']['tokens']:.2f} epochs; "
        f"{device.type}, {str(dtype)[6:]}{', compiled' if compiled else ''}"
        + (f"; going on from step {step:,}" if step else ""))
    say(f"twenty tokens a parameter (arXiv 2203.15556): {20 * model.count_parameters():,} tokens; "
        f"this data's {meta['train']['tokens']:,} feed a model of "
        f"{meta['train']['tokens'] // 20:,} parameters")
    if settings.dataset in prepare.SAMPLES and meta.get("text") != prepare.sample_text():
        say(f"data/grammar.txt has changed since {data} was told by it. To tell it anew: "
            f"python prepare.py {settings.dataset} --force")
    if twins := meta.get("counts", {}).get("kept: also in validation"):
        say(f"{twins:,} stories of the training text stand in validation, too: its loss flatters.")

    clock, clock_step, saved, stop = time.time(), step, True, 0
    while step < settings.max_steps and not stop:
        # -------------------------------------------------------------------------------- one step
        torch.manual_seed(settings.seed + 1 + step * world + rank)      # what dropout draws
        lr = settings.learning_rate * lr_share(settings, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        batch = get_batch(file, T, range(step * rows, (step + 1) * rows), settings.seed,
                          meta["eot"], mark)                            # of all ranks
        asked = int((batch[1] >= 0).sum())
        for i in range(rank * rows // world, (rank + 1) * rows // world, micro):
            x, y = (ids[i:i + micro] for ids in batch)
            share = world * int((y >= 0).sum()) / max(asked, 1)
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            with autocast():
                loss = loss_of(x, y) * share
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if world > 1:
            average_gradients(model, world)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        step, loss_steps = step + 1, loss_steps + 1

        # ------------------------------------------------- between two steps: look, save, or stop
        last = step == settings.max_steps
        due_log, due_eval, due_save = (last or every > 0 and step % every == 0 for every in (
            settings.log_interval, settings.eval_interval, settings.save_interval))
        stop = signals[0] if signals else 0
        if world > 1:                                   # all stop after the same step
            stop = largest(stop, device) if due_log else 0
        if not (due_log or due_eval or due_save or stop):
            continue
        if world > 1:
            dist.all_reduce(loss_sum)
            loss_sum /= world
        loss = loss_sum.item() / loss_steps             # reading it waits for the device
        # where a scaler is at work, steps with infinite gradients are skipped
        if not math.isfinite(loss + (0.0 if scaler.is_enabled() else float(norm))):
            raise SystemExit(f"The loss is {loss} at step {step} (learning rate {lr:.2e}, gradient "
                             f"norm {float(norm):.2e}). The checkpoint before it stays. Try a "
                             "smaller --learning_rate or more --warmup_steps.")
        spent, done, row = time.time() - clock, (step - clock_step) * tokens_per_step, {}
        seconds += spent
        if due_log:
            left = (settings.max_steps - step) * spent / (step - clock_step)
            say(f"step {step:>6,}/{settings.max_steps:,} | loss {loss:.4f} | lr {lr:.2e} | "
                f"{done / spent:,.0f} tokens/s | {flops * done / spent / 1e12:.3g} TFLOP/s | "
                f"{left // 60:.0f}m{left % 60:02.0f}s left")
            row |= {"train_loss": loss, "lr": lr, "grad_norm": float(norm),
                    "tokens_per_s": round(done / spent)}
            loss_sum, loss_steps = torch.zeros((), device=device), 0
        if due_eval and rank == 0:
            val, whole = (evaluate(model, view, device, autocast) for view in (windows, stories))
            row |= {"val_loss": val, "val_bpb": val * bits}
            far = f" ({whole / bound - 1:+.1%} against the grammar's own {bound:.4f})" \
                if bound else ""
            say(f"step {step:>6,} | validation {val:.4f} nats per token, {val * bits:.4f} bits per "
                f"byte | whole stories {whole:.4f} nats per token{far}")
            ids = model.generate([[meta["eot"]]], 60, 0.8, stop=meta["eot"])[0]
            say("    " + " ".join(tokenizer.decode(ids).split()) + " ...")
        if rank == 0 and row:
            log.append({"step": step, "tokens": step * tokens_per_step,
                        "seconds": round(seconds, 2), **row})
            write_log(folder / "log.csv", log)
            if due_eval:
                draw_loss(folder, log, bound)
        if rank == 0 and (due_save or stop):
            weights = {"model": model.state_dict(), "model_config": asdict(model.config),
                       "settings": asdict(settings), "step": step, "meta": meta}
            saved = keep(folder / "ckpt.pt", functools.partial(torch.save, weights | {
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict(), "seconds": seconds, "log": log,
                "loss_sum": loss_sum, "loss_steps": loss_steps}))
            if settings.keep_checkpoints:
                keep(folder / f"ckpt_{step:06}.pt", functools.partial(torch.save, weights))
        clock, clock_step = time.time(), step

    if stop:
        say(f"Stopped after step {step}. The same command goes on"
            + " (without --overwrite=True)" * settings.overwrite + ".")
    else:
        say(f"Done: {step:,} steps in {seconds / 60:.1f} minutes. A story: python sample.py "
            f"{folder}   The curve: {folder / 'loss.png'}\nTo train on: --max_steps={2 * step} "
            "--resume=True   To begin anew: --overwrite=True")
    if not saved:
        print(f"The last checkpoint of {folder} could not be saved.", file=sys.stderr)
    code = 128 + stop if stop else int(not saved)
    if world > 1:
        dist.barrier()                                  # until all have done what they do last
        sys.stdout.flush()
        os._exit(code)              # an ordinary end now and then aborts, in a thread of gloo's
    if code:
        raise SystemExit(code)


def average_gradients(model, world):
    """Replace each gradient by its mean over all ranks; they cross once a step, in one message."""
    grads = [p.grad for p in model.parameters()]
    message = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(message)
    for grad, mean in zip(grads, (message / world).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def largest(number, device):
    """The largest of the numbers that the ranks have."""
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def start(argv):
    """Read the settings, and train in the folder that they name."""
    first = os.environ.get("RANK", "0") == "0"          # the other ranks must not wait for this one
    settings = load_config(argv)
    prepare.command(train, settings, folder=Path(settings.out_dir) if first else None)


def main(argv=None):
    prepare.command(start, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
