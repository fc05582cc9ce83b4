"""Puts a recipe onto machines: this one (`local`, `ranks`) or a cluster's nodes (`slurm`, nemo-run)."""
