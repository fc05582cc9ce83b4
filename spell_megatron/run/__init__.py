"""A training run: the loop, what it works with on every rank, and what rank 0 alone does.

loop.train(config) -> Summary      a new run
loop.resume(folder) -> Summary     goes on after the newest whole checkpoint
opening.open_run(config, folder)   the parts, for a loop of one's own
"""
