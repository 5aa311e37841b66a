"""A first model, on stories that our own grammar tells (data/grammar.txt): no download, no GPU.

    python train.py config/demo.py

Four to six minutes on two CPU cores with bfloat16: 0.284 nats per token of whole stories; the
grammar's own: 0.270; other seeds: 0.284, 0.286. Without bfloat16 it takes several times as long.
"""
dataset = "sample"
n_layer, n_head, n_embd, block_size = 3, 6, 192, 256
batch_tokens = 2_048
max_steps = 2_500
learning_rate = 1e-2            # small models like large steps, and many of them
momentum, weight_decay = 0.8, 0.1
decay = 0.9
eval_interval = 1_250
eval_tokens = 0                 # all of it
log_interval = 100
