"""The job that this process runs in: what it was allocated, which signals it gets, whether its ranks are well."""
