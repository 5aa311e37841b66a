"""A first model, on stories that our own grammar tells (data/grammar.txt): no download, no GPU.

    python train.py config/demo.py

Four minutes on two CPU cores with bfloat16: 0.274 nats per token of whole stories; the grammar's
own: 0.261; other seeds: 0.277, 0.274. Without bfloat16 it takes several times as long.
"""
dataset = "sample"
n_layer, n_head, n_embd, block_size = 2, 6, 192, 256
init = "copy"                   # names, toys and colors come again: half of it is to know which
batch_tokens = 2_048
max_steps = 2_100
learning_rate = 7e-3            # small models like large steps, and many of them
momentum, weight_decay = 0.8, 0.1
decay = 0.9
eval_interval = 1_050
eval_tokens = 0                 # all of it
log_interval = 100
