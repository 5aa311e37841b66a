"""The 8M shape on TinyStories-Instruct: a story that follows instructions.

    python train.py config/instruct_8l.py
"""
dataset = "instruct"
n_layer, n_head, n_embd, block_size = 8, 4, 256, 512
max_steps = 9_000
learning_rate = 5e-3
