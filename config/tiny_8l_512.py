"""The shape of the paper's 28M model: 8 layers of width 512.

    python train.py config/tiny_8l_512.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 8, 512, 512
learning_rate = 2.5e-3
