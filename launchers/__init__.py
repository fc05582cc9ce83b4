"""Puts a recipe onto machines: this one (`local`, torchrun) or a cluster's nodes (`slurm`, nemo-run)."""

from launchers.launch import launch
from launchers.profile import Profile, list_profiles, load_profile

__all__ = ["Profile", "launch", "list_profiles", "load_profile"]
