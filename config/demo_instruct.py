"""The demo with instructions: three words, features, a summary, a sentence, then the story.

    python train.py config/demo_instruct.py
"""
dataset = "sample-instruct"
n_layer, n_head, n_embd, block_size = 3, 3, 192, 256
batch_tokens = 2_048
max_steps = 2_200
learning_rate = 2e-2
weight_decay = 0.1
eval_interval = 600
eval_tokens = 40_960
log_interval = 100
