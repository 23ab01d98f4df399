"""Training on text with the transformers Trainer, and on synthetic tests of learning in context."""
