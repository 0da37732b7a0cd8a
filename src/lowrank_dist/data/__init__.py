"""Supervised fine-tuning data, from records to batches.

- `sources`: what a user names, to files and data sets;
- `records`: their records;
- `shapes`: records by their columns, and `messages` in one form;
- `chat_template`: the turns of the assistant under any template;
- `found`: whether a text holds what a record gave;
- `rendering`: records to segments of text;
- `tokenizing`: segments to tokens and labels;
- `chunks`: all of these for a chunk of records;
- `processes`: chunks in several processes;
- `loaded`: examples, and an account of what was left out;
- `loading`: the examples of a source;
- `examples`: the settings of these, and what they make of a source;
- `spool`, `cache`: examples on disk;
- `packing`: examples to items and batches;
- `sampler`: each rank's share of every step, and resuming;
- `mixture`: several sources, and the shares of those that have weights;
- `token_batches`: batches by tokens;
- `streaming`: batches of records that are read while training;
- `batching`: the settings of these, and their loaders;
- `datamodule`: the LightningDataModule.
"""
