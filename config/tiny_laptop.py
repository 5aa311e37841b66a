"""Real TinyStories on a laptop: 6 layers of width 192, on its published validation file (19 MB).

    python train.py config/tiny_laptop.py

Measured on two CPU cores with bfloat16 that other programs used, too (2026-11-29): one epoch of a
9 MB excerpt of TinyStories (--dataset=excerpt --max_steps=558) took 9.7 minutes and 1.2 GB, and
reached 2.15 nats per token, 0.770 bits per byte. At that speed, 3,900 tokens per second, this run
takes half an hour. The published file itself has not been tried.
"""
dataset = "tinystories-small"
n_layer, n_head, n_embd, block_size = 6, 3, 192, 256
total_batch_size = 4_096
max_steps = 1_800               # 7 million tokens: the text is read about 1.6 times
learning_rate = 7e-3
eval_interval = 100
log_interval = 100
