"""Weights between Hugging Face folders, Megatron ranks and rollout engines: one name table for all."""
