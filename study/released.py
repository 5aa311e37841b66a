"""How does a model that others trained become one of ours?

    python sample.py roneneldan/TinyStories-33M         # what the paper's authors released
    python sample.py folder                             # one with GPT-Neo's config.json and weights

The paper's models are GPT-Neos. Ours becomes one by its switches (see PAPER), and what GPT-Neo does
differently beyond them goes into the weights: it does not divide a query's product with a key by
the root of the head size, so its queries are multiplied by that. What is fetched becomes a run like
any other, out/TinyStories-33M/, which every script can read.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

import prepare
from model import GPT, GPTConfig, read_checkpoint

# The paper's switches, what GPT-Neo's config.json calls our sizes, and what its files call our
# weights (to be replaced in this order).
PAPER = dict(pos="learned", norm="layer", act="gelu", qk_norm=False, bias=True, init="normal",
             value_residual=False)
NEO_SIZES = {"vocab_size": "vocab_size", "block_size": "max_position_embeddings",
             "n_layer": "num_layers", "n_head": "num_heads", "n_embd": "hidden_size",
             "window": "window_size"}
NEO_NAMES = {"blocks": "transformer.h", "norm_": "ln_", "norm": "transformer.ln_f",
             "attention": "attn.attention", ".out": ".out_proj", ".up": ".c_fc", ".down": ".c_proj",
             "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe"}


def neo_names(name):
    """Where GPT-Neo keeps a weight of ours: one name, or one for each matrix of a stack."""
    for ours, theirs in NEO_NAMES.items():
        name = name.replace(ours, theirs)
    return [name.replace("qkv", f"{x}_proj.weight") for x in "qkv"] if "qkv" in name else [name]


def neo_config(config):
    """The config.json of the GPT-Neo that a GPTConfig with the paper's switches describes."""
    kinds = [("global", "local")[layer % 2] for layer in range(config.n_layer)]
    return {"model_type": "gpt_neo", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True, "attention_types": [[kinds, 1]],
            **{theirs: getattr(config, ours) for ours, theirs in NEO_SIZES.items()},
            "window_size": config.window or config.block_size}


def read_weights(folder):
    """The tensors of a released model: those of model.safetensors, or of pytorch_model.bin."""
    file, weights = folder / "model.safetensors", {}
    if not file.is_file():
        return read_checkpoint(folder / "pytorch_model.bin")
    raw = bytearray(file.read_bytes())      # the size of the header, the header, the numbers
    start = 8 + int.from_bytes(raw[:8], "little")
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, entry in json.loads(raw[8:start]).items():
        if entry.get("dtype") in dtypes:    # the others are masks
            begin, end = entry["data_offsets"]
            flat = torch.frombuffer(raw[start + begin:start + end], dtype=dtypes[entry["dtype"]])
            weights[name] = flat.view(entry["shape"])
    return weights


def read_model(name):
    """A name on the hub (which is fetched into out/) or a folder -> GPT. ValueError: it does what
    ours cannot."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path("out", folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "pytorch_model.bin"):
            prepare.download(prepare.hub_url(name, "main", file, kind=""), folder / file)
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if theirs.get("model_type") != "gpt_neo":
        raise ValueError(f"{name} is of the type {theirs.get('model_type')}, not gpt_neo")
    config = GPTConfig(**{ours: theirs[key] for ours, key in NEO_SIZES.items()}, **PAPER)
    kinds = [kind for kinds, n in theirs["attention_types"] for kind in kinds * n]
    theirs["attention_types"] = [[kinds, 1]]
    for key, value in neo_config(config).items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{name} has the {key} {theirs[key]}; ours must be {value}")
    weights, model, state = read_weights(folder), GPT(config), {}
    for ours in model.state_dict():
        parts = [weights[part].float() for part in neo_names(ours)]
        state[ours] = torch.stack(parts) if len(parts) > 1 else parts[0]
        if "qkv" in ours:
            state[ours][0] *= math.sqrt(config.n_embd // config.n_head)
    rows = state["token_embedding.weight"]                  # ours has a multiple of 64 of them
    state["token_embedding.weight"] = F.pad(rows, (0, 0, 0, -len(rows) % 64))
    model.load_state_dict(state)
    return model.eval()


def adopt(name, folder):
    """Give the folder of a released model what that of a run has; the checkpoint comes last."""
    words, meta = folder / "tokenizer.tiktoken", folder / "meta.json"
    try:
        model = read_model(name)
        if not words.exists():              # study/export.py has written it
            prepare.save_tokenizer(folder, prepare.gpt2_ranks())
        tokenizer = prepare.load_tokenizer(folder)
        if tokenizer.n_vocab != model.config.vocab_size:
            raise ValueError(f"it has {model.config.vocab_size:,} tokens, and {words} "
                             f"{tokenizer.n_vocab:,}; put the right tokenizer.tiktoken there")
        if not meta.exists():               # the text that it has read is not here in its tokens
            prepare.write_text(meta, json.dumps({
                "dataset": "instruct" if "-Inst" in folder.name else "tinystories",
                "source": name, "vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token,
                "train": {"tokens": 0}}, indent=1))
        weights = {"model": model.state_dict(), "model_config": asdict(model.config),
                   "settings": {}, "step": 0, "meta": json.loads(meta.read_text("utf-8"))}
        with prepare.whole(folder / "ckpt.pt") as file:
            torch.save(weights, file)
    except Exception as error:              # a damaged file can raise nearly anything
        why = " ".join(str(error).split())[:200]
        raise SystemExit(f"{name} cannot become a run: {type(error).__name__}: {why}")
