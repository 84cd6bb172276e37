"""Operations of lin_jax with interchangeable implementations, one folder each; knows nothing of lin_jax."""
