"""What must be true, from stories to grades: a list of claims.

    python -m pytest            # about a minute on two CPU cores, without network, GPU or key
"""

import copy
import dataclasses
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as model_module
import prepare
import sample
import train
from data.grammar import GRAMMAR, Story, read_grammar
from model import GPT, GPTConfig, NonFiniteLogits, attention, load_model, read_checkpoint

HERE = Path(__file__).resolve().parent
OURS = dict(vocab_size=100, block_size=48, n_layer=3, n_head=2, n_embd=32)
PAPER = dict(OURS, pos="learned", norm="layer", act="gelu", qk_norm=False, bias=True, window=8,
             init="normal", value_residual=False)
CONFIGS = {"default": OURS, "paper": PAPER, "window": dict(OURS, window=8, init="normal"),
           "normal": dict(OURS, init="normal"), "copy": dict(OURS, init="copy")}


def build(seed=0, **settings):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**settings)).eval()


def random_ids(B, T, seed=0, V=100):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, scope="module")
def model(request):
    """A model of each kind, with all its weights moved away from their special initial values."""
    model = build(**CONFIGS[request.param])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (0.3 if p.ndim else 1.0))
    return model


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")


# ------------------------------------------------------------------------------------------- model

def test_future_tokens_cannot_change_the_past(model):
    a, b = random_ids(1, 40), random_ids(1, 40, seed=1)
    for t in (1, 7, 20, 39):
        mixed = torch.cat((a[:, :t], b[:, t:]), dim=1)
        torch.testing.assert_close(model(mixed)[0][:, :t], model(a)[0][:, :t])


def test_every_earlier_token_can_matter(model):
    ids = random_ids(1, 8)
    last = model(ids)[0][0, -1]
    for t in range(8):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % 100
        assert not torch.allclose(model(other)[0][0, -1], last, atol=1e-5)


def test_cached_decoding_equals_the_full_forward_pass(model):
    ids, cache = random_ids(2, 40), model_module.KVCache(model.config, 2, "cpu", torch.float32)
    pieces = [model(part, cache=cache)[0] for part in ids.split([5, 1, 1, 20, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids)[0], atol=2e-5, rtol=1e-4)


def test_attention_equals_torchs_own():
    q, k, v = torch.randn(3, 2, 4, 10, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention(q, k, v), expected)
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), expected[:, :, -1:])
    torch.testing.assert_close(attention(q[:, :, -3:], k, v), expected[:, :, -3:])


@pytest.mark.parametrize("T", [1, 3, 10])
def test_a_window_of_n_sees_exactly_the_last_n_tokens(T):
    q, k = torch.randn(2, 1, 1, 10, 8, generator=torch.Generator().manual_seed(0))
    weights = attention(q[:, :, -T:], k, torch.eye(10)[None, None], window=4)[0, 0]     # (T, S)
    distance = torch.arange(10 - T, 10)[:, None] - torch.arange(10)
    assert torch.equal(weights > 0, (0 <= distance) & (distance < 4))


def test_rope_makes_attention_depend_on_distance_only():
    rope = model_module.precompute_rope(32, 16)
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    def score(i, j):
        return (model_module.apply_rope(q, rope[:, i:i + 1])
                * model_module.apply_rope(k, rope[:, j:j + 1])).sum()
    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys():
    for qk_norm in (True, False):
        model, ids = build(**dict(OURS, init="copy", qk_norm=qk_norm)), random_ids(1, 20)
        before = model(ids)[0]
        for block in model.blocks:
            block.attn.qkv.data[:2] *= 50
        assert torch.allclose(model(ids)[0], before, atol=1e-3) == qk_norm


def test_value_residual_uses_the_first_layers_values():
    model, ids = build(**dict(OURS, init="copy")), random_ids(1, 20)
    before = model(ids)[0]
    model.blocks[2].attn.qkv.data[2] *= -1
    assert not torch.allclose(model(ids)[0], before, atol=1e-4)
    model.blocks[2].attn.value_lambda.data.fill_(1.0)
    changed = model(ids)[0]
    model.blocks[2].attn.qkv.data[2] *= 3
    torch.testing.assert_close(model(ids)[0], changed)


def test_chunked_loss_equals_plain_cross_entropy_in_value_and_gradients():
    model = build(**dict(PAPER, vocab_size=128))
    ids, targets = random_ids(30, 40), random_ids(30, 40, seed=1)
    targets[:, ::3] = -1                                        # ignored
    _, loss = model(ids, targets)
    plain = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, plain)
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(each, parameters) for each in (loss, plain))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_fresh_model_knows_nothing_and_a_copying_one_repeats():
    ids = random_ids(8, 40)
    _, loss = build(**OURS)(ids[:, :-1], ids[:, 1:])
    assert abs(loss.item() - math.log(128)) < 0.2           # the vocabulary is padded to 128
    logits, repeated = build(**dict(OURS, init="copy"))(ids)[0][0, -1], ids[0, :-1].unique()
    others = [i for i in range(100) if i not in ids[0]]
    assert logits[repeated].mean() > logits[others].mean() + 0.01


def test_a_removed_head_adds_nothing(model):
    ids, one, both = random_ids(1, 20), copy.deepcopy(model), copy.deepcopy(model)
    one.remove_head(1, 0)
    assert not torch.allclose(one(ids)[0], model(ids)[0], atol=1e-5)
    both.remove_head(1, 0), both.remove_head(1, 1)
    x = torch.randn(1, 5, 32)
    out, _ = both.blocks[1].attn(x)
    bias = both.blocks[1].attn.c_proj.bias
    torch.testing.assert_close(out, torch.zeros_like(out) if bias is None else bias.expand_as(out))


@pytest.mark.parametrize("setting", [dict(pos="alibi"), dict(act="swish"), dict(norm="none"),
                                     dict(init="ones"), dict(n_head=3), dict(n_layer=0),
                                     dict(window=-1)])
def test_a_wrong_model_setting_is_an_error(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        GPTConfig(**(OURS | setting))


def test_a_position_encoding_needs_edits_in_model_py_only(tmp_path):
    """ALiBi (arXiv 2108.12409), added as a student would: in attention_bias, for all devices."""
    text = (HERE / "model.py").read_text()
    text = text.replace("if not window and (T == 1 or", "if False and (T == 1 or")
    text = text.replace("return torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill(",
                        "return (-0.3 * (i - j).to(q.dtype)).masked_fill(")
    (tmp_path / "alibi.py").write_text(text)
    code = f"""
import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HERE)!r}]
import alibi, torch; sys.modules["model"] = alibi
from study.consistency import attention_weights
model = alibi.GPT(alibi.GPTConfig(**{dict(OURS, init='copy')!r})).eval()
model.rope = None
ids = torch.randint(100, (1, 20))
cache = alibi.KVCache(model.config, 1, "cpu", torch.float32)
pieces = torch.cat([model(part, cache=cache)[0] for part in ids.split(1, dim=1)], dim=1)
torch.testing.assert_close(pieces, model(ids)[0], atol=1e-5, rtol=1e-4)
weights = attention_weights(model, ids)[0]          # (H, T, T)
torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20))
assert weights[:, -1, -1].mean() > 2 * weights[:, -1, 0].mean()     # near tokens win
model(ids, ids)[1].backward()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_gpu
def test_a_gpu_computes_what_a_cpu_does(model):
    ids = random_ids(2, 40)
    torch.testing.assert_close(copy.deepcopy(model).cuda()(ids.cuda())[0].cpu(), model(ids)[0],
                               atol=2e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------- sampling

def test_rows_of_different_lengths_do_not_disturb_each_other(model):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 17, 8)]
    together = model.generate(prompts, 20, temperature=0)
    assert together == [model.generate([prompt], 20, temperature=0)[0] for prompt in prompts]


def test_greedy_sampling_takes_the_most_likely_token(model):
    [ids] = model.generate([[1, 2, 3]], 10, temperature=0)
    logits, _ = model(torch.tensor([[1, 2, 3, *ids]]))
    assert ids == logits[0, 2:-1].argmax(dim=-1).tolist()


def test_a_row_that_stops_leaves_the_others_unchanged(model):
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 5, 4)]
    free = model.generate(prompts, 30, seed=3)
    stop = free[0][4]
    for row, expected in zip(model.generate(prompts, 30, stop=stop, seed=3), free):
        assert row == (expected[:expected.index(stop)] if stop in expected else expected)


def test_a_full_context_continues_with_its_newer_half(model):
    prompt = random_ids(1, 40)[0].tolist()
    [ids] = model.generate([prompt], 60, temperature=0)
    assert len(ids) == 60
    text = prompt + ids
    newer_half = text[49 - 24:49]                   # 48 tokens filled the context
    logits = model(torch.tensor([newer_half]))[0][0, -1]
    assert logits[text[49]] > logits.max() - 1e-3


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(30_000, 3)
    u = torch.rand(30_000, generator=torch.Generator().manual_seed(0))
    for temperature, expected in ((1.0, [0.5, 0.3, 0.2]), (0.5, [0.658, 0.237, 0.105])):
        ids = model_module.sample_next_token(logits, u, temperature)
        torch.testing.assert_close(ids.bincount() / 30_000, torch.tensor(expected), atol=0.01,
                                   rtol=0)


@pytest.mark.parametrize("options, possible", [
    (dict(top_k=2), {1, 2}), (dict(top_k=1), {1}), (dict(top_p=0.49), {1}),
    (dict(top_p=0.51), {1, 2}), (dict(top_p=0.81), {0, 1, 2}),
    (dict(), {0, 1, 2, 3}), (dict(temperature=0), {1})])
def test_top_k_and_top_p_keep_exactly_the_most_likely_tokens(options, possible):
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05]).log().expand(2_000, 4)
    u = torch.linspace(0, 0.9999, 2_000)
    assert set(model_module.sample_next_token(logits, u, **options).tolist()) == possible


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_are_an_error_not_the_end_of_a_story(bad):
    model = build(**OURS)
    model.token_embedding.weight.data[5] = bad
    with pytest.raises(NonFiniteLogits):
        model.generate([[5]], 10)


# --------------------------------------------------------------------------------------- data sets

RAW = ("Onçe upon 雪.\r\nYes.\n<|endoftext|>\nTwo â€œwordsâ€\x9d.\n<|endoftext|>\n \n"
       "<|endoftext|>Onçe upon 雪.\nYes.<|endoftext|>\nIn both.\n<|endoftext|>\n"
       "The last has no mark")


def many(n, separator=prepare.EOT, story="Story {}. сказка"):
    return separator.join(story.format(i) for i in range(n))


def run(folder, text, *options, name="set", suffix=".txt"):
    """Run prepare.py on a text -> meta.json, and the stories in train.bin and val.bin."""
    path = folder / f"text{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    prepare.main([str(folder / name), "--input", str(path), "--tokenizer", "bpe", "--vocab_size",
                  "300", *map(str, options)])
    meta, encoding = prepare.verify_dataset(folder / name), prepare.load_tokenizer(folder / name)
    ids = [np.fromfile(folder / name / f"{split}.bin", np.uint16) for split in ("train", "val")]
    assert all(row.max() < meta["vocab_size"] and row[-1] == meta["eot"] for row in ids)
    return meta, *(encoding.decode(row.tolist()).split(prepare.EOT)[:-1] for row in ids)


def test_stories_are_cleaned_counted_and_deduplicated(tmp_path):
    (tmp_path / "v.txt").write_text("In both.\n<|endoftext|>\nOnly here.", encoding="utf-8")
    meta, train, val = run(tmp_path, RAW, "--valid", tmp_path / "v.txt")
    assert train == ["Onçe upon 雪.\nYes.", "Two “words”.", "The last has no mark"]
    assert val == ["In both.", "Only here."] and meta["train"]["stories"] == 3
    assert meta["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert meta["counts"] == {"repaired: double-encoded quotes": 1, "dropped: empty": 1,
                              "dropped: repeated": 1, "dropped: also in validation": 1}
    options = "--valid", tmp_path / "v.txt", "--keep_duplicates", "--force"
    assert run(tmp_path, RAW, *options)[0]["train"]["stories"] == 5


@pytest.mark.parametrize("separator", [prepare.EOT, "\n", "\n\n"])
def test_story_boundaries_do_not_depend_on_the_chunk_size(tmp_path, monkeypatch, separator):
    (tmp_path / "t.txt").write_text(RAW + "\n \n\r\n\nEnd.\r\n\r\n", encoding="utf-8", newline="")
    found = []
    for chunk in (1 << 20, 64, 7, 1):
        monkeypatch.setattr(prepare, "CHUNK_BYTES", chunk)
        found.append(sum(prepare.read_stories(tmp_path / "t.txt", Counter(), separator), []))
    assert all(stories == found[0] for stories in found) and len(found[0]) >= 5


def test_validation_is_chosen_by_hash(tmp_path):
    _, train, val = run(tmp_path, many(6_000))
    assert len(val) == 60 and len(train) == 5_940 and not set(train) & set(val)
    assert run(tmp_path, many(6_000), name="again")[2] == val
    assert run(tmp_path, many(300), name="small")[0]["val"]["stories"] == 30


@pytest.mark.parametrize("text, options, suffix", [
    (many(50, "\n"), ["--separator", r"\n"], ".txt"),
    (many(50, "\r\n \r\n"), ["--separator", r"\n\n"], ".txt"),
    (many(50, "\n", '{{"text": "Story {}. \\u0441казка"}}'), [], ".txt"),
    (many(50, "\n", '{{"id": 1, "story": "Story {}. сказка"}}') + "\n\n", [], ".jsonl")])
def test_other_formats_contain_the_same_stories(tmp_path, text, options, suffix):
    _, train, val = run(tmp_path, text, *options, suffix=suffix)
    assert sorted(train + val) == sorted(many(50).split(prepare.EOT))


@pytest.mark.parametrize("text, message", [
    (b"", "0 stories found"), (b"One.", "1 story found.*separator"), (b"\n<|endoftext|>\n", "0 s"),
    (many(60, story="Ёжик {} шёл.").encode("cp1251"), "not UTF-8.*iconv"),
    (many(60, story="{} “It’s”").encode("cp1252"), "not UTF-8"), (b"\x1f\x8b\x08\0", "not UTF-8"),
    (random.Random(0).randbytes(30_000), "not UTF-8"), (many(9).encode("utf-16-le"), "not UTF-8"),
    ('[{"text": "a"},\n{"text": "b"}]', "like JSON"), ('{"prompt": "a"}\n', "like JSON"),
    (many(9, "\n", '{{"text": "{}"}}') + '\n{"text": 1}', "like JSON"), ("A. " * 9_999, "1 story")])
def test_an_unusable_text_is_refused_and_replaces_nothing(tmp_path, text, message):
    before = run(tmp_path, many(20))[0]
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, text, "--force")
    assert prepare.verify_dataset(tmp_path / "set") == before


def test_long_white_space_and_long_words_are_harmless(tmp_path):
    text = many(30) + "Long" + "\n" * 1_100_000 + "end." + prepare.EOT + "xyz" * 10_000
    meta, train, val = run(tmp_path, text)
    assert meta["counts"] == {"repaired: long runs of white space": 1}
    assert meta["vocab_size"] == run(tmp_path, many(31), name="plain")[0]["vocab_size"]


def test_a_data_set_is_prepared_once(tmp_path, capsys):
    run(tmp_path, many(30))
    before = (tmp_path / "set" / "train.bin").stat().st_mtime_ns
    run(tmp_path, many(30))
    assert "is ready" in capsys.readouterr().out
    for text, options in ((many(31), []), (many(30), ["--keep_duplicates"])):
        with pytest.raises(SystemExit, match="--force"):
            run(tmp_path, text, *options)
    assert (tmp_path / "set" / "train.bin").stat().st_mtime_ns == before


def test_several_files_and_the_tokenizer_of_a_run(tmp_path):
    meta, *_ = run(tmp_path, many(30))
    (tmp_path / "more.txt").write_text(many(20, story="More {}."))
    prepare.main([str(tmp_path / "both"), "--input", str(tmp_path / "text.txt"),
                  str(tmp_path / "more.txt"), "--tokenizer", str(tmp_path / "set")])
    both, name = prepare.verify_dataset(tmp_path / "both"), "tokenizer.tiktoken"
    assert both["train"]["stories"] + both["val"]["stories"] == 50
    assert both["crc32"][name] == meta["crc32"][name] and both["pattern"] == meta["pattern"]


def test_a_grammar_becomes_a_data_set_with_its_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_STORIES", {"val": 50, "train": 400})
    words = " | ".join(f"w{i}" for i in range(40))
    grammar = f"a : {words}\nplot one\nwords a\nsummary s\n\n{{a}} {{a}} {{a}}.\n"
    (tmp_path / "g.txt").write_text(grammar)
    prepare.main([str(tmp_path / "set"), "--grammar", str(tmp_path / "g.txt")])
    meta = prepare.verify_dataset(tmp_path / "set")
    bits = meta["entropy_bound"]["bits_per_byte"] * meta["val"]["bytes"]
    assert bits == pytest.approx(50 * 3 * math.log2(40)) and not prepare.grammar_changed(meta)


def test_preparing_may_be_killed_at_any_moment(tmp_path):
    (tmp_path / "t.txt").write_text(many(3000))
    command = [str(HERE / "prepare.py"), str(tmp_path / "set"), "--input", str(tmp_path / "t.txt"),
               "--tokenizer", "bpe", "--vocab_size", "400"]
    for seconds in (0.5, 1.0, 1.5):
        process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.kill()
        process.wait()
        if (tmp_path / "set" / "meta.json").exists():
            prepare.verify_dataset(tmp_path / "set")
    prepare.main(command[1:])
    assert prepare.verify_dataset(tmp_path / "set")["val"]["stories"] == 50


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.tiktoken"])
def test_every_flipped_bit_is_detected(tmp_path, name):
    run(tmp_path, many(100))
    path, rng = tmp_path / "set" / name, random.Random(0)
    good = path.read_bytes()
    for _ in range(50):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        read = prepare.load_tokenizer if name.startswith("tok") else prepare.verify_dataset
        with pytest.raises(SystemExit, match="python prepare.py .* --input .* --force"):
            read(tmp_path / "set")


@pytest.mark.parametrize("text", [
    "[" * 300_000, "{", "[]", '{"vocab_size": 5}', '{"vocab_size": "x", "eot": 1}', "\udc80",
    *(f'{{"vocab_size": 9, "eot": 8, {wrong}}}' for wrong in (
        '"train": {"tokens": "x"}', '"counts": [1]', '"train": 7', '"pattern": 1'))])
def test_a_damaged_meta_json_gets_one_sentence(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match="meta.json"):
        prepare.read_meta(tmp_path)



# ------------------------------------------------------------------------------------ training data

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small prepared data set: 300 stories of our grammar."""
    folder = tmp_path_factory.mktemp("data")
    rules, plots = read_grammar(GRAMMAR)
    stories = [Story(rules, plots, random.Random(f"0-{i}")).text for i in range(300)]
    text = "".join(f"{story}\n{prepare.EOT}\n" for story in stories)
    prepare.write_text(folder / "stories.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "HERE", folder)
        prepare.main(["small", "--input", str(folder / "stories.txt"), "--tokenizer", "bpe",
                      "--vocab_size", "512"])
    return folder / "data" / "small"


def test_an_epoch_reads_each_token_once(tmp_path):
    np.arange(1_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    n = 1_000 // 20 - 1
    for epoch in (0, 1):
        rows = range(epoch * n, (epoch + 1) * n)
        x, y = train.get_batch(tmp_path / "train.bin", 20, rows, seed=0)
        assert torch.equal(y, x + 1)
        assert sorted(y.flatten().tolist()) == list(range(y.min(), y.min() + 20 * n))


def test_epochs_differ_and_a_batch_depends_only_on_its_numbers(tmp_path):
    np.arange(1_000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    a, b, c = (train.get_batch(tmp_path / "train.bin", 20, rows, seed=0)[0]
               for rows in (range(0, 9), range(49, 58), range(3, 6)))
    assert not torch.equal(a, b)
    assert torch.equal(a[3:6], c)


def test_validation_reads_stories_from_their_beginning(tmp_path):
    stories = [[9, 8, 7, 0], [5, 0], [4, 3, 6, 2, 1, 0]]
    np.array(sum(stories, []), dtype=np.uint16).tofile(tmp_path / "val.bin")
    _, whole = train.validation_batches(tmp_path / "val.bin", 0, 5, eval_tokens=0)
    rows = [(x[x_row != -1], y_row[y_row >= 0]) for batch in whole
            for x, x_row, y_row in zip(batch[0], batch[1], batch[1])]
    assert sorted(y.tolist() for _, y in rows) == [[4, 3, 6, 2, 1], [5, 0], [9, 8, 7, 0]]
    assert all(x[0] == 0 and x[1:].tolist() == y[:-1].tolist() for x, y in rows)


def test_bits_per_byte_counts_the_bytes_of_the_text(data):
    tokenizer = prepare.load_tokenizer(data)
    ids = tokenizer.encode_ordinary("Tom and Ann were glad.") + [tokenizer.eot_token]
    factor = train.bits_per_byte([(None, torch.tensor([[*ids, -1]]))], tokenizer)
    assert factor == pytest.approx(len(ids) / 22 / math.log(2))


# ----------------------------------------------------------------------------------------- training

def settings(data, out, *changes):
    options = dict(dataset=data, out_dir=out, n_layer=2, n_head=2, n_embd=32, block_size=32,
                   total_batch_size=256, max_steps=12, warmup_steps=3, eval_interval=5,
                   eval_tokens=512, final_eval_tokens=512, log_interval=4, save_interval=6,
                   dtype="float32", device="cpu")
    return train.load_settings([*(f"--{k}={v}" for k, v in options.items()), *changes])


def as_options(settings):
    return [f"--{name}={value}" for name, value in dataclasses.asdict(settings).items()]


def weights(out):
    return read_checkpoint(Path(out, "ckpt.pt"))["model"]


def assert_equal_losses(one, other, tolerance):
    """The losses in two logs agree up to float rounding."""
    logs = [read_checkpoint(out / "ckpt.pt")["counters"]["log"] for out in (one, other)]
    for a, b in zip(*logs, strict=True):
        for name in ("train_loss", "val_loss", "story_loss"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=tolerance)


def assert_equal_weights(a, b, tolerance=0.0):
    for name, p in a.items():
        torch.testing.assert_close(p, b[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    train.train(settings(data, out))
    return out


def interrupt_at_row(row, monkeypatch):
    """-> the signals of a run that gets a Ctrl-C while the batch with this row is read."""
    get_batch, signals = train.get_batch, []
    def reading(file, block_size, rows, seed):
        if row in rows:
            signals.append(signal.SIGINT)
        return get_batch(file, block_size, rows, seed)
    monkeypatch.setattr(train, "get_batch", reading)
    return signals


@pytest.mark.parametrize("row", [0, 8 * 5 + 3, 8 * 11])
def test_resume_is_bitwise_exact(data, finished, tmp_path, monkeypatch, row):
    with pytest.raises(SystemExit) as stopped:
        train.train(settings(data, tmp_path), interrupt_at_row(row, monkeypatch))
    assert stopped.value.code == 130
    assert not row or read_checkpoint(tmp_path / "ckpt.pt")["step"] == row // 8
    monkeypatch.undo()
    train.train(settings(data, tmp_path))
    assert_equal_weights(weights(finished), weights(tmp_path))
    one, other = (read_checkpoint(out / "ckpt.pt")["counters"]["log"]
                  for out in (finished, tmp_path))
    assert [line.get("train_loss") for line in one] == [line.get("train_loss") for line in other]


def test_evaluating_more_often_changes_nothing(data, finished, tmp_path):
    train.train(settings(data, tmp_path, "--eval_interval=1", "--save_interval=1"))
    assert_equal_weights(weights(finished), weights(tmp_path))


@pytest.mark.parametrize("micro_batch", [3, 8])
def test_micro_batches_do_not_change_the_result(data, finished, tmp_path, micro_batch):
    train.train(settings(data, tmp_path, f"--micro_batch={micro_batch}"))
    assert_equal_losses(finished, tmp_path, tolerance=1e-4)


def test_two_processes_learn_the_same_as_one(data, finished, tmp_path):
    options = as_options(settings(data, tmp_path))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", HERE / "train.py", *options],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_equal_losses(finished, tmp_path, tolerance=1e-4)


def test_a_run_writes_a_log_a_plot_and_samples(finished, capsys, data, tmp_path):
    lines = (finished / "log.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["4", "5", "8", "10", "12"]
    assert all(rows[i]["story_loss"] for i in (1, 3, 4)) and rows[0]["tokens"] == "1024"
    assert (finished / "loss.png").stat().st_size > 5_000
    train.train(settings(data, tmp_path, "--max_steps=25", "--eval_interval=0"))
    assert " | " in capsys.readouterr().out.splitlines()[-3]


def test_a_finished_run_says_so_and_can_be_extended(data, finished, tmp_path, capsys):
    train.train(settings(data, tmp_path))
    train.train(settings(data, tmp_path))
    assert "finished" in capsys.readouterr().out
    train.train(settings(data, tmp_path, "--max_steps=14"))
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 14


@pytest.mark.parametrize("change", ["--n_layer=1", "--learning_rate=1e-3", "--seed=1"])
def test_another_run_is_never_overwritten(data, finished, change):
    before = (finished / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit, match=change[2:].partition("=")[0]):
        train.train(settings(data, finished, change))
    assert (finished / "ckpt.pt").read_bytes() == before


def test_resume_refuses_a_checkpoint_without_optimizer_or_with_an_invalid_step(
        data, finished, tmp_path):
    for damage in (lambda c: c["optimizers"][0]["state"].clear(), lambda c: c.pop("optimizers"),
                   lambda c: c["counters"].update(step=-3), lambda c: c["counters"].pop("log")):
        checkpoint = read_checkpoint(finished / "ckpt.pt")
        damage(checkpoint)
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        with pytest.raises(SystemExit, match="ckpt.pt"):
            train.train(settings(data, tmp_path))


def test_any_flipped_bit_in_a_checkpoint_is_detected_or_harmless(finished, tmp_path):
    content, rng = (finished / "ckpt.pt").read_bytes(), random.Random(0)
    expected = weights(finished)
    for _ in range(40):
        damaged, i = bytearray(content), rng.randrange(len(content))
        damaged[i] ^= 1 << rng.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        try:
            assert_equal_weights(expected, weights(tmp_path))
        except ValueError as error:
            assert "damaged" in str(error)


def test_a_checkpoint_with_code_is_not_loaded(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"model": Code()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="more than weights"):
        read_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_model_py_are_refused_with_their_names(finished, tmp_path):
    checkpoint = read_checkpoint(finished / "ckpt.pt")
    weights = checkpoint["model"]
    weights["blocks.0.attn.gate"] = weights.pop("blocks.0.attn.c_proj.weight")
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match=r"(?s)c_proj\.weight.*attn\.gate"):
        load_model(tmp_path / "ckpt.pt")


def test_a_bug_in_model_py_shows_its_own_traceback(finished, tmp_path, data):
    for bug in ("self.norm = make_nrm(config)", "x = x @ torch.zeros(3, 5)"):
        name = "make_nrm" if "nrm" in bug else "shapes"
        place = "self.norm = make_norm(config)"
        place = place if "nrm" in bug else "B, T, C = x.shape\n        q, k"
        added = bug if "nrm" in bug else f"{bug}\n        {place}"
        text = (HERE / "model.py").read_text().replace(place, added, 1)
        (tmp_path / "model.py").write_text(text)
        code = (f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HERE)!r}]; import sample;"
                f"sample.main([{str(finished)!r}])")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "Traceback" in done.stderr and name in done.stderr and "damaged" not in done.stderr


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="learning_rate"):
        train.train(settings(data, tmp_path, "--optimizer=adamw", "--learning_rate=1e30",
                             "--log_interval=1"))
    assert not (tmp_path / "ckpt.pt").exists()
    monkeypatch.setattr(GPT, "init_weights",
                        lambda self: self.token_embedding.weight.data.fill_(math.nan))
    with pytest.raises(SystemExit, match="model.py"):
        train.train(settings(data, tmp_path / "first"))


def test_init_from_starts_with_the_weights_of_another_run(data, finished, tmp_path):
    train.train(settings(data, tmp_path, f"--init_from={finished}", "--max_steps=1",
                         "--learning_rate=1e-9"))
    assert_equal_weights(weights(finished), weights(tmp_path), tolerance=1e-6)
    with pytest.raises(SystemExit, match="n_layer"):
        train.train(settings(data, tmp_path / "b", f"--init_from={finished}", "--n_layer=3"))


def test_a_plot_or_a_print_that_fails_does_not_stop_training(data, tmp_path):
    out = tmp_path / "a$_{$b"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, HERE / "train.py", *as_options(settings(data, out))],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert read_checkpoint(out / "ckpt.pt")["step"] == 12, done.stderr
    assert (out / "loss.png").exists()


def test_muon_equals_torchs_own_on_each_matrix():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 16, 16))
    single = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = train.Muon([stack], dict(lr=0.02, momentum=0.9, weight_decay=0.1))
    theirs = torch.optim.Muon(single, lr=0.02, momentum=0.9, weight_decay=0.1,
                              adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for p, grad in zip(single, stack.grad):
            p.grad = grad.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), atol=3e-3,
                               rtol=0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_has_one_optimizer_and_only_matrices_decay(data, optimizer):
    model = build(**PAPER)
    optimizers = train.make_optimizers(model, settings(data, "x", f"--optimizer={optimizer}"),
                                       torch.device("cpu"))
    groups = [group for one in optimizers for group in one.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == \
        sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.blocks.parameters() if p.ndim >= 2}


def test_the_learning_rate_warms_up_stays_and_cools_down(data):
    s = settings(data, "x", "--max_steps=103", "--warmup_steps=3", "--cooldown_frac=0.5")
    rates = [train.lr_multiplier(s, step) for step in range(103)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1]) and rates[53] == pytest.approx(1)
    assert rates[54] == pytest.approx(49 / 50) and rates[102] == pytest.approx(1 / 50)


# ---------------------------------------------------------------------------------------- settings

def test_config_files_and_options_are_read_in_order(tmp_path):
    (tmp_path / "c.py").write_text("from math import pi\n_half = 2\nn_head = _half\nn_embd = 64\n")
    s = train.load_settings([str(tmp_path / "c.py"), "--n_embd=32", "--qk_norm=false",
                             "--learning_rate=1e-3"])
    assert (s.n_head, s.n_embd, s.qk_norm, s.learning_rate) == (2, 32, False, 1e-3)
    assert s.out_dir == "out/c"


@pytest.mark.parametrize("argv, says", [
    (["--n_layr=3"], "n_layer"), (["--n_layer=two"], "int"), (["--n_layer", "3"], "--name=value"),
    (["config/dmeo.py"], "no such config"), (["--act=swish"], "act"), ([], "which config"),
    (["--total_batch_size=1000"], "block_size"), (["--qk_norm=maybe"], "bool"),
    (["--learning_rate=-1"], "positive"), (["--optimizer=sgd"], "muon"),
    (["--n_head=3"], "n_embd")])
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(argv, says, capsys):
    with pytest.raises(SystemExit) as error:
        train.load_settings(argv)
    [line] = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and says in line


def test_an_unknown_name_in_a_config_file_is_refused_with_its_file(tmp_path, capsys):
    (tmp_path / "c.py").write_text("heads = 4\n")
    with pytest.raises(SystemExit):
        train.load_settings([str(tmp_path / "c.py")])
    assert re.search(r"c\.py.*heads.*n_head", capsys.readouterr().err)


@pytest.mark.parametrize("name", [path.stem for path in (HERE / "config").glob("*.py")])
def test_every_config_file_is_valid(name):
    assert train.load_settings([str(HERE / "config" / f"{name}.py")]).out_dir == f"out/{name}"


# --------------------------------------------------------------------------------- writing stories

def test_streamed_text_equals_generated_text(finished):
    model, tokenizer, _ = sample.load_run(finished)
    [text] = sample.generate_texts(model, tokenizer, ["Once"], 80, 1.0)
    assert "".join(sample.stream_text(model, tokenizer, "Once", 80, 1.0)) == text
    assert [text] != sample.generate_texts(model, tokenizer, ["Once"], 80, 1.0, seed=1)


def test_a_space_at_the_end_of_a_prompt_changes_nothing(finished):
    model, tokenizer, _ = sample.load_run(finished)
    assert sample.generate_texts(model, tokenizer, ["Once there "], 20) == \
        sample.generate_texts(model, tokenizer, ["Once there"], 20)


def test_control_characters_are_shown_not_sent(finished, capsys):
    sample.main([str(finished), "--prompt", "Tom \x1b[31m\x07", "--max_new_tokens", "5"])
    output = capsys.readouterr().out
    assert "\\x1b[31m\\x07" in output and "\x1b" not in output


@pytest.mark.parametrize("arguments, says, code", [
    (["missing"], "no trained model", 1), (["roneneldan/TinyStories-1M"], "study.hf", 1),
    (["RUN", "--words", "red"], "not trained on instructions", 1),
    (["RUN", "--without", "7.0"], "layers 0-1", 1), (["RUN", "--without", "x"], "LAYER.HEAD", 2),
    (["RUN", "--top_p", "0"], "top_p", 2), (["RUN", "--temperature", "nan"], "temperature", 2)])
def test_a_mistake_in_sampling_is_one_sentence(finished, capsys, arguments, says, code):
    with pytest.raises(SystemExit) as error:
        sample.main([str(finished) if part == "RUN" else part for part in arguments])
    message = str(error.value) + capsys.readouterr().err
    assert says in message and (error.value.code == 2) == (code == 2)


def test_a_switched_off_head_changes_the_story(finished):
    model, tokenizer, _ = sample.load_run(finished, without=[(1, 0), (0, 1)])
    assert (model.blocks[1].attn.c_proj.weight[:, :16] == 0).all()
    assert (model.blocks[0].attn.c_proj.weight[:, 16:] == 0).all()


def test_the_shipped_model_fits_model_py_and_the_grammar():
    model, tokenizer, _ = sample.load_run(HERE / "data" / "demo_model", "cpu", torch.float32)
    grammar, first, nats, entropy = read_grammar(GRAMMAR), sum(prepare.SAMPLE_STORIES.values()), 0, 0
    for i in range(100):                            # stories that the model has not seen
        story = Story(*grammar, random.Random(f"0-{first + i}"))
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(story.text), tokenizer.eot_token]
        ids = torch.tensor([ids])
        nats += model(ids[:, :-1], ids[:, 1:])[1].item() * (ids.size(1) - 1)
        entropy += story.nats
    assert 1 < nats / entropy < 1.06
