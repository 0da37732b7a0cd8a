"""AdaLoRA on sharded factors: its budget, its importance scores and its penalty. Private.

Q. Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023; arXiv:2303.10512.
"""
