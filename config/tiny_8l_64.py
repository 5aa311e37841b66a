"""The shape of the paper's 1M model: 8 layers of width 64, where grammar begins.

    python train.py config/tiny_8l_64.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 2, 64, 512
learning_rate = 2e-2
