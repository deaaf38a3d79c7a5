"""From a checkpoint to a table: generation and metrics together."""
