"""A CUDA device that is not there, for a learner whose tensors have no values."""
