"""Supervised fine-tuning data, from records to batches.

- `records`: reads JSONL files and Hugging Face data sets;
- `rendering`: records to segments of text;
- `tokenizing`: segments to tokens and labels;
- `packing`: examples to items and batches;
- `sampler`: each rank's share of every step, and resuming;
- `datamodule`: the LightningDataModule.
"""
