"""Real TinyStories on a laptop: 6 layers of width 192, on its published validation file (19 MB).

    python train.py config/tiny_laptop.py

LAPTOP_MEASURED
"""
dataset = "tinystories-small"
n_layer, n_head, n_embd, block_size = 6, 3, 192, 256
total_batch_size = 4_096
max_steps = 2_000               # 8 million tokens: the text is read almost twice
learning_rate = 7e-3
eval_interval = 100
log_interval = 100
