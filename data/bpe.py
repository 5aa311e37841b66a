"""How does a tokenizer learn its tokens?

Byte-pair encoding: merge the most frequent pair of neighbors into a new token, again and again.
train_bpe learns merges from a text; prune_bpe keeps the tokens of a larger vocabulary that a text
needs.
"""

import functools
import heapq
import math
from collections import Counter, defaultdict

from data.download import progress


def train_bpe(words, vocab_size):
    """Learn byte-pair merges (arXiv 1508.07909, on bytes as in GPT-2).

    words: {pre-token: count}. Returns the merges in order, as pairs of bytes:
    vocab_size minus the 256 bytes and the end token, or fewer if no pair is left. Of
    equally frequent pairs, the lexicographically greater one is first, as in Stanford's CS336."""
    times = list(words.values())
    words = [[bytes([byte]) for byte in word.encode()] for word in words]
    counts, where = Counter(), defaultdict(set)     # how often a pair occurs, and in which words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += times[i]
            where[pair].add(i)

    @functools.cache
    def descending(token):      # sorts greater tokens first, and "ab" before "a"
        return "".join(chr(255 - byte) for byte in token) + "\u0100"

    def entry(pair):            # the smallest entry of the heap is the next merge
        return -counts[pair], descending(pair[0]), descending(pair[1]), pair

    heap, merges = [entry(pair) for pair in counts], []
    heapq.heapify(heap)
    with progress("learning merges", vocab_size - 257, unit="") as bar:
        while heap and len(merges) < vocab_size - 257:
            count, _, _, pair = heapq.heappop(heap)
            if -count != counts[pair]:              # outdated: the pair has become rarer
                if counts[pair]:
                    heapq.heappush(heap, entry(pair))
                continue
            merges.append(pair)
            bar.update()
            (left, right), joined, new = pair, pair[0] + pair[1], set()
            for i in where.pop(pair):
                word, n, j = words[i], times[i], 0
                while j < len(word) - 1:
                    if word[j] == left and word[j + 1] == right:    # merge, and update neighbors
                        if j > 0:
                            counts[word[j - 1], left] -= n
                            counts[word[j - 1], joined] += n
                            where[word[j - 1], joined].add(i)
                            new.add((word[j - 1], joined))
                        if j + 2 < len(word):
                            counts[right, word[j + 2]] -= n
                            counts[joined, word[j + 2]] += n
                            where[joined, word[j + 2]].add(i)
                            new.add((joined, word[j + 2]))
                        word[j:j + 2] = [joined]
                    j += 1
            counts[pair] = 0
            for other in new:
                if counts[other]:
                    heapq.heappush(heap, entry(other))
    return merges


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
