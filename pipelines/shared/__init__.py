"""What both pipelines use: batches, training, checkpoints, inference, scores, command line."""
