"""The shape of one of the paper's 33M models: two layers of width 1024.

    python train.py config/tiny_2l.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 2, 16, 1024, 512
learning_rate = 1.25e-3
