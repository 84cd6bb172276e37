"""T5 (Raffel et al. 2020): configuration, encoder, decoder, text-to-text model and classifier."""
