"""Checkpoints of a training run: adapters, optimizer and loop state, never the frozen base.

A checkpoint is a directory of safetensors and JSON, complete or absent; any number of ranks resumes from it.

- `layout`: the parts of the directory, its manifest, its verification;
- `codec`: what Lightning, callbacks and schedules know, without pickle;
- `state`: that state on its way in and out, random number generators included;
- `writer`: every tensor by its owner, all owners at once;
- `saving`: saves while training goes on;
- `resuming`: back into a sharded model.
"""
