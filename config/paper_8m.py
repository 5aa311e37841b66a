"""The paper's own 8M model: GPT-Neo's architecture, AdamW and a constant learning rate
(arXiv 2305.07759, and the config.json of roneneldan/TinyStories-8M).

    python train.py config/paper_8m.py
"""
dataset = "tinystories"
n_layer, n_head, n_embd, block_size = 8, 16, 256, 512
pos, norm, act, qk_norm, bias, window = "learned", "layer", "gelu", False, True, 256
init, value_residual = "normal", False
optimizer, learning_rate, beta2, weight_decay = "adamw", 5e-4, 0.95, 0.1
cooldown_frac = 0.0
total_batch_size = 655_360      # 80 x 16 rows of 512
max_steps = 2_750
