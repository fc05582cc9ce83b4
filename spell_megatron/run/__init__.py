"""A training run: the loop, what it works with on every rank, and what rank 0 alone does.

train.train(config) -> Summary      a new run
train.resume(folder) -> Summary     goes on after the newest whole checkpoint
opening.open_run(config, folder)   the parts, for a loop of one's own
"""
