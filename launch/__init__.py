"""What a person runs: the command line, configuration, data, metrics and the training loop."""
