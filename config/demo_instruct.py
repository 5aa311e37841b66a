"""The demo with instructions: three words, features, a summary, a sentence, then the story.

    python train.py config/demo_instruct.py
    python sample.py out/demo_instruct --words "find, boat, red"

95 % of the words that it is asked for stand in its stories; with --n_layer=1, 82 % (python -m
study.checks out/demo_instruct). 10 minutes on one of two cores that multiply bfloat16.
"""
dataset = "sample-instruct"
story_only = True               # what is asked for is given, not to be guessed
n_layer, n_head, n_embd, block_size = 3, 6, 192, 256
init = "copy"
batch_tokens = 2_048
max_steps = 2_500
learning_rate = 7e-3
momentum, weight_decay = 0.8, 0.1
decay = 0.9
eval_interval = 1_250
log_interval = 100
