"""How do we exchange models with transformers?

    python -m study.hf roneneldan/TinyStories-33M       # what the paper's authors released
    python -m study.hf FOLDER                           # a GPT-Neo that transformers has saved
    python -m study.hf --export out/paper_8m FOLDER     # a run of ours, for transformers

An import writes out/<name>/, on which all scripts work. An export is read by AutoModelForCausalLM;
its tokenizer stays prepare.load_tokenizer(FOLDER). Only the paper's architecture can be exchanged
(config/paper_8m.py). It takes seconds; a download has a few hundred MB.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
import train
from data import common
from data.common import download, hub_url
from model import GPT, GPTConfig, read_checkpoint

# Our weights, and what GPT-Neo calls them; to be replaced in this order.
NAMES = {"token_embedding": "transformer.wte", "position_embedding": "transformer.wpe",
         "blocks.": "transformer.h.", ".norm_": ".ln_", "norm.": "transformer.ln_f.",
         "attn.c_proj": "attn.out_proj", "attn.": "attn.attention."}


def paper_switches():
    """The settings that make our model a GPT-Neo."""
    paper = asdict(train.load_settings([str(prepare.HERE / "config" / "paper_8m.py")]))
    names = ("pos", "norm", "act", "qk_norm", "bias", "value_residual")
    return {name: paper[name] for name in names}


def neo_config(c):
    """GPTConfig -> the config.json of a GPT-Neo."""
    kinds = ["global", "local" if c.window else "global"] * c.n_layer
    return {"model_type": "gpt_neo", "vocab_size": c.vocab_size, "num_layers": c.n_layer,
            "num_heads": c.n_head, "hidden_size": c.n_embd, "intermediate_size": 4 * c.n_embd,
            "max_position_embeddings": c.block_size, "window_size": c.window or c.block_size,
            "attention_types": [[kinds[:c.n_layer], 1]], "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new", "tie_word_embeddings": True}


def neo_views(model):
    """{GPT-Neo's name: tensor} of our weights, as views: writing into them changes the model."""
    views = {}
    for name, p in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv"):
            for letter, matrix in zip("qkv", p):                        # (C, C) each
                views[name.replace("qkv", f"{letter}_proj.weight")] = matrix
        else:
            views[name] = p[:model.config.vocab_size] if "wte" in name else p   # no padding
    return views


def read_weights(folder):
    """The file of a GPT-Neo's weights, and what it holds: {GPT-Neo's name: tensor}."""
    path = folder / "model.safetensors"
    try:
        if path.is_file():
            from safetensors.torch import load_file  # comes with transformers
            return path, load_file(path)
        path = folder / "pytorch_model.bin"
        return path, read_checkpoint(path)
    except Exception as error:                                  # SafetensorError is no ValueError
        raise SystemExit(f"Cannot read {path}: {error}")


def read_config(path, weights):
    """config.json -> GPTConfig. SystemExit if it does not fit the weights or our model."""
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs["model_type"] != "gpt_neo":
            raise ValueError("its model_type is not gpt_neo")
        vocab_size, C = weights["transformer.wte.weight"].shape
        block_size = len(weights["transformer.wpe.weight"])
        n_layer = len([name for name in weights if name.endswith(".ln_1.weight")])
        kinds = []                                              # one for each layer
        for pattern, n in theirs["attention_types"]:            # [["global", "local"], 4]
            kinds += pattern * min(n, n_layer + 1)
        theirs["attention_types"] = [[kinds, 1]]
        window = theirs.pop("window_size", None)
        config = GPTConfig(vocab_size, block_size, n_layer, theirs["num_heads"], C,
                           window=window if "local" in kinds else 0, **paper_switches())
        expected = neo_config(config)
        for name in expected.keys() & theirs.keys():
            if theirs[name] not in (expected[name], None):
                raise ValueError(f"{name} is {theirs[name]}, not {expected[name]}")
        return config
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{path} does not describe a GPT-Neo that we can import: {error}")


def import_model(folder):
    """A folder with config.json and the weights of a GPT-Neo -> GPT."""
    path, weights = read_weights(folder)
    model = GPT(read_config(folder / "config.json", weights))
    for name, view in neo_views(model).items():
        tensor = weights.get(name)
        if getattr(tensor, "shape", None) != view.shape:
            raise SystemExit(f"{path} does not fit its config.json: {name}")
        view.copy_(tensor)
    for block in model.blocks:      # GPT-Neo does not divide the scores by sqrt(D); we do
        block.attn.qkv.data[0] *= math.sqrt(model.config.n_embd // model.config.n_head)
    model.token_embedding.weight.data[model.config.vocab_size:] = 0             # padding
    return model


def import_run(name):
    """Write out/<name>/ from a model on the Hugging Face hub or in a local folder."""
    source = Path(name)
    folder = Path("out", source.resolve().name)
    if (folder / "ckpt.pt").exists() and prepare.read_meta(folder).get("source") != name:
        raise SystemExit(f"{folder} is another run. Rename it, or the folder to import.")
    folder.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        source = folder
        for file in ("config.json", "pytorch_model.bin"):
            download(hub_url(name, "main", file, kind=""), folder / file)
    model = import_model(source)
    if (source / "meta.json").exists():                         # exported by us
        meta = prepare.read_meta(source)
        ranks = prepare.load_tokenizer(source)._mergeable_ranks
    else:
        meta = {"dataset": "tinystories", "instruct": "-Inst" in name}
        ranks = prepare.gpt2_ranks()
    if len(ranks) + 1 != model.config.vocab_size:
        raise SystemExit(f"{name} cannot be imported: vocab_size is {model.config.vocab_size}, "
                         f"and GPT-2's tokenizer has {len(ranks) + 1} entries.")
    meta |= {"source": name, "vocab_size": len(ranks) + 1, "eot": len(ranks)}
    prepare.save_tokenizer(folder, ranks)
    prepare.write_meta(folder, meta)
    with common.atomic_write(folder / "ckpt.pt") as file:      # last: now it is a run
        torch.save({"model": model.state_dict(), "model_config": asdict(model.config),
                    "settings": {}, "meta": meta, "step": 0}, file)
    print(f"Imported. Try: python sample.py {folder.as_posix()}")


def export(run, folder):
    """Write a run of the paper's architecture as transformers stores a GPT-Neo."""
    model, tokenizer, meta = sample.load_run(run, "cpu", torch.float32)
    differ = [f"{name}={getattr(model.config, name)}" for name, value in paper_switches().items()
              if getattr(model.config, name) != value]
    if differ:
        raise SystemExit(f"{run} cannot be exported: GPT-Neo has no {', '.join(differ)}. "
                         "config/paper_8m.py trains a model that can.")
    if (folder / "ckpt.pt").exists():
        raise SystemExit(f"{folder} is a run; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for block in model.blocks:
        block.attn.qkv.data[0] /= math.sqrt(model.config.n_embd // model.config.n_head)
    with common.atomic_write(folder / "pytorch_model.bin") as file:
        torch.save({name: view.clone() for name, view in neo_views(model).items()}, file)
    prepare.save_tokenizer(folder, tokenizer._mergeable_ranks)
    prepare.write_meta(folder, meta)
    theirs = {"architectures": ["GPTNeoForCausalLM"], **neo_config(model.config),
              "bos_token_id": tokenizer.eot_token, "eos_token_id": tokenizer.eot_token}
    common.write_text(folder / "config.json", json.dumps(theirs, indent=1))
    print(f"{folder} holds {run} as a GPT-Neo.")


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("name", help="a name on the Hugging Face hub, or a folder")
    parser.add_argument("--export", metavar="RUN", help="write this run into the folder")
    args = parser.parse_args(argv)
    if args.export:
        export(args.export, Path(args.name))
    else:
        import_run(args.name)


if __name__ == "__main__":
    main()
