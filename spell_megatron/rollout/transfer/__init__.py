"""Carrying new weights into vLLM through its native weight-transfer API.

The API is a session: start, update (any number of times), finish. A backend says how tensors travel:
`inproc` hands them over inside one process; `shm`, and vLLM's own `ipc`, from every rank of the trainer in memory of
its device (`local`); `gloo`, and vLLM's own `nccl`, from rank 0 over a communicator (`session`, `store`). How an engine
takes them in is up to `receiver`.
"""
