"""Weights between Hugging Face folders, Megatron ranks and rollout engines: ONE name table serves all three."""
