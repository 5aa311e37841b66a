"""How does a model of ours reach the rest of the world?

    python -m study.export out/paper_8m folder          # seconds
    python sample.py folder                             # back again

It writes what the paper's authors released of theirs: config.json and pytorch_model.bin of a
GPT-Neo, and the tokenizer in GPT-2's form; beside them what we keep of a run, the tokenizer in ours
and meta.json. Where transformers is installed, it reads the folder:

    model = transformers.AutoModelForCausalLM.from_pretrained("folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained("folder")

Only the paper's architecture can go (config/paper_8m.py): GPT-Neo has no place for ours.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch

import prepare
from sample import find_run, load_run
from study.released import PAPER, neo_config, neo_names


def neo_weights(model):
    """The weights of a model of ours as GPT-Neo names and cuts them: `read_model` undone."""
    c, weights = model.config, {}
    for name, p in model.state_dict().items():
        parts = [p[:c.vocab_size] if name == "token_embedding.weight" else p]   # no padding
        if "qkv" in name:
            q, k, v = p
            parts = [q / math.sqrt(c.n_embd // c.n_head), k, v]
        weights |= {theirs: part.clone() for theirs, part in zip(neo_names(name), parts)}
    return weights


def gpt2_files(tokenizer):
    """vocab.json and merges.txt of a tokenizer. GPT-2 writes each byte as a character: one that can
    be seen as itself, the others as those from 256 on."""
    ranks = tokenizer._mergeable_ranks
    seen = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = (byte for byte in range(256) if byte not in seen)
    letter = dict(zip(seen, map(chr, seen))) | {b: chr(256 + i) for i, b in enumerate(others)}

    def spell(token):
        return "".join(letter[byte] for byte in token)

    merges = [" ".join(map(spell, prepare.halves(token, ranks)))
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    vocab = {spell(token): rank for token, rank in ranks.items()} | tokenizer._special_tokens
    return json.dumps(vocab), "\n".join(["#version: 0.2", *merges, ""])


def export(run, folder):
    file = find_run(run)
    model, tokenizer = load_run(file, "cpu", torch.float32)
    strange = [f"{name}={getattr(model.config, name)}" for name, value in PAPER.items()
               if getattr(model.config, name) != value and name != "init"]   # only a beginning
    if strange:
        raise SystemExit(f"{run} cannot be exported: GPT-Neo has no place for "
                         f"{', '.join(strange)}. config/paper_8m.py trains a model that can.")
    if (folder / "ckpt.pt").exists():
        raise SystemExit(f"{folder} holds a run of its own; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)    # without it, nothing is there
    vocab, merges = gpt2_files(tokenizer)
    mark, eot = prepare.MARK, tokenizer.eot_token
    config = neo_config(model.config) | {"architectures": ["GPTNeoForCausalLM"],
                                         "bos_token_id": eot, "eos_token_id": eot}
    for name in ("tokenizer.tiktoken", "meta.json"):
        shutil.copyfile(file.parent / name, folder / name)
    with prepare.whole(folder / "pytorch_model.bin") as weights:
        torch.save(neo_weights(model), weights)
    for name, text in {
            "vocab.json": vocab, "merges.txt": merges,
            "tokenizer_config.json": json.dumps({
                "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size,
                "bos_token": mark, "eos_token": mark, "unk_token": mark}),
            "config.json": json.dumps(config, indent=1)}.items():
        prepare.write_text(folder / name, text)
    print(f"{folder} holds {run} as a GPT-Neo.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or one of its checkpoint files")
    parser.add_argument("folder", type=Path, help="what to write; it is made if it is not there")
    args = parser.parse_args(argv)
    prepare.command(export, args.run, args.folder)


if __name__ == "__main__":
    main()
