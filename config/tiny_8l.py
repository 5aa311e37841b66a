"""The shape of the paper's 8M model with our architecture: 8 layers of width 256, on TinyStories.

    python train.py config/tiny_8l.py

An H100 trains 2.6 million tokens per second in 6.7 GB (2026-11-26). A CPU needs days for the whole
run: use config/tiny_laptop.py there.
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 4, 256, 512
total_batch_size = 65_536
max_steps = 7_000               # one epoch
learning_rate = 5e-3            # for other widths, times 256 / width (measured: study/results.md)
