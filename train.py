"""How does a transformer learn?

    python train.py config/demo.py                          # on a laptop, in minutes
    python train.py config/tiny_8l.py --learning_rate=1e-3  # every setting can be overridden
    torchrun --standalone --nproc_per_node=4 train.py config/tiny_8l.py  # several GPUs

Writes out/<config>/: ckpt.pt, tokenizer, log.csv and loss.png. Stop it at any time (Ctrl-C): the
same command continues exactly where it stopped.
"""

import ast
import difflib
import functools
import inspect
import math
import os
import runpy
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

# Let idle OpenMP threads sleep: 5 % slower on an idle machine, twice as fast on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from filelock import FileLock, Timeout

import prepare
from data import common
from model import GPT, GPTConfig, best_dtype, find_device, load_model, read_checkpoint, tune_malloc

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these for each process
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Settings(GPTConfig):  # the model's settings, and:
    dataset: str = "tinystories"      # a name under data/, or the path of a prepared folder
    out_dir: str = ""                 # default: out/<name of the config>
    init_from: str = ""               # start from the weights of another run
    # optimization
    optimizer: str = "muon"           # muon (matrices; AdamW for the rest) or adamw
    learning_rate: float = 5e-3       # the peak
    warmup_steps: int = 50
    cooldown_frac: float = 0.6        # fraction of the steps in which the rate falls to 0
    momentum: float = 0.85            # of Muon
    beta2: float = 0.99               # of AdamW
    weight_decay: float = 0.3         # of matrices
    grad_clip: float = 1.0            # maximum gradient norm; 0 = off
    total_batch_size: int = 65_536    # tokens per step, over all processes
    micro_batch: int = 0              # rows per forward pass (memory only); 0 = automatic
    max_steps: int = 7_000
    # evaluation, logging, saving: intervals in steps; 0 = only at the end
    eval_interval: int = 250
    eval_tokens: int = 16_384         # validation tokens read each time; 0 = all
    final_eval_tokens: int = 163_840  # validation tokens read after the last step; 0 = all
    log_interval: int = 20
    save_interval: int = 500
    keep_checkpoints: bool = False    # also keep the weights of each save, as ckpt_<step>.pt
    # machine
    seed: int = 0
    device: str = "auto"              # auto, cpu, cuda, mps
    dtype: str = "auto"               # auto, bfloat16, float16, float32
    compile: bool = True              # torch.compile, on CUDA
    overwrite: bool = False           # delete the run that is in out_dir

    options = GPTConfig.options | dict(optimizer=("muon", "adamw"),
                                       device=("auto", "cpu", "cuda", "mps"),
                                       dtype=("auto", "bfloat16", "float16", "float32"))
    positive = (*GPTConfig.positive, "learning_rate", "total_batch_size", "max_steps")

    def __post_init__(self):
        super().__post_init__()
        self.out_dir = os.path.expanduser(self.out_dir)
        if self.beta2 >= 1 or self.momentum >= 1:
            raise ValueError("beta2 and momentum must be below 1")
        if self.total_batch_size % (self.block_size * WORLD_SIZE):
            raise ValueError(f"total_batch_size={self.total_batch_size} must be a multiple of "
                             f"block_size * processes = {self.block_size * WORLD_SIZE}")


# These may differ when a run continues: they do not change the steps already made.
MAY_CHANGE = {"max_steps", "eval_interval", "eval_tokens", "final_eval_tokens", "log_interval",
              "save_interval", "keep_checkpoints", "overwrite", "out_dir", "micro_batch", "device",
              "compile"}
SAMPLE_STEPS = {25 * 2 ** i for i in range(12)}


# -------------------- settings

def usage_error(message):
    print0(f"train.py: {message}", sys.stderr)
    raise SystemExit(2)


def read_config(path):
    """The assignments of a config file -> [(name, value)], without imports and _names."""
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        usage_error(f"{path} is not a Python file: {error}")
    assigned = {node.id for node in ast.walk(tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return [(name, value) for name, value in runpy.run_path(path).items()
            if name in assigned and name[0] != "_"]


def convert(value, kind):
    """A value from a config file or the command line -> the setting's type, where possible."""
    if isinstance(value, str) and kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind is float and type(value) is int:
        return float(value)
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value  # Settings will refuse it


def load_settings(argv):
    """Settings from ["config/demo.py", "--name=value", ...]; later ones win."""
    if {"-h", "--help"} & set(argv):
        print0(f"{__doc__}\n{inspect.getsource(GPTConfig)}\n{inspect.getsource(Settings)}")
        raise SystemExit
    if not argv:
        usage_error("which config? For example: python train.py config/demo.py")
    kinds, values = {f.name: f.type for f in fields(Settings)}, {"out_dir": "out/run"}
    for arg in argv:
        if arg.startswith("--") and "=" in arg:
            assignments = [arg[2:].split("=", 1)]
        elif arg.endswith(".py") and Path(arg).is_file():
            assignments = [("out_dir", f"out/{Path(arg).stem}"), *read_config(arg)]
        else:
            usage_error(f"{arg}: no such config file (settings are written --name=value)")
        for name, value in assignments:
            if name not in kinds:
                nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0)[0]
                usage_error(f"{arg}: there is no setting {name!r}; did you mean {nearest!r}?")
            values[name] = convert(value, kinds[name])
    try:
        return Settings(**values)
    except ValueError as error:
        usage_error(error)


# -------------------- data

def load_dataset(name):
    """-> folder, its meta.json. A missing data set that prepare.py knows is prepared."""
    name = os.path.expanduser(name)
    folder = Path(name) if Path(name, "meta.json").is_file() else prepare.HERE / "data" / name
    if not (folder / "meta.json").is_file():
        if name not in prepare.SAMPLES and name not in prepare.SOURCES:
            raise SystemExit(f"There is no data set {name!r}. Prepare it first: "
                             f"python prepare.py {shlex.quote(name)} --input STORIES.txt")
        print0(f"First, python prepare.py {name}:")
        prepare.main([name])
    meta = prepare.read_meta(folder, *prepare.FILES)
    if prepare.grammar_changed(meta):
        print0(f"data/grammar.txt has changed. To use it: python prepare.py {name} --force")
    return folder, meta


@functools.lru_cache(maxsize=2)
def epoch_order(n_windows, block_size, seed, epoch):
    """Where an epoch's first window starts, and the order of its windows (n_windows,)."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(block_size)), rng.permutation(n_windows)


def get_batch(file, block_size, rows, seed):
    """The token file's windows with the numbers `rows`, counted from the start of training
    -> x, y (len(rows), block_size) int64; y is x shifted by one token.

    Each epoch shuffles the windows and shifts their borders; within an epoch, each token is a
    target at most once. A pure function: resuming a run needs no data loader state."""
    data = np.memmap(file, dtype=np.uint16, mode="r")
    n_windows = len(data) // block_size - 1
    windows = []
    for row in rows:
        epoch, i = divmod(row, n_windows)
        offset, order = epoch_order(n_windows, block_size, seed, epoch)
        start = offset + int(order[i]) * block_size
        windows.append(data[start:start + block_size + 1].astype(np.int64))
    batch = np.stack(windows)  # (rows, block_size + 1)
    return torch.tensor(batch[:, :-1]), torch.tensor(batch[:, 1:])


def validation_batches(file, eot, block_size, eval_tokens, rows=16):
    """Two views of the validation text, as lists of batches x, y: windows of the token stream, and
    whole stories, each from its beginning (cut at block_size)."""
    data = np.fromfile(file, dtype=np.uint16).astype(np.int64)
    data = data[:eval_tokens + 1] if eval_tokens else data
    n = (len(data) - 1) // block_size * block_size
    if n <= 0:
        raise SystemExit(f"{file} or eval_tokens has fewer tokens than block_size={block_size}. "
                         "Use more, or a smaller --block_size.")
    x, y = (torch.from_numpy(data[i:i + n]).view(-1, block_size) for i in (0, 1))
    windows = list(zip(x.split(rows), y.split(rows)))

    stories = np.split(data, np.flatnonzero(data == eot) + 1)  # each ends with eot
    stories = [np.append(eot, story)[:block_size + 1] for story in stories if len(story)]
    stories.sort(key=len)  # similar lengths together: little padding
    padded = []
    for i in range(0, len(stories), rows):
        batch = [torch.from_numpy(story) for story in stories[i:i + rows]]
        batch = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1)
        padded.append((batch[:, :-1].clamp(min=0), batch[:, 1:]))
    return windows, padded


def bpb_factor(batches, tokenizer):
    """The factor from nats per token of these batches to bits per byte of their text."""
    ids = torch.cat([y[y >= 0] for _, y in batches]).tolist()
    n_bytes = sum(len(tokenizer.decode_single_token_bytes(i)) for i in ids
                  if i != tokenizer.eot_token)
    return len(ids) / max(n_bytes, 1) / math.log(2)


@torch.no_grad()
def evaluate(model, batches, device, autocast):
    """Mean loss in nats per token."""
    total, count = 0.0, 0
    for x, y in batches:
        with autocast:
            _, loss = model(x.to(device), y.to(device))
        n = int((y >= 0).sum())
        total, count = total + loss.item() * n, count + n
    return total / count


# -------------------- optimizers

def orthogonalize(x):
    """Matrices (n, rows, columns) -> nearest matrices with all singular values near 1, by five
    Newton-Schulz steps with Keller Jordan's coefficients."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(best_dtype(x.device.type))
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a @ a
        x = torch.baddbmm(x, b, x, beta=3.4445)                 # 3.4445 x + b @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (Keller Jordan 2024; scaled so that AdamW's learning
    rate fits, arXiv 2502.16982). Parameters with three axes are stacks of matrices; all matrices of
    one shape are processed together."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov
                updates = orthogonalize(torch.stack(updates).view(-1, *shape[-2:]))
                scale = group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                for p, update in zip(params, updates.view(-1, *shape)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def make_optimizers(model, settings, device):
    """Muon for the matrices of the blocks and AdamW for the rest, or AdamW for everything."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if name.startswith("blocks.") and p.ndim >= 2 else others).append(p)
    decayed = {"params": matrices, "weight_decay": settings.weight_decay}
    groups, optimizers = [{"params": others, "weight_decay": 0.0}], []
    lr = settings.learning_rate
    if settings.optimizer == "muon":
        optimizers.append(Muon([decayed], dict(lr=lr, momentum=settings.momentum)))
    else:
        groups.append(decayed)
    adamw = torch.optim.AdamW(groups, lr, (0.9, settings.beta2), fused=device.type == "cuda")
    return [adamw, *optimizers]


def lr_multiplier(settings, step):
    """Learning rate as a fraction of its peak: linear warmup, flat, linear cooldown."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = (settings.max_steps - step) / max(settings.max_steps - settings.warmup_steps, 1)
    return min(1.0, left / max(settings.cooldown_frac, 1e-9))


# -------------------- checkpoints and logs

@dataclass
class Run:
    """The state of a run. A checkpoint holds all of it."""
    model: GPT
    optimizers: list
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0   # training time, without evaluation
    loss_sum: float = 0.0  # since the last line of the log
    loss_steps: int = 0
    micro_batch: int = 0
    log: list = field(default_factory=list)  # one dict per line of log.csv


COUNTERS = [f.name for f in fields(Run)][3:]  # not the objects


def save_checkpoint(settings, run, meta):
    """Write ckpt.pt, completely or not at all -> whether it worked (the next save tries again)."""
    folder = Path(settings.out_dir)
    weights = {"model": run.model.state_dict(), "model_config": asdict(run.model.config),
               "settings": asdict(settings), "meta": meta, "step": run.step}
    training = {"optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                "scaler": run.scaler.state_dict(),
                "counters": {name: getattr(run, name) for name in COUNTERS}}
    try:
        if not all(p.isfinite().all() for p in run.model.parameters()):
            raise RuntimeError("the weights are not finite")
        with common.atomic_write(folder / "ckpt.pt") as file:
            torch.save(weights | training, file)
        if settings.keep_checkpoints:
            with common.atomic_write(folder / f"ckpt_{run.step:06}.pt") as file:
                torch.save(weights, file)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        print0(f"Cannot save {folder}/ckpt.pt: {error}", sys.stderr)
        return False


def load_checkpoint(settings, run, meta):
    """Continue the run in out_dir, if there is one, exactly where it stopped."""
    path, new = Path(settings.out_dir, "ckpt.pt"), asdict(settings)
    if settings.overwrite:
        for old in path.parent.glob("ckpt*.pt"):
            old.unlink(missing_ok=True)  # another process may have been first
    if not path.exists():
        return
    keys = "model", "settings", "meta", "optimizers", "scaler", "counters"
    try:
        checkpoint = read_checkpoint(path, keys)
        old, states, counters = (checkpoint[key] for key in ("settings", "optimizers", "counters"))
        faults = [f"{name}={old.get(name)}, now {new[name]}" for name in new
                  if old.get(name) != new[name] and name not in MAY_CHANGE]
        if checkpoint["meta"] != meta:
            faults.append("another version of the data set")
        integers = counters["step"], counters["micro_batch"]
        if (set(counters) != set(COUNTERS) or counters["step"] != checkpoint["step"]
                or type(counters["log"]) is not list
                or not all(type(n) is int and n > 0 for n in integers)):
            faults.append("invalid counters")
        if len(states) != len(run.optimizers) or not all(state["state"] for state in states):
            faults.append("no state of the optimizer")
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        faults = [str(error)]
    if faults:
        raise SystemExit(f"Cannot continue {path}: {'; '.join(faults)}. Choose another --out_dir, "
                         "delete that run with --overwrite=True, or use only its weights with "
                         "--init_from.")
    run.model.load_weights(checkpoint["model"], path)
    for optimizer, state in zip(run.optimizers, states):
        for group, saved in zip(optimizer.param_groups, state["param_groups"]):
            saved["fused"] = group.get("fused")  # of this device
        optimizer.load_state_dict(state)
    run.scaler.load_state_dict(checkpoint["scaler"] or run.scaler.state_dict())
    for name in COUNTERS:
        setattr(run, name, counters[name])


def load_initial_weights(model, settings, tokenizer):
    """--init_from: start from the weights of another run of the same shape and tokenizer."""
    folder = Path(os.path.expanduser(settings.init_from))
    other, _ = load_model(folder / "ckpt.pt")
    if replace(other.config, init=settings.init) != model.config:
        raise SystemExit(f"--init_from={folder} is another kind of model: {other.config}")
    if prepare.load_tokenizer(folder)._mergeable_ranks != tokenizer._mergeable_ranks:
        raise SystemExit(f"--init_from={folder} has another tokenizer. Prepare the text with it: "
                         f"python prepare.py NAME --input FILE --tokenizer {folder}")
    model.load_state_dict(other.state_dict())


def write_log(folder, log, entropy_floor=None):
    """Write log.csv, and draw it as loss.png."""
    try:
        columns = list(dict.fromkeys(name for row in log for name in row))
        lines = [columns] + [[row.get(name, "") for name in columns] for row in log]
        common.write_text(folder / "log.csv",
                          "".join(",".join(map(str, line)) + "\n" for line in lines))
        plot_loss(folder, log, entropy_floor)
    except Exception as error:  # neither is worth stopping a training run
        print0(f"Cannot write log.csv or loss.png: {error!r}", sys.stderr)


def plot_loss(folder, log, entropy_floor=None):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    curves = {"train_loss": "training", "val_loss": "validation", "story_loss": "whole stories"}
    for column, label in curves.items():
        points = [(row["tokens"] / 1e6, row[column]) for row in log if column in row]
        if points:
            ax.plot(*zip(*points), ".-", label=label)
    if entropy_floor:
        ax.axhline(entropy_floor, color="gray", ls=":", label="entropy of the grammar")
    ax.set(xlabel="million tokens", ylabel="loss (nats per token)", yscale="log",
           title=f"Loss of {folder.name}".replace("$", r"\$"))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter("{x:.3g}")
    ax.grid(alpha=0.3, which="both")
    ax.legend()
    common.save_figure(folder / "loss.png", figure)


def print0(text, file=None):
    """Print on the first process. A full disk or a closed terminal must not stop a training run."""
    try:
        if RANK == 0:
            print(text, file=file, flush=True)
    except (OSError, ValueError):
        sys.stdout = sys.stderr = None  # Python then ignores all further prints


# -------------------- machine and processes

def setup_device(settings):
    """Connect this process with the others -> device, number format, autocast context."""
    if torch.cuda.is_available() and settings.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    name = find_device(settings.device)
    device = torch.device(name)
    if WORLD_SIZE > 1:  # one downloads, others wait
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=4))
    dtype = best_dtype(name) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    autocast = torch.autocast(name, dtype) if dtype != torch.float32 else nullcontext()
    torch.set_float32_matmul_precision("high")  # float32 products may use TF32
    tune_malloc()
    return device, dtype, autocast


def all_reduce_gradients(model):
    """Replace each gradient by its mean over all processes."""
    grads = [p.grad for p in model.parameters()]
    vector = nn.utils.parameters_to_vector(grads)
    dist.all_reduce(vector)
    nn.utils.vector_to_parameters(vector / WORLD_SIZE, grads)


def choose_micro_batch(settings, device):
    """Rows per forward pass: on a CPU the fewest at full speed, on a GPU as many as fit."""
    rows = settings.total_batch_size // settings.block_size // WORLD_SIZE
    if settings.micro_batch:
        return min(settings.micro_batch, rows)
    if device.type == "cpu":
        return min(rows, max(1, 4_096 // settings.block_size))
    bytes_per_row = 48 * settings.n_layer * settings.n_embd * settings.block_size  # roughly
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 2e9
    return min(rows, max(1, int(0.6 * memory / bytes_per_row)))


def catch_signals():
    """-> a list that receives SIGINT, SIGTERM or SIGHUP. Without torchrun, a second one kills."""
    received = []

    def handler(number, frame):
        received.append(number)
        if WORLD_SIZE == 1:  # torchrun repeats signals
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)
    return received


def announce_duration(settings, device, autocast):
    """Before anything is downloaded, say so if the run will take hours on this machine."""
    model = GPT(model_config(settings)).to(device)
    x = torch.ones(choose_micro_batch(settings, device), settings.block_size, dtype=torch.long)
    start = time.time()
    with autocast:
        _, loss = model(x.to(device), x.to(device))
    loss.backward()
    tokens = settings.max_steps * settings.total_batch_size / WORLD_SIZE  # each process
    seconds = (time.time() - start) * tokens / x.numel()
    if seconds > 2 * 3600:
        print0(f"This run takes about {seconds / 3600:,.0f} hours on this machine. For a "
               "laptop: python train.py config/tiny_laptop.py, or config/demo.py")


# -------------------- the training

def model_config(settings):
    return GPTConfig(**{f.name: getattr(settings, f.name) for f in fields(GPTConfig)})


def training_step(run, settings, device, autocast, loss_fn, file, signals):
    """One optimization step -> learning rate and gradient norm, or None if a signal came (then no
    weight has changed). loss_fn: the model, compiled or not."""
    n_rows = settings.total_batch_size // settings.block_size // WORLD_SIZE
    first = (run.step * WORLD_SIZE + RANK) * n_rows
    step_loss = 0.0
    for row in range(first, first + n_rows, run.micro_batch):
        rows = range(row, min(row + run.micro_batch, first + n_rows))
        x, y = get_batch(file, settings.block_size, rows, settings.seed)
        if device.type == "cuda":  # pinned memory is copied while the GPU works
            x, y = (ids.pin_memory().to(device, non_blocking=True) for ids in (x, y))
        with autocast:
            _, loss = loss_fn(x.to(device), y.to(device))
        loss = loss * (len(rows) / n_rows)
        run.scaler.scale(loss).backward()
        step_loss += loss.detach()
        if signals and WORLD_SIZE == 1:
            return None
    if WORLD_SIZE > 1:
        all_reduce_gradients(run.model)

    lr = settings.learning_rate * lr_multiplier(settings, run.step)
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), settings.grad_clip or math.inf)
    # float16: all optimizers skip infinite gradients
    is_valid = not run.scaler.is_enabled() or grad_norm.isfinite()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if is_valid:
            run.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    run.step, run.loss_steps = run.step + 1, run.loss_steps + 1
    run.loss_sum = run.loss_sum + step_loss  # no +=: it may be on the CPU
    return lr, grad_norm


def start_run(settings, meta, tokenizer, device, dtype):
    """Build model and optimizers; continue the run in out_dir or start a new one -> Run."""
    settings.vocab_size = meta["vocab_size"]
    torch.manual_seed(settings.seed)
    model = GPT(model_config(settings)).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(model, make_optimizers(model, settings, device), scaler)
    load_checkpoint(settings, run, meta)
    if settings.init_from and run.step == 0:
        load_initial_weights(model, settings, tokenizer)
    if settings.micro_batch or not run.micro_batch:
        run.micro_batch = choose_micro_batch(settings, device)
    tokens = settings.max_steps * settings.total_batch_size
    epochs = tokens / meta["train"]["tokens"]
    print0(f"{settings.out_dir}: {model.num_params():,} parameters ({model.num_params(False):,} "
           f"without embeddings); {tokens:,} tokens = {epochs:.2f} epochs; {device.type}, "
           f"{str(dtype).removeprefix('torch.')}, {run.micro_batch} rows at a time"
           + (f"; continuing at step {run.step:,}" if run.step else ""))
    if epochs > 20:
        print0("It reads this text many times and may memorize it: watch the validation loss.")
    return run


def print_sample(model, tokenizer, beginning):
    """Continue the beginning of a validation story."""
    eot = tokenizer.eot_token
    [ids] = model.generate([[eot, *beginning]], 50, 0.8, stop=eot)
    before, after = (" ".join(tokenizer.decode(part).split()) for part in (beginning, ids))
    print0(common.printable(f"    {before} | {after}"))


def train(settings, watch_signals=list):
    """Train or continue the run in out_dir; stop if the list from watch_signals() has an entry."""
    device, dtype, autocast = setup_device(settings)
    folder, T = Path(settings.out_dir), settings.block_size
    folder.mkdir(parents=True, exist_ok=True)
    if RANK > 0:
        dist.barrier()  # until the data is there
    elif device.type == "cpu" and not (folder / "ckpt.pt").exists():
        announce_duration(settings, device, autocast)
    data, meta = load_dataset(settings.dataset)
    if RANK == 0 and WORLD_SIZE > 1:
        dist.barrier()
    tokenizer = prepare.load_tokenizer(data)
    if meta["train"]["tokens"] < 2 * T:
        raise SystemExit(f"{data} has {meta['train']['tokens']} training tokens; block_size={T} "
                         f"needs {2 * T}.")
    quick_eval, final_eval = (validation_batches(data / "val.bin", meta["eot"], T, n)
                              for n in (settings.eval_tokens, settings.final_eval_tokens))
    beginning = np.fromfile(data / "val.bin", np.uint16, 8).tolist()
    entropy_floor = meta.get("entropy_floor")  # of the grammar, nats per token

    run = start_run(settings, meta, tokenizer, device, dtype)
    compiled = settings.compile and device.type == "cuda"
    loss_fn = torch.compile(run.model, dynamic=False) if compiled else run.model
    if RANK == 0:
        for name in ("tokenizer.tiktoken", "meta.json"):
            common.write_text(folder / name, (data / name).read_text(encoding="utf-8"))

    file = open(data / "train.bin", "rb")  # kept open: new data does not replace it
    signals, stop, saved, first_step = watch_signals(), False, True, run.step
    clock, clock_step, printed = time.time(), run.step, 0.0
    while run.step < settings.max_steps and not stop:
        result = training_step(run, settings, device, autocast, loss_fn, file, signals)
        if result is None:  # interrupted: the unfinished step is dropped
            stop = True
            break
        lr, grad_norm = result
        last = run.step == settings.max_steps
        log_due, eval_due, save_due = (last or every > 0 and run.step % every == 0 for every in (
            settings.log_interval, settings.eval_interval, settings.save_interval))
        print_due = log_due or time.time() - printed > 10  # the first step prints at once
        sample_due = last or run.step in SAMPLE_STEPS
        if WORLD_SIZE > 1 and (run.step % 10 == 0 or device.type == "cpu"):
            stop_votes = torch.tensor(len(signals), device=device)
            dist.all_reduce(stop_votes)  # all processes stop after the same step
            stop = stop_votes.item() > 0
        if WORLD_SIZE > 1 and (log_due or eval_due or save_due or stop):
            dist.all_reduce(run.loss_sum)
            run.loss_sum /= WORLD_SIZE
        if not (print_due or eval_due or sample_due or save_due):
            continue

        loss, grad_norm = float(run.loss_sum) / run.loss_steps, float(grad_norm)  # GPU syncs
        if not math.isfinite(loss if run.scaler.is_enabled() else loss + grad_norm):
            advice = "Try a smaller --learning_rate." if run.step > 1 else "Check model.py."
            raise SystemExit(f"The loss is {loss:.4g} and the gradient norm {grad_norm:.4g} after "
                             f"step {run.step:,}. {advice}")
        elapsed, row = time.time() - clock, {}
        run.seconds += elapsed
        if print_due:
            speed = (run.step - clock_step) * settings.total_batch_size / elapsed
            left = round((settings.max_steps - run.step) * settings.total_batch_size / speed)
            print0(f"step {run.step:>6,}/{settings.max_steps:,} | loss {loss:.4f} | lr {lr:.2e} | "
                   f"{speed:,.0f} tokens/s | {left // 60}m{left % 60:02}s left")
            printed = time.time()
        if log_due:
            row = {"train_loss": loss, "lr": lr, "grad_norm": grad_norm,
                   "tokens_per_s": round(speed)}
            run.loss_sum, run.loss_steps = 0.0, 0
        if RANK == 0 and eval_due:
            windows, stories = final_eval if last else quick_eval
            val_loss, story_loss = (evaluate(run.model, view, device, autocast)
                                    for view in (windows, stories))
            row |= {"val_loss": val_loss, "story_loss": story_loss,
                    "val_bpb": val_loss * bpb_factor(windows, tokenizer)}
            print0(f"step {run.step:>6,} | validation {val_loss:.4f} nats per token, "
                   f"{row['val_bpb']:.4f} bits per byte | whole stories {story_loss:.4f}"
                   + (f" (entropy of the grammar: {entropy_floor:.4f})" if entropy_floor else ""))
        if RANK == 0 and sample_due:
            print_sample(run.model, tokenizer, beginning)
        if row:
            run.log.append({"step": run.step, "tokens": run.step * settings.total_batch_size,
                            "seconds": round(run.seconds, 2), **row})
        if RANK == 0 and save_due:
            saved = save_checkpoint(settings, run, meta)
        if RANK == 0 and row:
            write_log(folder, run.log, entropy_floor)
        clock, clock_step = time.time(), run.step

    if stop and RANK == 0 and run.step > 0:
        run.seconds += time.time() - clock
        saved = save_checkpoint(settings, run, meta)
    if stop:
        print0(f"Stopped after step {run.step:,}. Run the same command to continue."
               + " Omit --overwrite." * settings.overwrite)
    elif run.step == first_step:
        print0("This run is finished. Raise --max_steps to train longer.")
    else:
        print0(f"Done: step {run.step:,}, {run.seconds / 60:.1f} minutes of training. "
               f"Try: python sample.py {shlex.quote(str(folder))}")
    if WORLD_SIZE > 1:
        dist.barrier()
        dist.destroy_process_group()
    if stop:  # or another process
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    if not saved:
        raise SystemExit(1)


def lock_run(folder):
    """Create the folder of a run and keep other commands out of it, in a with statement."""
    try:
        os.makedirs(folder, exist_ok=True)
        return FileLock(Path(folder, f".lock{RANK}")).acquire(blocking=False)
    except Timeout:
        raise SystemExit(f"Another command is training in {folder}.")
    except OSError as error:
        usage_error(f"--out_dir={folder}: {error.strerror}")


def main():
    common.setup_console(end_on_error=False)
    settings = load_settings(sys.argv[1:])
    with lock_run(settings.out_dir):
        train(settings, catch_signals)


if __name__ == "__main__":
    main()
