"""The shape of the paper's 21M model: one layer of width 1024. It knows words but loses the plot.

    python train.py config/tiny_1l.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 1, 16, 1024, 512
learning_rate = 1.25e-3
