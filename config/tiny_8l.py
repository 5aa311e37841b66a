"""The paper's 8M model (its shape, our architecture): 8 layers of width 256, on TinyStories.

    python train.py config/tiny_8l.py

One epoch of 9 MB of it, 9.8 minutes on two CPU cores: 2.09 nats per token, 0.749 bits per byte
(--dataset=excerpt --block_size=256 --batch_tokens=4096 --max_steps=558). On an H100, 2.6 million
tokens/s in 6.7 GB. On a CPU with a C++ compiler, --compile=True pays in runs of more than some
minutes.
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 4, 256, 512
batch_tokens = 65_536           # on a smaller GPU lower micro_batch, not this
max_steps = 7_000               # one epoch
learning_rate = 5e-3            # for other widths, times 256 / width (a sweep at three: README)
