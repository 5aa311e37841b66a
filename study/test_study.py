"""What must be true of the studies: a list of claims. Nothing here needs a network or a judge."""

import copy
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import grade
import prepare
import sample
import test_model
import train
from data import common, facts
from data.grammar import Story, read_grammar
from model import GPT, GPTConfig
from study import (
    bench,
    consistency,
    dynamics,
    explore,
    generate,
    hf,
    memorization,
    report,
    scaling,
    teacher,
)

# ---------------------------------------------------- our own grammar

TINY = ["--block_size=128", "--total_batch_size=256", "--device=cpu", "--dtype=float32",
        "--eval_tokens=640", "--final_eval_tokens=640"]


@pytest.fixture(scope="module")
def stories():
    rules, plots = read_grammar()
    return [Story(rules, plots, random.Random(f"0-{i}")) for i in range(300)]


@pytest.fixture(scope="module")
def grammar_data(tmp_path_factory, stories):
    """A small data set that looks like `sample`."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"{story.text}\n{prepare.EOT}\n" for story in stories)
    common.write_text(folder / "stories.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "HERE", folder)
        prepare.main(["small", "--input", str(folder / "stories.txt"), "--tokenizer", "bpe",
                      "--vocab_size", "2048"])
    small = folder / "data" / "small"
    prepare.write_meta(small, prepare.read_meta(small) | {
        "dataset": "sample", "entropy_floor": 0.26})
    return small


@pytest.fixture(scope="module")
def tokenizer(grammar_data):
    return prepare.load_tokenizer(grammar_data)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, block_size=256, n_layer=2, n_head=2,
                         n_embd=32, window=8)).eval()


# -------------------------------------------------- checks of endings

def test_each_token_has_the_nats_that_it_reveals(stories, tokenizer):
    for story in stories[:5]:
        nats = explore.describe_story(story, tokenizer)["nats"]
        assert sum(nats) == pytest.approx(story.nats) and min(nats) >= 0


def test_true_endings_pass_all_checks_and_others_fail(stories):
    endings = [facts.split_story(story)[1] for story in stories]
    assert consistency.check_endings(stories, endings) == dict.fromkeys(
        consistency.CHECKS, (100.0, 0.0))
    rates = consistency.check_endings(stories[:99], endings[1:100])
    assert max(rates[check][0] for check in ("name", "thing", "plot")) < 15
    rates = consistency.check_endings(stories[:9], [""] * 9)
    assert math.isnan(rates.pop("pronoun")[0]) and set(rates.values()) == {(0.0, 0.0)}


@pytest.mark.parametrize("check, right, wrong", [
    ("grammar", r"\b([Tt]h)e (?=\w)", r"\1e the "), ("grammar", r"\ba (?=\w)", "an "),
    ("grammar", r"[.!?]\"?$", ""), ("grammar", '"', ""), ("grammar", r"(?<=[.] )[A-Z]", "x"),
    ("pronoun", r"\bhe\b", "she"), ("pronoun", r"\bhis\b", "her"), ("name", r"\bTom\b", "Ben"),
    ("name", r"\bMia\b", "Zoe"), ("thing", r"\bred\b", "blue"),
    ("thing", r"\b(robot|drum|doll)\b", "kite"),
    ("plot", r"\n\n.*", ""), ("plot", r"\b(saw|found|lost)\b", "sang")])
def test_each_check_finds_its_fault(stories, check, right, wrong):
    found = []
    for story in stories:
        ending = facts.split_story(story)[1]
        bad = re.sub(right, wrong, ending, count=1)
        if bad != ending:
            found.append(consistency.check_ending(story, bad)[check] is False)
    assert sum(found) > 9 and sum(found) > len(found) / 3       # the rest was not decided yet


# --------------------------------------------- minimal pairs, autopsy

def test_minimal_pairs_point_at_the_right_token(stories, tokenizer):
    kinds = set()
    for story in stories[:100]:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(story.text)]
        for position, kind, right, others in consistency.minimal_pairs(story, tokenizer):
            assert ids[position] == right and right not in others and others
            kinds.add(kind)
    assert kinds == {"hero", "friend", "other people", "thing", "color", "pronoun"}


def test_a_model_without_preferences_gets_chance(stories, tokenizer, model):
    torch.nn.init.zeros_(model.token_embedding.weight)
    pairs = [pair for story in stories[:20]
             for pair in consistency.minimal_pairs(story, tokenizer) if pair[1] == "color"]
    chance = np.mean([1 / (1 + len(others)) for *_, others in pairs])
    n, correct, probability, _ = consistency.score_pairs(model, tokenizer, stories[:20])["color"]
    assert n == len(pairs) and correct == 0 and probability == pytest.approx(100 * chance)


def test_a_model_with_nan_weights_is_reported(stories, tokenizer, model):
    torch.nn.init.constant_(model.token_embedding.weight, torch.nan)
    with pytest.raises(SystemExit, match="NaN"):
        consistency.score_pairs(model, tokenizer, stories[:1])


def test_attention_weights_are_causal_and_sum_to_one(model):
    idx = torch.arange(20)[None]
    for layer, weights in enumerate(consistency.attention_weights(model, idx)):
        assert weights.shape == (2, 20, 20)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 20), atol=1e-5)
        visible = torch.ones(20, 20).tril()
        if layer == 1:
            visible = visible.triu(-7)                          # a window of 8
        assert torch.equal(weights > 0, visible.bool().expand(2, -1, -1))


def test_autopsy_names_the_wrong_and_the_right_word(stories, tokenizer, model):
    endings = [facts.split_story(story)[1].replace("pink", "blue") for story in stories]
    story, ending = next((story, ending) for story, ending in zip(stories, endings)
                         if consistency.first_wrong_word(story, ending))
    text = consistency.autopsy(model, tokenizer, story, ending)
    assert "[blue]" in text and text.count("\n    1.1: ") == 1
    assert "wrong: blue, probability" in text and "right: pink, probability" in text
    found = [consistency.first_wrong_word(story, re.sub(r"\bShe\b", "He", ending, count=1))
             for story, ending in zip(stories, endings)]
    assert {tuple(right) for _, wrong, right in filter(None, found) if wrong == "He"} == {("She",)}
    model.config.block_size = 16                                # the end of a long text
    assert "right: pink" in consistency.autopsy(model, tokenizer, story, ending)


def test_a_grammar_that_has_changed_since_the_training_is_reported(capsys):
    for text_hash in (prepare.grammar_hash(), "another"):
        consistency.held_out_for_run({"source": "data/grammar.txt", "text_hash": text_hash}, 1)
        assert ("has changed" in capsys.readouterr().err) == (text_hash == "another")


# ----------------------------------------------- scaling and dynamics

def test_the_scaling_law_is_recovered_from_exact_losses():
    N = np.geomspace(1e4, 1e6, 9)
    L = 0.3 + 400 / N ** 0.6
    assert scaling.fit_law(N, L) == pytest.approx([0.3, 0.6, 400], rel=1e-6)
    assert scaling.fit_law(N, L, E=0.3) == pytest.approx([0.3, 0.6, 400], rel=1e-6)
    assert scaling.standard_errors(N, L) == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_grid_is_trained_once_and_reported(grammar_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(scaling.GRIDS, "demo", dict(
        config=str(prepare.HERE / "config" / "demo.py"), budgets=[1, 2], head_size=16,
        widths=[16, 32], layers=[1]))
    monkeypatch.setattr(consistency, "LENGTH_FACTOR", 0.03)
    command = ["--grid", "demo", "-n", "3", f"--dataset={grammar_data}", *TINY]
    scaling.main(command)
    folder = tmp_path / "out" / "scaling" / "demo"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("ckpt.pt")}
    scaling.main(command)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("ckpt.pt")} and len(before) == 4
    report = (folder / "report.md").read_text()
    assert report.count(" ± ") == 12 and "| 32 x 1 " in report and "0.260" in report
    assert {path.name for path in folder.glob("*.png")} == {"fit.png", "maps.png", "frontiers.png"}
    with train.lock_run(folder / "w16_l1_s1"), pytest.raises(SystemExit, match="Another command"):
        scaling.main(command)


@pytest.fixture
def kept_run(grammar_data, tmp_path):
    train.train(train.load_settings([
        f"--dataset={grammar_data}", f"--out_dir={tmp_path}", *TINY, "--n_layer=1", "--n_head=2",
        "--n_embd=16", "--max_steps=2", "--save_interval=1", "--keep_checkpoints=True"]))
    return tmp_path


def test_dynamics_reports_each_checkpoint_of_a_log_with_other_columns(kept_run, monkeypatch):
    monkeypatch.setattr(consistency, "LENGTH_FACTOR", 0.03)
    lines = (kept_run / "log.csv").read_text().splitlines()
    lines = [f"mine,{lines[0]}", *(f"a text,{line}" for line in lines[1:])]
    (kept_run / "log.csv").write_text("\n".join(lines))
    dynamics.main([str(kept_run), "--prompt", "<b>Tom"])
    report = (kept_run / "dynamics.md").read_text()
    assert report.count("\n    step ") == 2 and report.count("| step ") == 2
    assert "validation" in report and (kept_run / "dynamics.png").exists()


def test_dynamics_says_what_is_wrong_with_a_run(kept_run):
    (kept_run / "log.csv").write_bytes(b"step\xff")
    with pytest.raises(SystemExit, match="log.csv cannot be read"):
        dynamics.main([str(kept_run)])
    for path in kept_run.glob("ckpt_*.pt"):
        path.unlink()
    with pytest.raises(SystemExit, match="--keep_checkpoints=True"):
        dynamics.main([str(kept_run)])


# --------------------------------------------------- the explore page

CHROME = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --remote-debugging-pipe""".split()
PAPER = dict(pos="learned", norm="layer", act="gelu", qk_norm=False, bias=True, window=16,
             init="normal", value_residual=False)
TEXT = "Él vio 12 gatos.\n\n\"नमस्ते\", said 小猫 🐱\t<b>it's</b> </script>  e\u0301 ffi\x00"


class Browser:
    """A page in a headless browser: DevTools messages through two pipes, each ended by a zero."""

    def __init__(self, folder):
        (to_read, self.output), (self.input, to_write) = os.pipe(), os.pipe()
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'        # where Chromium expects them
        self.process = subprocess.Popen(
            ["bash", "-c", script, "", CHROME, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_write)
        self.session, self.buffer = {}, b""
        target = self.call("Target.createTarget", url="about:blank")    # -> {"targetId": ...}
        self.session = self.call("Target.attachToTarget", flatten=True, **target)

    def call(self, method, **params):
        message = {"id": 1, "method": method, "params": params, **self.session}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        reply = {}
        while "id" not in reply:                                # events may come before it
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.input, 1 << 20) or pytest.fail("no browser")
            text, _, self.buffer = self.buffer.partition(b"\0")
            reply = json.loads(text)
        return reply["result"]

    def evaluate(self, script):
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.evaluate("""new Promise((done) => setInterval(() => document.readyState != "loading"
            && $("check").textContent && $("stop").disabled && done(), 50))""")

    def read(self, ids):
        self.evaluate(f"second.clear(); [...read_all(second, {ids})].length")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROME:
        pytest.skip("there is no browser: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.process.kill()
    browser.process.wait()


def write_run(folder, dataset, **switches):
    """A small model whose random weights are large enough for clear choices."""
    tokens = [bytes([i]) for i in range(256)] + [b" t", b"he", b" the", "न".encode()[:2]]
    ranks = {token: i for i, token in enumerate(tokens)}
    prepare.save_tokenizer(folder, ranks)
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=len(ranks) + 1, n_layer=3, n_head=2, n_embd=24,
                       **{"block_size": 64} | switches)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"model": model.state_dict(), "model_config": vars(config)}, folder / "ckpt.pt")
    prepare.write_meta(folder, {"dataset": dataset, "vocab_size": len(ranks) + 1,
                                "eot": len(ranks)})


def open_page(browser, folder, dataset="own", change=(), **switches):
    """Write a run and its page, open the page -> the model, with the page's weights."""
    write_run(folder, dataset, **switches)
    model, tokenizer, meta = sample.load_run(folder, "cpu", torch.float32)
    page = explore.build_page(model, tokenizer, meta, "run")
    page["config"].update(change)
    explore.write_html(folder / "explore.html", page)
    browser.open(folder / "explore.html")
    return model, tokenizer


@pytest.fixture(scope="module", params=[{}, PAPER], ids=["ours", "paper"])
def page(request, browser, tmp_path_factory):
    return browser, *open_page(browser, tmp_path_factory.mktemp("run"), **request.param)


@pytest.mark.parametrize("prompt", ["Once upon a time", "", "the न é"])
def test_page_writes_the_same_tokens_as_model_py(page, prompt):
    browser, model, tokenizer = page
    ids = sample.encode_prompt(tokenizer, prompt, 64)
    browser.read(ids)
    written = browser.evaluate("[...generate(second, 60, {temperature: 0, seed: 0})]")
    assert written == model.generate([ids], 60, temperature=0, stop=None)[0][:len(written)]
    assert len(written) == 60 or written[-1] == tokenizer.eot_token


def test_page_has_the_same_probabilities_and_attention(page):
    browser, model, tokenizer = page
    ids = sample.encode_prompt(tokenizer, "There was a cat in the garden", 64)
    browser.read(ids)
    probs, idx = torch.tensor(browser.evaluate("[...softmax(second.logits)]")), torch.tensor([ids])
    torch.testing.assert_close(probs, model(idx)[0][0, -1].softmax(0), atol=1e-3, rtol=0)
    for layer, weights in enumerate(consistency.attention_weights(model, idx)):
        for head in range(2):
            row = browser.evaluate(f"[...second.attention({layer}, {head}, {len(ids) - 1})]")
            torch.testing.assert_close(torch.tensor(row), weights[head, -1], atol=1e-3, rtol=0)


def test_page_without_a_head_computes_the_same_as_model_py(page):
    browser, model, tokenizer = page[0], copy.deepcopy(page[1]), page[2]
    ids = sample.encode_prompt(tokenizer, "Tom had a red ball", 64)
    model.remove_head(1, 1)
    browser.evaluate('without.add("1.1")')
    browser.read(ids)
    logits = torch.tensor(browser.evaluate('without.clear(); [...second.logits]'))
    torch.testing.assert_close(logits, model(torch.tensor([ids]))[0][0, -1], atol=1e-3, rtol=1e-3)


def test_page_encodes_text_as_the_tokenizer_does(page):
    browser, _, tokenizer = page
    assert browser.evaluate(f"encode({json.dumps(TEXT)})") == tokenizer.encode_ordinary(TEXT)


def test_text_is_never_read_as_html(page):
    browser, _, _ = page
    browser.evaluate(f"$('prompt').value = {json.dumps(TEXT)}; start_story()")
    shown = browser.evaluate("$('story').textContent").replace("▫", "")     # parts of characters
    assert "said 小猫 🐱\t<b>it's</b> </script>" in shown
    assert browser.evaluate("document.querySelectorAll('#story :not(span)').length") == 0


def test_page_notices_a_model_that_it_does_not_know(browser, tmp_path):
    open_page(browser, tmp_path, dataset="sample", block_size=700, change={"act": "gelu"})
    assert browser.evaluate("page.stories.length") == explore.STORIES
    assert "another model" in browser.evaluate("$('check').textContent")


def test_a_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    write_run(tmp_path, dataset="own")
    monkeypatch.setattr(explore, "MAX_MB", 0)
    with pytest.raises(SystemExit, match="MB.*--force"):
        explore.main([str(tmp_path)])


# -------------------------------------- exchange, memorization, speed

@pytest.fixture(scope="module")
def data(grammar_data, tmp_path_factory):
    """The same data set under another name: not of our own grammar."""
    folder = shutil.copytree(grammar_data, tmp_path_factory.mktemp("data") / "mine")
    prepare.write_meta(folder, prepare.read_meta(folder) | {"dataset": "mine"})
    return folder


def write_untrained_run(folder, data, **config):
    torch.manual_seed(0)
    meta = prepare.read_meta(data)
    model = GPT(GPTConfig(meta["vocab_size"], 48, 3, 4, 32, **config)).eval()
    for p in model.parameters():
        p.data.normal_(std=0.3)
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("*.bin"))
    torch.save({"model": model.state_dict(), "model_config": vars(model.config), "settings": {},
                "step": 0, "meta": meta}, folder / "ckpt.pt")
    return model


@pytest.fixture()
def neo(data, tmp_path, monkeypatch):
    """A run of the paper's architecture with random weights, exported -> our model."""
    monkeypatch.chdir(tmp_path)
    model = write_untrained_run(Path("run"), data, window=8, **hf.paper_switches())
    hf.main(["--export", "run", "neo"])
    return model


def neo_logits(w, ids):
    """GPT-Neo written out for one row of ids (T,): its scores are not divided by anything."""
    def linear(x, name):
        return F.linear(x, w[f"transformer.{name}.weight"], w.get(f"transformer.{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, [32], w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"])

    T, head = len(ids), w["transformer.wte.weight"]
    i, j = torch.arange(T)[:, None], torch.arange(T)
    x = head[ids] + w["transformer.wpe.weight"][:T]
    for at in ("h.0", "h.1", "h.2"):
        q, k, v = (linear(norm(x, f"{at}.ln_1"), f"{at}.attn.attention.{name}_proj")
                   .view(T, 4, 8).transpose(0, 1) for name in "qkv")            # (H, T, D)
        hidden = (j > i) | (j <= i - 8) if at == "h.1" else j > i
        y = (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v
        x = x + linear(y.transpose(0, 1).reshape(T, 32), f"{at}.attn.attention.out_proj")
        y = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        x = x + linear(F.gelu(y, approximate="tanh"), f"{at}.mlp.c_proj")
    return norm(x, "ln_f") @ head.T


def test_an_exported_model_is_a_gpt_neo(neo):
    weights, ids = torch.load("neo/pytorch_model.bin"), torch.randint(257, (48,))
    for T in (1, 8, 9, 48):
        assert torch.allclose(neo(ids[None, :T])[0][0], neo_logits(weights, ids[:T]), atol=1e-3)


def test_an_imported_model_is_the_same(neo):
    hf.main(["neo"])
    model, tokenizer, _ = sample.load_run("out/neo", "cpu", torch.float32)
    ids = torch.randint(neo.config.vocab_size, (2, 48))
    assert torch.allclose(model(ids)[0], neo(ids)[0], atol=1e-3)
    assert tokenizer.decode(tokenizer.encode_ordinary("Tom é 12")) == "Tom é 12"
    assert not model.token_embedding.weight[neo.config.vocab_size:].any()       # padding


def test_transformers_reads_and_writes_it(neo):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained("neo").eval()
    ids = torch.randint(neo.config.vocab_size, (2, 48))
    assert torch.allclose(theirs(ids).logits, neo(ids)[0], atol=1e-3)
    theirs.save_pretrained("neo")                       # now with model.safetensors
    Path("neo/pytorch_model.bin").unlink()
    assert torch.allclose(hf.import_model(Path("neo")).eval()(ids)[0], neo(ids)[0], atol=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"activation_function": "relu"}, "activation_function is relu"), ({"model_type": 3}, "neo"),
    ({"attention_types": [[["local", "global"], 1], [["local"], 1]]}, "attention_types"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"vocab_size": 64}, "vocab_size is 64"),
    ({"num_layers": "3"}, "num_layers is 3"), ({"hidden_size": 10 ** 9}, "hidden_size is 1000"),
    ({"num_heads": 5}, "n_embd=32"), ({"attention_types": "global"}, "not enough values"),
    ({"attention_types": [[["global"], "3"]]}, "not supported"), ({"window_size": None}, "window"),
    ({"attention_types": [[["global"], 10 ** 30]]}, "attention_types"), ([1], "list indices"),
    ("[" * 10 ** 5, "recursion")])
def test_what_cannot_be_imported_is_refused_by_name(neo, change, message):
    config = json.loads(Path("neo/config.json").read_text())
    change = json.dumps(config | change) if isinstance(change, dict) else str(change)
    Path("neo/config.json").write_text(change)
    with pytest.raises(SystemExit, match=message):
        hf.main(["neo"])
    assert not Path("out/neo/ckpt.pt").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_refused_in_one_sentence(neo, name):
    Path("neo", name).write_bytes(b"garbage")
    with pytest.raises(SystemExit, match="Cannot read|pip install safetensors"):
        hf.main(["neo"])


def test_what_cannot_be_exported_is_refused_by_name(data, tmp_path):
    write_untrained_run(tmp_path / "run", data)
    with pytest.raises(SystemExit, match="has no pos=rope, norm=rms"):
        hf.main(["--export", str(tmp_path / "run"), str(tmp_path / "neo")])


def test_a_released_model_becomes_a_run(neo, data, monkeypatch):
    monkeypatch.setattr(hf, "download", lambda url, path, *_: shutil.copyfile(
        Path("neo", url.rpartition("/")[2]), path))
    ranks = prepare.load_tokenizer(data)._mergeable_ranks
    monkeypatch.setattr(prepare, "gpt2_ranks", lambda: ranks)
    for _ in range(2):                                  # again: the same run
        hf.main(["roneneldan/TinyStories-Instruct-1M"])
    model, tokenizer, meta = sample.load_run("out/TinyStories-Instruct-1M", "cpu")
    assert meta["instruct"] and len(sample.generate_texts(model, tokenizer, ["Tom"], 5)) == 1


def test_search_finds_what_a_slow_search_finds(tmp_path, monkeypatch):
    def kgrams(text):
        return {tuple(map(int, text[i:i + k])) for i in range(len(text) - k + 1)}

    rng, path = np.random.default_rng(0), tmp_path / "train.bin"
    stories = [rng.integers(6, size=rng.integers(0, 40)) for _ in range(60)]
    np.concatenate([[*story, 9] for story in stories]).astype(np.uint16).tofile(path)
    ends = np.cumsum([len(story) + 1 for story in stories]) - 1
    texts, excluded = [stories[0][2:], rng.integers(7, size=20), stories[21][:9]], [0, 20, 59]
    monkeypatch.setattr(memorization, "CHUNK", 7)
    for k in memorization.KS:
        counts, share, _ = memorization.search(path, ends, texts, k, excluded)
        shelf = [kgrams(story) for i, story in enumerate(stories) if i not in excluded]
        for i, mine in enumerate(map(kgrams, texts)):
            assert share[i] == pytest.approx(max(len(mine & there) / len(mine) for there in shelf))
            assert (counts[i] == 0).sum() == len(mine - set().union(*shelf))


def test_a_model_that_knows_its_stories_by_heart_is_caught(data, tmp_path, monkeypatch, capsys):
    write_untrained_run(tmp_path / "run", data)
    text = prepare.load_tokenizer(data).decode(np.fromfile(data / "train.bin", np.uint16).tolist())
    monkeypatch.setattr(sample, "generate_texts", lambda model, tokenizer, prompts, *_, **__: [
        text.partition(prompt)[2].partition(prepare.EOT)[0] for prompt in prompts])
    memorization.main([str(tmp_path / "run"), "-n=10", "--data", str(data), "--device=cpu"])
    assert "true ending          | 1.00, at most 1.00" in capsys.readouterr().out
    assert {"memorization.md", "memorization.png"} <= {f.name for f in (tmp_path / "run").iterdir()}


def test_bench_ends_with_its_ratios(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPE", GPTConfig(100, 16, 2, 2, 32))
    monkeypatch.setattr(bench, "NEW_TOKENS", 3)
    monkeypatch.setattr(bench, "WORK", {"cpu": (64, 512)})
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)   # no transformers
    bench.main(["--rounds", "1", "--llama2c", shutil.which("true")])
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert min(ratios.values()) > 0 and {
        "training, T = 256: ours / matrix product", "loss: ours / all logits",
        "sampling, rows: 1: ours / llama2.c"} <= set(ratios)


def test_the_notebook_runs_from_top_to_bottom_twice(data, tmp_path, monkeypatch):
    """Its cells as Colab runs them; what ! gives to the shell runs here, with small settings."""
    notebook = json.loads((prepare.HERE / "study" / "colab.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(
        Image=lambda path: Path(path).read_bytes(), HTML=str))
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()                            # as if this were the repository
    small = [f"--dataset={data}", "--max_steps=2", "--n_layer=1", "--n_embd=24", "--block_size=32",
             "--total_batch_size=64", "--eval_tokens=64"]

    def shell(command):
        words = shlex.split(command)
        if words[:2] == ["python", "train.py"]:
            script, config = prepare.HERE / "train.py", prepare.HERE / words[2]
            subprocess.run([sys.executable, script, config, *small], check=True)
        elif words[0] == "python":
            {"sample.py": sample, "-m": explore}[words[1]].main(words[2 + ("-m" in words):])

    for _ in range(2):
        names = {"shell": shell}
        for cell in cells:
            exec(re.sub(r"(?m)^( *)!(.*)", r"\1shell(r'''\2''')", cell), names)
        assert len(names["page"]) > 10_000


# ---------------------------------------------------------- the judge

GRADES = {"grammar": 8, "creativity": 7, "consistency": 6, "plot": 5, "age": "D"}
server = test_model.server         # the fixture: a judge on this machine


def report_page(server, stories, *options, grades=lambda page: GRADES):
    """Stories as (model, prompt, completion) -> the page of the report, once they are graded."""
    lines = [json.dumps(dict(zip(("model", "prompt", "completion"), x))) for x in stories]
    Path("stories.jsonl").write_text("\n".join(lines))
    server.reply = lambda request: "Fine." if len(request["messages"]) == 5 else json.dumps(
        grades(request["messages"][2]["content"]))
    for program in (grade, report):
        program.main(["stories.jsonl", "--base-url", server.url, "--judge", "kind", *options])
    return max(Path().glob("report*.html"), key=lambda path: path.stat().st_mtime_ns).read_text()


def write_story(request):
    words = ", ".join(re.findall('the [a-z]+ "(.+?)"', request["messages"][0]["content"]))
    return f"Words: {words}\nSummary: Tom plays.\nStory:\nTom saw {words}.\n\nTom sat. And he ran."


def run_generate(server, *options, reply=write_story):
    server.reply, server.requests = reply, []
    generate.main(["--out", "mine.txt", "--base-url", server.url, "--yes", *options])
    return Path("mine.txt").read_text("utf-8").split("\n<|endoftext|>\n")[:-1]


def test_spearman_is_the_correlation_of_mean_ranks():
    assert report.spearman([(1, 10), (2, 20), (3, 90)]) == pytest.approx(1)
    assert report.spearman([(5, 2), (5, 1), (6, 3), (9, 3)]) == pytest.approx(
        np.corrcoef([1.5, 1.5, 3, 4], [2, 1, 3.5, 3.5])[0, 1])


def test_normalized_score_is_the_way_from_random_words_to_true_endings():
    def graded(values):
        return [{"prompt": str(i), "grades": dict.fromkeys(grade.METRICS, value)}
                for i, value in enumerate(values)]
    by = {name: graded([best - i % 2 for i in range(9)])
          for name, best in zip(grade.ANCHORS, (9, 6, 1))}
    assert report.normalized_score(graded([5, 4, 5, 4]), by) == pytest.approx((50, 0))
    assert report.normalized_score(graded([5, 4, 5, 4]), {**by, grade.ANCHORS[0]: []}) is None


def test_the_interval_of_the_rank_correlation_covers_the_true_value():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(150):                                        # correlation 0.5: Spearman's 0.483
        pairs = rng.normal(size=(10, 2)) + rng.normal(size=(10, 1))
        _, low, high = report.spearman_interval([[tuple(pair)] for pair in pairs])
        hits += low <= 0.483 <= high
    assert 0.90 <= hits / 150


def test_text_of_stories_and_models_stays_text(server):
    evil = '<img src="http://x/y.png"> <script>alert(1)</script> ![x](http://x) \x1b[31m'
    page = report_page(server, [("<b>m</b>", "Once", evil)])
    assert "<script" not in page and "<b>m" not in page and "\x1b" not in page
    assert '<img src="http' not in page and "&lt;img src=" in page and "\\x1b[31m" in page


def test_unscored_stories_come_first_and_repeated_rows_count_once(server):
    stories = [("m", "A", "good"), ("m", "B", "bad"), ("m", "C", "odd"), ("m", "A", "good")]
    page = report_page(server, stories, "--no-anchors", grades=lambda page: {
        **GRADES, "plot": "1 or 2" if "odd" in page else 1 if "bad" in page else 9})
    assert re.findall(r"<b>(\w*)</b> m", page) == ["unscored", "best", "worst"]
    lines = Path("grades.jsonl").read_text().replace('"model": "m"', '"model": "n"')
    Path("b").mkdir(), Path("b/grades.jsonl").write_text(lines)
    report.main(["grades.jsonl", "b/grades.jsonl"])     # the stories of two logs
    page = Path("report_grades_grades_kind_story.html").read_text()
    labels, models = zip(*re.findall(r"<b>(\w*)</b> (\w)", page))
    assert labels == (*["unscored"] * 2, "best", "", "", "worst") and sorted(models) == [*"mmmnnn"]


def test_all_pairs_of_models_and_judges_are_compared(server):
    stories = [(model, prompt, f"{model} {prompt}") for model in "xyz" for prompt in "ABCD"]
    report_page(server, stories, "--repeat", "1")
    page = report_page(server, stories)
    assert all(f"<td>{pair}</td>" in page for pair in ("x - y", "x - z", "y - z"))
    assert re.search(r"kind at \S+, repeat 1 - kind at \S+</td><td>\d+</td>", page)


def test_files_of_others_are_not_overwritten(server):
    Path("report_stories_kind_story.html").write_text("mine")
    with pytest.raises(SystemExit, match="not written by this command"):
        report_page(server, [("m", "A", "good")])


def test_the_game_explains_mistakes_and_survives_ctrl_c(server, monkeypatch, capsys):
    report_page(server, [("m", f"P{i}", f"Tom ran {i}. He sat.") for i in range(12)])
    keys = ["7 6 8", "7 x 8 7", "11 1 1 1", "7 6 8 7", "9 9 9 9", *[KeyboardInterrupt] * 2]
    monkeypatch.setattr("builtins.input", Mock(side_effect=keys))
    teacher.main(["stories.jsonl"])
    text = capsys.readouterr().out
    assert "4 numbers are needed, not 3" in text and "'x' is not" in text and "'11' is" in text
    assert "You gave " in text and text.count("\npage ") == 2 and "kind at" in text
    teacher.main(["stories.jsonl"])
    assert "page 1 of 10 --" not in capsys.readouterr().out         # it continues with page 3


def test_pages_are_shuffled_and_mixed_and_each_comes_once():
    names = ("m", *grade.ANCHORS)
    items = [{"model": name, "prompt": prompt} for prompt in "0123456789" for name in names]
    pages = teacher.order_pages(items, random.Random(0))
    first = [page["model"] for page in pages[:10]]
    assert sorted(map(first.count, names)) == [0, 3, 3, 4] and first != sorted(first)
    assert len({tuple(page.values()) for page in pages}) == len(pages) == 30


@pytest.mark.parametrize("kind, word, forms, wrong", [
    ("verb", "begin", "begins beginning began", "be"), ("noun", "mouse", "mice mouse's", "mousse"),
    ("verb", "hop", "hopped hopping", "hope hoped"), ("noun", "car", "cars", "cared scar"),
    ("verb", "cry", "cries cried", "cr"), ("adjective", "happy", "happier happily", "happen")])
def test_inflections_count_as_the_word(kind, word, forms, wrong):
    assert all(generate.contains(f"“{x}!”", word, kind) for x in f"{word} {forms.upper()}".split())
    assert not any(generate.contains(f"A {x}.", word, kind) for x in wrong.split())


def test_the_requested_words_count_and_not_those_that_the_teacher_names(server, capsys):
    run_generate(server, "--n", "1", reply=lambda request:
                 "Words: sun, moon, star\nSummary: Sky.\nStory:\nThe sun, the moon and a star.")
    assert "1 without a requested word" in capsys.readouterr().out


def test_nothing_is_requested_twice_and_another_seed_adds_stories(server):
    stories = run_generate(server, "--n", "5")
    assert len(server.requests) == len(stories) == 5
    more = run_generate(server, "--n", "3", "--seed", "1")
    assert len(server.requests) == 3 and more[:5] == stories and len(more) == 8
    assert run_generate(server, "--n", "1") == more and not server.requests
    with pytest.raises(SystemExit, match="another language"):
        run_generate(server, "--language", "Spanish")
