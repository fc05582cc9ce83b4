"""The policy on Megatron-core: layouts, spans, head, loss, optimizer, learner. Never sees a role."""
