"""Carrying new weights into vLLM through its native weight-transfer API.

The API is a session: start, update (any number of times), finish. A backend says how tensors travel:
`inproc` hands them over inside one process, `gloo` broadcasts between CPUs. How an engine takes them in is up to
`receiver`.
"""
