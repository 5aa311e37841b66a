"""Real TinyStories on a laptop: 6 layers of width 192, on its published validation file (19 MB).

    python train.py config/tiny_laptop.py

Measured on a 9 MB excerpt of TinyStories (--dataset=excerpt, 3.2 epochs, 2026-11-29): 1.933 nats
per token, 0.693 bits per byte, after 64 minutes on two older CPU cores in float32. Two cores with
bfloat16 read 6,100 tokens per second: 20 minutes. It needs 1.2 GB of memory. With
--max_steps=900, as many epochs as here: 2.034; with a learning rate of 1e-2, 2.058. The published
file has not been tried.
"""
dataset = "tinystories-small"
n_layer, n_head, n_embd, block_size = 6, 3, 192, 256
total_batch_size = 4_096
max_steps = 1_800               # 7 million tokens: the text is read about 1.6 times
learning_rate = 7e-3
eval_interval = 100
log_interval = 100
