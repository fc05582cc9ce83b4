"""Commands beside training: examine an installation, compare engine and learner, convert checkpoints."""
