"""The job that this process runs in: its allocation, its signals, its attempts and the health of its nodes."""
