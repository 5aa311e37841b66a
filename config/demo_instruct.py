"""The demo with instructions: three words, features, a summary, a sentence, then the story.

    python train.py config/demo_instruct.py
    python sample.py out/demo_instruct --words "find, boat, red"

study/results.md has the shares of required words that it uses, with three layers and with one.
"""
dataset = "sample-instruct"
n_layer, n_head, n_embd, block_size = 3, 6, 192, 256
init = "copy"
total_batch_size = 2_048
max_steps = 2_500
learning_rate = 7e-3
momentum, weight_decay = 0.8, 0.1
cooldown_frac = 0.9
eval_interval = 250
log_interval = 100
