"""The rollout room: engines that sample completions from the current weights.

`engine.Engine` is the contract. `inprocess` runs vLLM inside this process; `fleet` drives vLLM servers.
`transfer` carries new weights to either. Nothing here knows what a reward is.
"""
