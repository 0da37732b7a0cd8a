"""Checkpoints of a training run: adapters, optimizer and loop state, never the frozen base.

A checkpoint is a directory of safetensors and JSON, complete or absent; any number of ranks resumes from it.

- `layout`: the parts of the directory, its manifest and its verification;
- `contents`: names, shapes and dtypes of the tensors in each part;
- `codec`: state of Lightning, callbacks and schedules as JSON and tensors, without pickle;
- `state`: collects and restores that state, including the random number generators;
- `writer`: writes the files; every tensor is written by the rank that owns it;
- `saving`: runs saves in the background of training;
- `resuming`: loads a checkpoint into a sharded model.
"""
