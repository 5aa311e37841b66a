"""The shape of the paper's 33M model: 4 layers of width 768.

    python train.py config/tiny_4l.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 4, 12, 768, 512
learning_rate = 1.7e-3
