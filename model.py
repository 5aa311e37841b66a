"""How does a transformer predict the next token?

A GPT written out in full: GPT(config)(idx) -> logits, None; with targets -> None, loss. The
defaults are a modern recipe (rotary positions, RMS norm, normalized queries and keys, squared ReLU,
value residual); config/paper_8m.py sets the switches to the paper's GPT-Neo (arXiv 2305.07759).

Tensor axes: B batch, T time, S cached positions plus T, C channels, H heads, D head size (C / H),
V vocabulary.
"""

import ctypes
import math
import sys
import zipfile
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 10_000     # train.py: of the data set
    block_size: int = 512        # longest context, in tokens
    n_layer: int = 8
    n_head: int = 4
    n_embd: int = 256
    pos: str = "rope"            # position encoding: rope or learned
    norm: str = "rms"            # rms or layer
    act: str = "relu2"           # relu2 (squared ReLU) or gelu
    qk_norm: bool = True         # RMS-normalize queries and keys
    bias: bool = False           # biases in linear layers (not in q, k, v), as in GPT-Neo
    window: int = 0              # every second layer sees only this many tokens; 0 = all
    init: str = "zero"           # of residual branches: zero, copy (a copying head) or normal
    value_residual: bool = True  # mix the first layer's values into all others

    # Allowed values; no settings, as they have no type.
    options = dict(pos=("rope", "learned"), norm=("rms", "layer"), act=("relu2", "gelu"),
                   init=("zero", "copy", "normal"))
    positive = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")

    def __post_init__(self):
        for f in fields(self):
            value, expected = getattr(self, f.name), ""
            if type(value) is not f.type:
                expected = f"a value of type {f.type.__name__}"
            elif value not in self.options.get(f.name, [value]):
                expected = f"one of {self.options[f.name]}"
            elif f.name in self.positive and not 0 < value < math.inf:
                expected = "a number above 0"
            elif f.type in (int, float) and not 0 <= value < 1 << 63:
                expected = "at least 0 and below 2^63"
            if expected:
                raise ValueError(f"{f.name}={value!r}: expected {expected}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd}: expected a multiple of {2 * self.n_head} "
                             "(2 * n_head)")


# -------------------- building blocks

def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd)
    return nn.RMSNorm(config.n_embd, elementwise_affine=False)


def precompute_rope(block_size, D, base=10_000.0):
    """Cosines and sines of the rotary angles (arXiv 2104.09864), the factors of x and x.roll in
    apply_rope -> (2, block_size, D)."""
    freqs = base ** (-torch.arange(0, D, 2).float() / D)           # (D / 2,)
    angles = torch.outer(torch.arange(block_size).float(), freqs)  # (block_size, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def apply_rope(x, rope):
    """Rotate pairs (x[i], x[i + D / 2]) of x (..., T, D) by the angles in rope (2, T, D)."""
    cos, sin = rope.to(x.dtype)  # (T, D) each
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def attention_bias(q, S, window):
    """Additive mask for the scores of T queries q (B, H, T, D) and S keys -> (T, S): 0 for a token
    itself and those before it (with a window, only the last `window` of them), -inf elsewhere.
    Without a window, None for a single query, or where the fused kernel has is_causal."""
    T = q.size(2)
    if not window and (T == 1 or T == S and q.device.type != "cpu"):
        return None
    i = torch.arange(S - T, S, device=q.device)[:, None]  # positions of the queries
    j = torch.arange(S, device=q.device)                  # positions of the keys
    visible = (j <= i) & (j > i - (window or S))          # (T, S)
    return torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill(~visible, -math.inf)


def attention(q, k, v, window=0):
    """Causal attention of the last T of S positions. q (B, H, T, D), k and v (B, H, S, D)
    -> (B, H, T, D)."""
    T, bias = q.size(2), attention_bias(q, k.size(2), window)
    if T > 1 and q.device.type != "cpu":  # fused: never stores the scores
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
    # Written out: faster than the fused kernel on a CPU in bfloat16, and for a single query on a
    # GPU, where cuDNN would plan its kernel again for each new S.
    scores = q / math.sqrt(q.size(-1)) @ k.mT             # (B, H, T, S)
    scores = scores if bias is None else scores + bias
    weights = scores.softmax(dim=-1, dtype=scores.dtype)  # autocast would use float32
    return weights @ v


class KVCache:
    """Keys and values (n_layer, B, H, block_size, D) of the first `length` tokens."""

    def __init__(self, config, B, device, dtype):
        D = config.n_embd // config.n_head
        shape = (config.n_layer, B, config.n_head, config.block_size, D)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def update(self, layer, k, v):
        """Append k and v (B, H, T, D) -> all keys and values of this layer (B, H, S, D).
        GPT.forward sets the new length."""
        S = self.length + k.size(2)
        self.k[layer, :, :, self.length:S] = k
        self.v[layer, :, :, self.length:S] = v
        return self.k[layer, :, :, :S], self.v[layer, :, :, :S]

    def select_rows(self, rows):
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.window = config.window if layer % 2 else 0
        # Stacked, so that Muon orthogonalizes the matrices of q, k and v one by one.
        self.qkv = nn.Parameter(torch.empty(3, C, C).normal_(std=0.02))
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.value_lambda = None
        if config.value_residual and layer > 0:
            self.value_lambda = nn.Parameter(torch.tensor(0.5))

    def project_qkv(self, x, rope=None, v1=None):
        """x (B, T, C), v1 the first layer's values or None -> q, k, v, v1, each (B, H, T, D)."""
        B, T, C = x.shape
        qkv = F.linear(x, self.qkv.flatten(0, 1))                        # (B, T, 3C)
        qkv = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        qk, v = qkv[:2], qkv[2]
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:])
        if rope is not None:
            qk = apply_rope(qk, rope)
        if v1 is None:
            v1 = v
        elif self.value_lambda is not None:
            v = torch.lerp(v, v1, self.value_lambda.to(v.dtype))  # arXiv 2410.17897
        return *qk, v, v1

    def forward(self, x, rope=None, v1=None, cache=None):
        """x (B, T, C), v1 the first layer's values (B, H, T, D) or None -> (B, T, C), v1."""
        B, T, C = x.shape
        q, k, v, v1 = self.project_qkv(x, rope, v1)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)         # (B, H, S, D)
        y = self.apply_attention(q.to(k.dtype), k, v).to(q.dtype)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), v1

    def apply_attention(self, q, k, v):  # the studies call it, too
        return attention(q, k, v, self.window)


class MLP(nn.Module):
    """Position-wise feed-forward network: C -> 4C -> C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.act = config.act

    def forward(self, x):
        x = self.c_fc(x)
        if self.act == "gelu":
            x = F.gelu(x, approximate="tanh")
        else:
            x = F.relu(x)
            x = x * x  # squared ReLU (arXiv 2109.08668)
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.norm_1, self.attn = make_norm(config), Attention(config, layer)
        self.norm_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, rope=None, v1=None, cache=None):
        y, v1 = self.attn(self.norm_1(x), rope, v1, cache)
        x = x + y
        x = x + self.mlp(self.norm_2(x))
        return x, v1


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) @ weight.T (V, C) against targets (N,), -1 = ignored.

    The logits (N, V) are the largest tensor of a training step. Here they exist only for one chunk
    of rows at a time: the gradient of the logits is softmax minus one-hot, so the gradients of x
    and weight are computed already in the forward pass, and no logits are kept."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, w, valid = x.to(dtype), weight.to(dtype), targets >= 0
        n_valid = valid.sum().clamp(min=1)
        chunk = 512 if device == "cpu" else 8192  # fits the CPU's cache; keeps a GPU busy
        loss, x_grad, w_grad = 0.0, torch.empty_like(x), torch.zeros_like(weight)
        for i in range(0, len(x), chunk):
            rows = slice(i, i + chunk)
            target, mask = targets[rows, None].clamp(min=0), valid[rows, None]
            logp = F.log_softmax(x[rows] @ w.T, dim=-1, dtype=torch.float32)  # (chunk, V)
            loss = loss - (logp.gather(1, target) * mask).sum()
            grad = logp.exp_()  # softmax, and minus one-hot:
            grad.scatter_add_(1, target, -torch.ones_like(target, dtype=grad.dtype))
            grad = grad.mul_(mask).to(dtype)  # / n_valid later: float16 would round to 0
            x_grad[rows] = grad @ w
            w_grad += grad.T @ x[rows]
        ctx.save_for_backward(x_grad, w_grad, n_valid)
        return loss / n_valid

    @staticmethod
    def backward(ctx, grad):
        x_grad, w_grad, n_valid = ctx.saved_tensors
        grad = grad / n_valid
        return x_grad.float() * grad, w_grad * grad, None


# -------------------- the model

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        C, D = config.n_embd, config.n_embd // config.n_head
        padded_vocab = 64 * math.ceil(config.vocab_size / 64)  # a faster shape for GPUs
        self.token_embedding = nn.Embedding(padded_vocab, C)   # also the output head
        self.position_embedding = None
        if config.pos == "learned":
            self.position_embedding = nn.Embedding(config.block_size, C)
        rope = precompute_rope(config.block_size, D) if config.pos == "rope" else None
        self.register_buffer("rope", rope, persistent=False)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        config, C = self.config, self.config.n_embd
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # With a tied head, a token's own logit is std * C: keep it small for wide models.
        self.token_embedding.weight *= min(1.0, 256 / C)
        # Residual branches start at zero, or scaled by depth to keep the variance.
        std = 0.02 / math.sqrt(2 * config.n_layer) if config.init == "normal" else 0.0
        for block in self.blocks:
            nn.init.normal_(block.attn.c_proj.weight, std=std)
            nn.init.normal_(block.mlp.c_proj.weight, std=std)
            if config.init == "copy":  # repeated words become more likely
                nn.init.eye_(block.attn.qkv[2])
                block.attn.c_proj.weight.copy_(0.3 * torch.eye(C))

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), None; or, with targets (B, T), None, mean loss in
        nats per token (-1 = ignored). The cache holds the tokens before idx; idx is appended."""
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens exceed block_size={self.config.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[start:end]
        rope = None if self.rope is None else self.rope[:, start:end]
        v1 = None
        for block in self.blocks:
            x, v1 = block(x, rope, v1, cache)
        if cache:
            cache.length = end
        x, lm_head = self.norm(x), self.token_embedding.weight
        if targets is not None:
            return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), lm_head, targets.flatten())
        return F.linear(x, lm_head)[..., :self.config.vocab_size], None

    def load_weights(self, state_dict, path):
        """Load the weights of a checkpoint. SystemExit if they do not fit."""
        try:
            self.load_state_dict(state_dict)
        except (RuntimeError, TypeError) as error:
            raise SystemExit(f"The weights in {path} do not fit this model.py: {error}")

    @torch.no_grad()
    def remove_head(self, layer, head):
        """Switch off one attention head: its output is no longer added to the residual stream."""
        D = self.config.n_embd // self.config.n_head
        self.blocks[layer].attn.c_proj.weight[:, head * D:(head + 1) * D] = 0

    def num_params(self, embeddings=True):
        return sum(p.numel() for name, p in self.named_parameters()
                   if embeddings or "embedding" not in name)

    @torch.inference_mode()
    def stream(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None,
               seed=0):
        """Continue B prompts (lists of ids, any lengths) together, one token per step. Each step
        yields B entries: the new id, or None (prompt not finished, or row already ended).

        All rows advance one position per step: while a short prompt is already being continued, a
        longer one is still being read. So nothing is padded, and no masks are needed."""
        if not all(prompts):
            raise ValueError("a prompt needs at least one token")
        device, B = self.token_embedding.weight.device, len(prompts)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: equal on every device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        tokens = torch.zeros(B, int(lengths.max()) + max_new_tokens, dtype=torch.long)
        for row, prompt in zip(tokens, prompts):
            row[:len(prompt)] = torch.tensor(prompt)
        # float32 on a CPU: products of another size for each token have a setup cost in bfloat16.
        dtype = torch.float32 if device.type == "cpu" else self.token_embedding.weight.dtype
        cache = KVCache(self.config, B, device, dtype)
        rows = torch.arange(B)  # rows that are still in the cache
        active = torch.full((B,), max_new_tokens > 0)
        t = n_new = int(lengths.min())  # position; tokens not yet in the cache
        while active.any():
            if 2 * active.sum() <= len(rows):  # half of the rows have ended: drop them
                cache.select_rows(active[rows].to(device))
                rows = rows[active[rows]]
            if cache.length + n_new > self.config.block_size:  # full: re-read the newer half
                cache.length, n_new = 0, min(t, max(1, self.config.block_size // 2))
            # oneDNN plans each product on a CPU; for a single token, that costs too much.
            torch.backends.mkldnn.enabled = len(rows) * n_new > 1
            logits, _ = self(tokens[rows, t - n_new:t].to(device), cache=cache)
            torch.backends.mkldnn.enabled = True
            u = torch.rand(B, generator=generator)[rows].to(device)
            sampled = sample_next_token(logits[:, -1], u, temperature, top_k, top_p).cpu()
            tokens[rows, t] = torch.where(t < lengths[rows], tokens[rows, t], sampled)
            generated = active & (t >= lengths)
            yield [token if new else None
                   for token, new in zip(tokens[:, t].tolist(), generated.tolist())]
            active &= t + 1 < lengths + max_new_tokens
            if stop is not None:
                active &= ~(generated & (tokens[:, t] == stop))
            t, n_new = t + 1, 1

    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None,
                 seed=0):
        """Continue B prompts -> B lists of new ids, without `stop`."""
        outputs = [[] for _ in prompts]
        for ids in self.stream(prompts, max_new_tokens, temperature, top_k, top_p, stop, seed):
            for output, token in zip(outputs, ids):
                if token is not None and token != stop:
                    output.append(token)
        return outputs


class NonFiniteLogits(SystemExit):
    """The logits are NaN or infinite: the training failed, or model.py has a bug."""


def sample_next_token(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Sample one id per row from logits (B, V) with uniform numbers u (B,) in [0, 1) -> (B,)."""
    if not logits.amax(dim=-1).isfinite().all():
        raise NonFiniteLogits(NonFiniteLogits.__doc__)
    if temperature < 1e-4:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:  # nucleus sampling (arXiv 1904.09751)
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p
        probs = torch.zeros_like(probs).scatter(1, order, sorted_probs.masked_fill(outside, 0.0))
    cdf = probs.cumsum(dim=-1)  # inverse transform sampling
    next_id = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    return next_id.squeeze(1).clamp(max=logits.size(-1) - 1)


# -------------------- devices

def find_device(name="auto"):
    """auto -> the fastest device here. SystemExit if torch cannot use it."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.ones(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device={name} does not work here: {str(error).splitlines()[0]}")
    return name


def best_dtype(device):
    """The fastest type for matrix products: bfloat16 where the hardware has it, float16 on older
    GPUs, else float32."""
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.9 cannot tell
        cpu = torch.cpu.get_capabilities()
        intel = "Intel" in cpu.get("cpu_name", "")  # without AMX, bfloat16 is slower there
        if cpu.get("amx_bf16") or cpu.get("avx512_bf16") and not intel:
            return torch.bfloat16
    return torch.float32


def tune_malloc():
    """Let Linux's malloc keep large freed arrays instead of returning them to the system. On a CPU
    this saves a seventh of a training step and over half of sampling long texts."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 1 << 30)          # M_TRIM_THRESHOLD
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD
            libc.mallopt(-3, 1 << 25)      # the maximum before glibc 2.35


def read_checkpoint(path, keys=()):
    """Load a dict of tensors and plain values. ValueError if it is damaged, holds code or lacks one
    of the keys."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load ignores CRCs, zeroes folders
            if archive.testzip() or any(
                    e.compress_type or e.external_attr & 16 for e in archive.infolist()):
                raise ValueError
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError:
        raise
    except Exception:  # a damaged archive can raise anything
        raise ValueError("it is damaged, or contains more than weights")
    if missing := [key for key in keys if key not in checkpoint]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return checkpoint


def load_model(path):
    """Build the model that a checkpoint describes -> GPT, checkpoint. SystemExit if that fails."""
    try:
        checkpoint = read_checkpoint(path, ("model", "model_config"))
        config = GPTConfig(**checkpoint["model_config"])
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"Cannot load {path}: {error}")
    model = GPT(config)
    model.load_weights(checkpoint["model"], path)
    return model, checkpoint
