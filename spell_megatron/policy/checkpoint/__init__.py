"""Learner state and run state, committed together: a crash leaves the last good state, never a mixed one.

    checkpoints/step-00012/
        learner/     megatron-core's distributed checkpoint: weights, optimizer, schedule, random state
        run.json     the step, and the state of self-play
        files.json   digest of every file; what it does not vouch for is not read

Layouts may change between save and resume: tensors are stored whole-model, every rank loads its own part.
"""

from spell_megatron.policy.checkpoint.commit import Checkpoints
from spell_megatron.policy.checkpoint.folder import Checkpoint, open_checkpoint
from spell_megatron.policy.checkpoint.state import load_learner, load_policy

__all__ = ["Checkpoint", "Checkpoints", "load_learner", "load_policy", "open_checkpoint"]
