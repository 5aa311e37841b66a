"""How does a tokenizer learn its tokens?

Byte-pair encoding: merge the most frequent pair of neighbors into a new token, again and again.
learn_bpe learns a tokenizer from a text; prune_gpt2 keeps the tokens of GPT-2 that a text needs.
"""

import functools
import heapq
import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import regex
import tiktoken

from data.common import progress
from data.text import EOT

# Pre-tokenization: contractions ('s), words, numbers, punctuation, spaces. No merge crosses them.
# BPE_PATTERN keeps combining marks (accents, vowel signs of Hindi) with letters.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_PATTERN = GPT2_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")


def make_encoding(ranks, pattern=None):
    """{bytes of a token: its id} -> tiktoken.Encoding, with the end token as the last id."""
    return tiktoken.Encoding("stories", pat_str=pattern or GPT2_PATTERN, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def encode_stories(encoding, stories):
    """Stories -> the ids of their tokens, each story followed by the end token: (N,) uint32."""
    # 256 stories at a time: enough work for one thread.
    texts = ["".join(story + EOT for story in stories[i:i + 256])
             for i in range(0, len(stories), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # tiktoken releases the GIL
        rows = pool.map(lambda text: encoding.encode_to_numpy(text, allowed_special={EOT}), texts)
        return np.concatenate([np.zeros(0, np.uint32), *rows])


# ------------------------------------ learn new tokens

def learn_bpe(sample, vocab_size):
    """A tokenizer learned from a sample (lists of stories)."""
    words = Counter()
    for stories in sample:
        for story in stories:       # without very long words: a merge reads a word as a whole
            words.update(word for word in regex.findall(BPE_PATTERN, story) if len(word) < 1_000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in train_bpe(words, vocab_size):
        ranks.setdefault(left + right, len(ranks))      # two merges may make the same token
    return make_encoding(ranks, BPE_PATTERN)


def train_bpe(words, vocab_size):
    """Learn byte-pair merges (arXiv 1508.07909, on bytes as in GPT-2).

    words: {pre-token: count}. Returns the merges in order, as pairs of bytes:
    vocab_size minus the 256 bytes and the end token, or fewer if no pair is left. Of
    equally frequent pairs, the lexicographically greater one is first, as in Stanford's CS336."""
    word_counts = list(words.values())
    words = [[bytes([byte]) for byte in word.encode()] for word in words]
    pair_counts, words_with = Counter(), defaultdict(set)   # words_with: the words that have a pair
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += word_counts[i]
            words_with[pair].add(i)

    @functools.cache
    def descending(token):      # sorts greater tokens first, and "ab" before "a"
        return "".join(chr(255 - byte) for byte in token) + "\u0100"

    def entry(pair):            # the smallest entry of the heap is the next merge
        return -pair_counts[pair], descending(pair[0]), descending(pair[1]), pair

    heap, merges = [entry(pair) for pair in pair_counts], []
    heapq.heapify(heap)
    with progress("learning merges", vocab_size - 257, unit="") as bar:
        while heap and len(merges) < vocab_size - 257:
            count, _, _, pair = heapq.heappop(heap)
            if -count != pair_counts[pair]:         # outdated: the pair has become rarer
                if pair_counts[pair]:
                    heapq.heappush(heap, entry(pair))
                continue
            merges.append(pair)
            bar.update()
            left, right = pair
            joined, new_pairs = left + right, set()
            for i in words_with.pop(pair):
                word, n, j = words[i], word_counts[i], 0
                while j < len(word) - 1:
                    if word[j] == left and word[j + 1] == right:    # merge, and update neighbors
                        if j > 0:
                            before = word[j - 1]
                            pair_counts[before, left] -= n
                            pair_counts[before, joined] += n
                            words_with[before, joined].add(i)
                            new_pairs.add((before, joined))
                        if j + 2 < len(word):
                            after = word[j + 2]
                            pair_counts[right, after] -= n
                            pair_counts[joined, after] += n
                            words_with[joined, after].add(i)
                            new_pairs.add((joined, after))
                        word[j:j + 2] = [joined]
                    j += 1
            pair_counts[pair] = 0
            for other in new_pairs:
                if pair_counts[other]:
                    heapq.heappush(heap, entry(other))
    return merges


# ------------------ keep tokens of a larger vocabulary

def gpt2_ranks():
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:          # its download can raise anything
        raise SystemExit(f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__}). "
                         "Use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR to a folder that has it.")


def prune_gpt2(ranks, sample, vocab_size):
    """GPT-2's tokenizer, with its most frequent tokens in a sample (lists of stories)."""
    full = make_encoding(ranks)
    counts, n_characters = np.zeros(full.n_vocab, int), 0       # counts: of each token
    for stories in sample:
        counts += np.bincount(encode_stories(full, stories), minlength=full.n_vocab)
        n_characters += sum(map(len, stories))
    if counts.sum() > 0.7 * n_characters:       # English: about 0.25
        print(f"GPT-2's tokenizer needs {counts.sum() / n_characters:.1f} tokens per character of "
              "this text. Better: --tokenizer bpe, which is learned from it.")
    return make_encoding(prune_bpe(ranks, counts, vocab_size))


def merge(parts, pair):
    """Join each occurrence of a pair in a list of byte strings, from left to right."""
    merged, i = [], 0
    while i < len(parts):
        match = parts[i] == pair[0] and i + 1 < len(parts) and parts[i + 1] == pair[1]
        merged.append(pair[0] + pair[1] if match else parts[i])
        i += 2 if match else 1
    return merged


def bpe_parents(token, ranks):
    """The two tokens from which BPE makes this one: apply the merges of lower rank to its bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = zip(parts, parts[1:])
        parts = merge(parts, min(pairs, key=lambda pair: ranks.get(pair[0] + pair[1], math.inf)))
    return parts


def prune_bpe(ranks, counts, vocab_size):
    """Keep the most frequent tokens of a BPE vocabulary -> ranks of at most vocab_size - 1 tokens
    (the last id is for the end token).

    counts[rank]: how often a token occurs. A token is kept together with all tokens it is
    merged from: the result is again a BPE vocabulary and encodes every text without loss."""
    kept = {bytes([byte]) for byte in range(256)}

    def missing(token):
        if token in kept:
            return set()
        return {token}.union(*map(missing, bpe_parents(token, ranks)))

    for token in sorted(ranks, key=lambda token: (-counts[ranks[token]], ranks[token])):
        new = missing(token) if counts[ranks[token]] else set()
        if len(kept) + len(new) < vocab_size:
            kept |= new
    return {token: rank for rank, token in enumerate(sorted(kept, key=ranks.get))}
