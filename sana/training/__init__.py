"""Training: the transformer's trainer, the autoencoder's and the text encoder's, and what they share."""
