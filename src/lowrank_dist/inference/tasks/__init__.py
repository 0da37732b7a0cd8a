"""Tasks of lm-evaluation-harness that this package ships; their data are the user's."""
