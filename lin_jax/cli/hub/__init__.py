"""Command `hub`: Hugging Face folders in and out."""
