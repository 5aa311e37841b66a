"""Real TinyStories on a laptop: 6 layers of width 192, on its published validation file (19 MB).

    python train.py config/tiny_laptop.py

Measured on two CPU cores with bfloat16 (2026-11-29): 6,100 tokens per second on the idle
machine, so this run takes 20 minutes, or half an hour beside other programs; 1.2 GB of memory. On a
9 MB excerpt of TinyStories (--dataset=excerpt --max_steps=900, as many epochs as here) it reached
2.034 nats per token, 0.730 bits per byte; with a learning rate of 1e-2, 2.058. The published file
has not been tried.
"""
dataset = "tinystories-small"
n_layer, n_head, n_embd, block_size = 6, 3, 192, 256
total_batch_size = 4_096
max_steps = 1_800               # 7 million tokens: the text is read about 1.6 times
learning_rate = 7e-3
eval_interval = 100
log_interval = 100
