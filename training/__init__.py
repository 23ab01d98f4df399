"""Training on text and on associative recall, with the transformers Trainer."""
