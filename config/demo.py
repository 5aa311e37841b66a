"""A first model, on stories from our own grammar (data/grammar.txt): no download, no GPU.

    python train.py config/demo.py

3.4 minutes on two CPU cores with bfloat16, 12 minutes on two older ones, 18 on one of those. Loss
of whole stories: 0.273 to 0.274 nats per token (seeds 1 and 2: 0.277, 0.274); entropy of the
grammar: 0.261.
"""
dataset = "sample"
n_layer, n_head, n_embd, block_size = 2, 6, 192, 256
init = "copy"                   # names, toys and colors come back: start with attention that copies
total_batch_size = 2_048
max_steps = 2_100
learning_rate = 7e-3            # small models like large steps, and many of them
momentum, weight_decay = 0.8, 0.1
cooldown_frac = 0.9
eval_interval = 100
final_eval_tokens = 0           # all of them
log_interval = 100
