"""Checkpoints in and out: other formats to and from this one."""
