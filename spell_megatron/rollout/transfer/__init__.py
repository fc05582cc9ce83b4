"""Carrying new weights into vLLM through its native weight-transfer API.

The API is a session: start, update (any number of times), finish. A backend says how tensors travel:
`inproc` hands them over inside one process. What vLLM forgets to repack on a CPU is mended in `cpu_repack`.
"""
