"""Command `decode`: continues prompts with a trained model."""
