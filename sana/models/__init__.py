"""The networks: transformer, autoencoder, text encoder. None of them knows the run's config."""
