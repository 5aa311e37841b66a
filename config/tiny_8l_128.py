"""The shape of the paper's 3M model: 8 layers of width 128, where consistency begins.

    python train.py config/tiny_8l_128.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 2, 128, 512
learning_rate = 1e-2
