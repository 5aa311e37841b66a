"""How does a transformer turn the words so far into a guess at the next one?

A decoder-only transformer, written out by hand: GPT(config)(idx, targets) -> logits, loss. Of its
few switches, two settings matter. "Ours" is the default: rotary positions, RMS norm, normalised
queries and keys, squared ReLU, output projections that start at zero, values handed on from the
first layer. The paper's is GPT-Neo (arXiv 2305.07759): learned positions, LayerNorm, GELU, biases,
attention that looks only a window back in every second layer. See config/paper_8m.py.

Single letters are axes:
    B rows of a batch    T tokens of a row     S tokens that can be looked at (cache and row)
    C width (n_embd)     H heads               D width of a head (C / H)        V vocabulary
"""

import ctypes
import math
import pickle
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 10_000    # entries of the tokenizer; ids are 0 .. vocab_size - 1
    block_size: int = 512       # the longest row that the model can read, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 256           # width of the residual stream
    pos: str = "rope"           # where a token stands: rope (turned) or learned (a vector)
    norm: str = "rms"           # rms (no weights) or layer (LayerNorm)
    act: str = "relu2"          # relu2 (squared ReLU) or gelu
    qk_norm: bool = True        # RMS-normalise queries and keys: attention cannot saturate
    bias: bool = False          # in all linear maps but those of q, k and v, as in GPT-Neo
    window: int = 0             # layers 1, 3, 5 ... (of 0, 1, 2 ...) see so many tokens; 0: all
    init: str = "zero"          # what a fresh block adds: some of what it looks at (copy), nothing
                                # (zero), or noise (normal)
    value_residual: bool = True # layers mix the first one's values into theirs (arXiv 2410.17897)
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.pos == "rope" and (self.n_embd // self.n_head) % 2:
            raise ValueError(f"rope needs heads of even width, not {self.n_embd // self.n_head}")
        for name, ways in (("pos", "rope learned"), ("norm", "rms layer"), ("act", "relu2 gelu"),
                           ("init", "copy zero normal")):
            if getattr(self, name) not in ways.split():
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {ways}")
        if self.window < 0 or not 0 <= self.dropout < 1:
            raise ValueError("window must not be negative, and dropout must lie in [0, 1)")


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square."""

    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),))


def make_norm(config):
    return RMSNorm() if config.norm == "rms" else nn.LayerNorm(config.n_embd)


def rotary_table(length, D):
    """Cosines and sines of the angles by which a position turns each pair of a head's numbers
    (arXiv 2104.09864) -> (2, length, D). The halves of a head are the two sides of its pairs."""
    speed = 10_000.0 ** (-torch.arange(0, D, 2).float() / D)    # one radian a token to almost none
    angle = torch.arange(length).float()[:, None] * speed       # (length, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


def rotate(x, table):
    """Turn x (..., T, D) by a table (2, T, D): the product of a turned query and a turned key
    depends on their distance, not on where they stand."""
    cos, sin = table.to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin     # (a, b) -> (a c - b s, b c + a s)


class Cache:
    """The keys and values of the tokens read so far, so that no token is read twice."""

    def __init__(self, config, rows, device, dtype):
        shape = (config.n_layer, rows, config.n_head, config.block_size,
                 config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)     # (layers, B, H, block_size, D)
        self.v = torch.empty_like(self.k)
        self.length = 0                                             # tokens in it

    def extend(self, layer, k, v):
        """Append k and v (B, H, T, D) to a layer -> all its keys and values (B, H, S, D)."""
        S = self.length + k.size(2)
        self.k[layer, :, :, self.length:S], self.v[layer, :, :, self.length:S] = k, v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def keep(self, rows):
        """Forget all rows but these, a mask (B,)."""
        rows = rows.to(self.k.device)
        self.k = self.k[:, rows]        # one after the other, so that never both are there twice
        self.v = self.v[:, rows]


def look_back(T, S, window, device):
    """Which of S tokens each of the last T may look at: itself and at most window - 1 before it
    -> (T, S) bool."""
    j = torch.arange(S, device=device)
    i = j[S - T:, None]
    return (j <= i) & (j > i - window)


def attend(q, k, v, mask=None, dropout=0.0):
    """Queries (B, H, T, D), keys and values (B, H, S, D) -> what each query gathers (B, H, T, D).
    mask (T, S) says who may look at whom; without one, each looks at itself and all before it (on
    a CPU, only a single query goes without). Many queries are matrix products, which a GPU's fused
    kernel does without ever writing the scores down (arXiv 2205.14135). A single one, as sampling
    has it, is faster as a sum: a product would be prepared anew for each S."""
    many = q.size(2) > 1
    if many and q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)
    q = q * q.size(-1) ** -0.5
    scores = q @ k.mT if many else (q * k).sum(dim=-1)[:, :, None]      # (B, H, T, S)
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)         # how much of each value
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ v if many else (weights.mT * v).sum(dim=2, keepdim=True)


class Attention(nn.Module):
    """Each token gathers from the tokens before it what it asks for."""

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.qk_norm, self.dropout = config.qk_norm, config.dropout
        self.qkv = nn.Parameter(torch.empty(3, C, C).normal_(std=0.02))     # three matrices
        self.out = nn.Linear(C, C, bias=config.bias)
        mixes = config.value_residual and layer > 0
        self.mix = nn.Parameter(torch.tensor(0.5)) if mixes else None   # the first layer's share

    def forward(self, x, mask=None, rotary=None, first=None, cache=None):
        """x (B, T, C), the first layer's values (B, H, T, D) or None -> (B, T, C), those values."""
        B, T, C = x.shape
        qkv = F.linear(x, self.qkv.flatten(0, 1)).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))        # (2, B, H, T, D), (1, B, H, T, D)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k, v = *qk, v[0]                                     # each (B, H, T, D)
        first = v if first is None else first
        if self.mix is not None:
            v = torch.lerp(v, first, self.mix.to(v.dtype))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                           # (B, H, S, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), first


def relu2(x):
    """Squared ReLU (arXiv 2109.08668)."""
    x = F.relu(x)
    return x * x        # x.square() would be done in float32 by autocast on a GPU


class MLP(nn.Module):
    """Each token thinks for itself: widen, cut off, narrow."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = {"relu2": relu2, "gelu": lambda x: F.gelu(x, approximate="tanh")}[config.act]
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.down(self.act(self.up(x)))      # (B, T, C) -> (B, T, 4 C) -> (B, T, C)


class Block(nn.Module):
    """A layer: attention, then the MLP; each reads the stream, normalised, and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm_1, self.attention = make_norm(config), Attention(config, layer)
        self.norm_2, self.mlp = make_norm(config), MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, rotary=None, first=None, cache=None):
        y, first = self.attention(self.norm_1(x), mask, rotary, first, cache)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.norm_2(x))), first


class HeadLoss(torch.autograd.Function):
    """The mean cross-entropy of vectors x (N, C), scored against each row of weight (V, C), and
    targets (N,), -1 where nothing is asked.

    The scores (N, V) are by far the largest thing in a step, and in float32 there would be several
    of them: here a slice of rows is scored, and since the gradient of its scores is known at once
    (their softmax, less one at the target), nothing of the slice has to be kept for later."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, low_weight, asked = x.to(dtype), weight.to(dtype), targets >= 0
        rows = 512 if device == "cpu" else 8192         # fits a CPU's cache; keeps a GPU busy
        total, x_grad, weight_grad = 0.0, torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), rows):
            here = slice(i, i + rows)
            target, mask = targets[here, None].clamp(min=0), asked[here, None]
            logp = F.log_softmax(x[here] @ low_weight.T, dim=-1, dtype=torch.float32)   # (rows, V)
            total = total - (logp.gather(1, target) * mask).sum()
            grad = logp.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=logp.dtype))
            grad = grad.mul_(mask).to(dtype)                                            # (rows, V)
            x_grad[here] = grad @ low_weight                                            # (rows, C)
            weight_grad += grad.T @ x[here]                                             # (V, C)
        count = asked.sum().clamp(min=1)
        ctx.save_for_backward(x_grad, weight_grad, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        x_grad, weight_grad, count = ctx.saved_tensors
        return x_grad.float() * (grad / count), weight_grad * (grad / count), None


def read_checkpoint(path, device="cpu"):
    """What torch.save wrote, as long as that is tensors and plain values. ValueError: it is not."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it is damaged, or more than weights (it may hold code): it stays closed")


def best_device():
    """The kind of the fastest device that torch sees here."""
    mps = torch.backends.mps.is_available()
    return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"


def best_dtype(device):
    """What a device ("cpu", "cuda", "mps") multiplies fastest: bfloat16 where the hardware is made
    for it, float16 on older GPUs, else float32."""
    if device == "cuda":
        real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float16
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        slow = "Intel" in can.get("cpu_name", "")       # without AMX: half as fast as float32
        fast = can.get("amx_bf16") or can.get("avx512_bf16") and not slow
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def keep_memory():
    """Linux's malloc hands large arrays back as soon as they are free, and clears them page by page
    when they are asked for again, in each step. Let it keep them."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)                   # M_TRIM_THRESHOLD (malloc.h)
        if not libc.mallopt(-3, 1 << 30):           # M_MMAP_THRESHOLD
            libc.mallopt(-3, 1 << 25)               # the most that glibc before 2.35 takes


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        padded = math.ceil(config.vocab_size / 64) * 64     # matrix units want round sizes
        self.token_embedding = nn.Embedding(padded, C)      # its transpose is the head, too
        learned = config.pos == "learned"
        table = rotary_table(config.block_size, C // config.n_head)
        self.position_embedding = nn.Embedding(config.block_size, C) if learned else None
        self.register_buffer("rotary", None if learned else table, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.apply(self._init)
        with torch.no_grad():       # a token's own logit, std * C, must not grow with the width,
            self.token_embedding.weight *= min(1.0, 256 / C)    # or it would only predict itself
        std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == "normal" else 0.0
        for block in self.blocks:       # all that adds to the stream: together it keeps its size
            nn.init.normal_(block.attention.out.weight, std=std)
            nn.init.normal_(block.mlp.down.weight, std=std)
            if config.init == "copy":   # for a word that a story has used is likelier to come again
                with torch.no_grad():
                    nn.init.eye_(block.attention.qkv[2])
                    nn.init.eye_(block.attention.out.weight).mul_(0.3)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, name):
        """A model that the paper's authors released, turned into one of ours: its name,
        "roneneldan/TinyStories-33M", or a folder with its config.json and weights."""
        from study.released import read_model       # here: this file needs no other one
        return read_model(name)

    def hidden(self, idx, cache=None):
        """idx (B, T) int64 -> what the head reads, (B, T, C). cache: a Cache that holds the tokens
        before idx; idx is added to it. ValueError: more tokens than block_size."""
        start, T = cache.length if cache else 0, idx.size(1)
        end, window = start + T, self.config.window
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        x = self.token_embedding(idx)                                   # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:end]
        x = self.drop(x)
        rotary = None if self.rotary is None else self.rotary[:, start:end]
        kernel = T == end and x.device.type != "cpu"        # it masks by itself, without a cache
        far = None if T == 1 or kernel else look_back(T, end, end, x.device)
        near = look_back(T, end, window, x.device) if 0 < window < end else far
        first = None                                        # the values of the first layer
        for layer, block in enumerate(self.blocks):
            x, first = block(x, near if layer % 2 else far, rotary, first, cache)
        if cache:
            cache.length = end
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V padded to a multiple of 64), loss in nats per token.

        targets (B, T): the id that follows each token, -1 where nothing is asked; without them
        the loss is None. cache: see `hidden`."""
        logits = F.linear(self.hidden(idx, cache), self.token_embedding.weight)     # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def loss(self, idx, targets):
        """The loss of `forward`, and the same gradients, without ever holding all the logits."""
        x = self.hidden(idx).flatten(0, 1)                              # (B T, C)
        return HeadLoss.apply(x, self.token_embedding.weight, targets.flatten())

    def count_parameters(self, embeddings=True):
        return sum(p.numel() for name, p in self.named_parameters()
                   if embeddings or "embedding" not in name)

    def flops_per_token(self):
        """Operations of a training step per token: 6 a weight, and the attention's own."""
        c = self.config
        return 6 * self.count_parameters() + 12 * c.n_layer * c.n_embd * c.block_size

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None,
               seed=0):
        """Continue B prompts (lists of one id or more, of any lengths) at once, token by token.

        Each yield is a list of B entries: the new id, or None for a row that still reads its
        prompt or has ended. A row ends with the id `stop` (which is yielded) or after
        max_new_tokens. The rows march in step from position 0: while a short prompt is being
        continued, a longer one is still being read, so nothing is padded."""
        if not prompts or not min(map(len, prompts)):
            raise ValueError("a prompt needs at least one token (the end mark starts a story)")
        B, block_size = len(prompts), self.config.block_size
        device = self.token_embedding.weight.device
        generator = torch.Generator().manual_seed(seed)     # on the CPU: alike on every device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.zeros(B, int(lengths.max()) + max_new_tokens, dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        cache = Cache(self.config, B, device, self.token_embedding.weight.dtype)
        t = new = int(lengths.min())        # tokens that all rows have; those not yet in the cache
        alive, was_training = torch.full((B,), max_new_tokens > 0), self.training
        rows = torch.arange(B)              # those in the cache
        self.eval()
        while alive.any():
            if 2 * alive.sum() <= len(rows):                # half have ended: go on without them
                cache.keep(alive[rows])
                rows = rows[alive[rows]]
            if cache.length + new > block_size:             # full: go on with the newer half
                cache.length, new = 0, min(t, max(1, block_size // 2))
            logits = self(tokens[rows, t - new:t].to(device), cache=cache)[0][:, -1]    # (rows, V)
            logits = logits[:, :self.config.vocab_size]     # padding is never drawn
            u = torch.rand(B, 1, generator=generator)[rows]                             # (rows, 1)
            drawn = draw(logits, u.to(device), temperature, top_k, top_p).cpu()         # (rows,)
            tokens[rows, t] = torch.where(t < lengths[rows], tokens[rows, t], drawn)
            writes = alive & (t >= lengths)                                             # (B,)
            yield [token if write else None
                   for token, write in zip(tokens[:, t].tolist(), writes.tolist())]
            alive &= t + 1 < lengths + max_new_tokens
            if stop is not None:
                alive &= ~(writes & (tokens[:, t] == stop))
            t, new = t + 1, 1
        self.train(was_training)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None,
                 seed=0):
        """Continue B prompts, as `stream` does -> B lists of new ids, without `stop`."""
        written = [[] for _ in idx]
        for tokens in self.stream(idx, max_new_tokens, temperature, top_k, top_p, stop, seed):
            for row, token in zip(written, tokens):
                if token is not None and token != stop:
                    row.append(token)
        return written


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw one id a row from logits (B, V) by numbers u (B, 1) from [0, 1) -> (B,). Temperature 0
    takes the likeliest; top_k keeps the k likeliest; top_p those whose probabilities first add up
    to p (arXiv 1904.09751)."""
    if temperature < 1e-4:      # so cold that nothing else is left, and numbers would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    probs = F.softmax(logits, dim=-1)                       # (B, V)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        tail = ordered.cumsum(dim=-1) - ordered >= top_p    # what comes before already adds up to p
        probs = torch.zeros_like(probs).scatter(1, order, ordered.masked_fill(tail, 0.0))
    ladder = probs.cumsum(dim=-1)                           # one number a row finds its rung
    rung = torch.searchsorted(ladder, u * ladder[:, -1:], right=True)
    return rung.squeeze(1).clamp(max=logits.size(-1) - 1)
