"""Documents from text files, folders, tables and the Hugging Face Hub, and the held-out split."""
